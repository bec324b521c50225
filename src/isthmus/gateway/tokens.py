"""POST /tokenize and /detokenize, in vLLM's shapes."""

from isthmus.contracts.prompting import ChatOptions
from isthmus.gateway.context import Call
from isthmus.gateway.decode import decode_json
from isthmus.gateway.errors import HttpError
from isthmus.gateway.output_form import tool_definitions
from isthmus.gateway.render import encode
from isthmus.gateway.schema_requests import DetokenizeRequest, TokenizeRequest
from isthmus.gateway.schema_responses import DetokenizeResponse, TokenizeResponse
from isthmus.gateway.service import Service
from isthmus.gateway.tools import chat_messages, thinking


async def tokenize(service: Service, call: Call) -> None:
    """The token ids of a prompt or of a conversation."""
    body = decode_json(call.exchange.request, TokenizeRequest, service.settings)
    service.planner.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise HttpError(400, "one of prompt and messages is needed", code="invalid_input", param="prompt")
    if body.messages is not None:
        options = ChatOptions(
            tools=tool_definitions(body.tools),
            thinking=thinking(body.chat_template_kwargs),
            add_generation_prompt=body.add_generation_prompt is not False,
        )
        ids = await service.prompting.encode_chat(chat_messages(body.messages), options)
    else:
        special = body.add_special_tokens is not False
        ids = await service.prompting.encode(body.prompt or "", add_special_tokens=special)
    answer = TokenizeResponse(len(ids), service.info.max_model_len, ids)
    await call.exchange.respond(200, encode(answer), "application/json")


async def detokenize(service: Service, call: Call) -> None:
    """The text of token ids, special tokens included."""
    body = decode_json(call.exchange.request, DetokenizeRequest, service.settings)
    service.planner.check_model(body.model)
    service.planner.check_tokens(body.tokens, "tokens")
    text = await service.prompting.decode(body.tokens)
    await call.exchange.respond(200, encode(DetokenizeResponse(text)), "application/json")
