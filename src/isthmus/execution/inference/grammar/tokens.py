"""The model's vocabulary as llguidance wants it, from tokenizer.json, in the grammar process.

Why a wrapper: the library tokenises forced text with the tokenizer as it is, which finds the names of special tokens in
text. A constraint that forces the text `<|end|>` would then force the token of that name and break off. Here text is
text: a special token is only ever what a grammar names as one.
"""

from llguidance import LLTokenizer, TokenizerWrapper
from tokenizers import Tokenizer

from isthmus.contracts.errors import Unsupported

FIELD = "constraint"


class _Text:
    """What `TokenizerWrapper` reads: the bytes of each token, which are special, and a function that tokenises."""

    def __init__(self, base: LLTokenizer, plain: Tokenizer, eos_token_id: int) -> None:
        self.eos_token_id = eos_token_id
        self.bos_token_id = None
        self.tokens = [base.decode_bytes([token]) for token in range(base.vocab_size)]
        self.special_token_ids = [token for token in range(base.vocab_size) if base.is_special_token(token)]
        self._special = frozenset(self.special_token_ids)
        self._base = base
        self._plain = plain

    def __call__(self, text: bytes) -> list[int]:
        """The tokens of `text`, none of them special, that give exactly its bytes."""
        ids = self._base.tokenize_bytes(text)
        if self._special.isdisjoint(ids):
            return ids
        ids = self._plain.encode(text.decode("utf-8", "replace"), add_special_tokens=False).ids
        if self._special.isdisjoint(ids) and b"".join(self.tokens[token] for token in ids) == text:
            return ids
        return self._base.greedy_tokenize(text.decode("utf-8", "replace"))


def load_tokenizer(data: bytes, vocab_size: int, eos_token_ids: list[int]) -> LLTokenizer:
    """The tokenizer in `data` for a model with `vocab_size` logits. Raises `Unsupported`, field `constraint`."""
    try:
        text = data.decode()
        base = LLTokenizer(text, vocab_size, eos_token_ids)
        plain = Tokenizer.from_str(text)
    except ValueError as error:
        reason = (str(error).splitlines() or ["no reason given"])[0][:200]
        raise Unsupported(f"constraints cannot be used with this model's tokenizer: {reason}", FIELD) from error
    plain.encode_special_tokens = True
    wrapped = TokenizerWrapper(_Text(base, plain, eos_token_ids[0]))
    return LLTokenizer(wrapped, vocab_size, eos_token_ids)
