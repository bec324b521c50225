"""The parts of one step of an answer (reasoning, text, tool calls), in the order in which the model wrote them."""

from collections.abc import Sequence

from isthmus.contracts.prompting import Piece, ToolDelta


def parts_of(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """The parts of one step, in order: each is reasoning, text, or one call's next part; neighbours are joined.

    Empty when there is nothing but text.
    """
    if not any(piece.reasoning or piece.calls for piece in pieces):
        return ()
    parts: list[Piece] = []
    for piece in pieces:
        singles = [Piece("", reasoning=piece.reasoning)] if piece.reasoning else []
        singles += [Piece(piece.text)] if piece.text else []
        singles += [Piece("", calls=(call,)) for call in piece.calls]
        for single in singles:
            joined = _joined(parts[-1], single) if parts else None
            if joined is None:
                parts.append(single)
            else:
                parts[-1] = joined
    return tuple(parts)


def _joined(one: Piece, other: Piece) -> Piece | None:
    """Both as one part; None when they are of different kinds or of different calls."""
    if one.reasoning and other.reasoning:
        return Piece("", reasoning=one.reasoning + other.reasoning)
    if one.text and other.text:
        return Piece(one.text + other.text)
    if one.calls and other.calls and one.calls[0].index == other.calls[0].index and other.calls[0].name is None:
        first = one.calls[0]
        return Piece("", calls=(ToolDelta(first.index, first.name, first.arguments + other.calls[0].arguments),))
    return None
