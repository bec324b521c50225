"""The HTTP edge: OpenAI's dialect at protocol level. Never imports torch.

`Gateway(GatewayDeps, GatewaySettings)` with `start`, `drain` and `close` is all that the composition root needs.
"""
