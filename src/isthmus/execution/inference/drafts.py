"""Draft tokens by prompt lookup: what followed the last time the same few tokens stood in this sequence.

Source: Saxena, "Prompt Lookup Decoding" (2023). Costs no model; good for quoting and editing. Verification makes it
exact, so a bad guess only costs the step some tokens.
"""

NGRAM = 3


class NgramDrafter:
    """Proposes the continuation of the latest earlier occurrence of the last `NGRAM` tokens. O(1) a token."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}

    def extend(self, token_ids: list[int]) -> None:
        """Append tokens of the sequence."""
        for token in token_ids:
            gram = tuple(self._tokens[-NGRAM:])
            if len(gram) == NGRAM:
                self._after[gram] = len(self._tokens)
            self._tokens.append(token)

    def propose(self, limit: int) -> list[int]:
        """At most `limit` guesses for the next tokens."""
        start = self._after.get(tuple(self._tokens[-NGRAM:]))
        return [] if start is None or limit < 1 else self._tokens[start : start + limit]
