"""The tiered block store: what an engine has computed, kept beyond device memory, request, process and machine."""
