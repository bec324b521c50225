"""Length framing for hashing: two different lists of fields never give the same bytes."""


def frame(domain: bytes, *fields: bytes) -> bytes:
    """`domain` and `fields`, each behind its length as 8 little-endian bytes."""
    parts = []
    for field in (domain, *fields):
        parts.append(len(field).to_bytes(8, "little"))
        parts.append(field)
    return b"".join(parts)
