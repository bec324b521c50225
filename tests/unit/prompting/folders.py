"""Small real tokenizers, trained in the test process, and model folders around them."""

import json
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LINES = [
    "the quick brown fox jumps over the lazy dog",
    "naïve café, Ångström, größer, façade",
    "日本語のテキストと漢字",
    "emoji 👩‍👩‍👧‍👦 and 🇫🇷 flags, 👍🏽 skin",
    "Привет, мир! Добрый день.",
    "  spaces   and\n\nnewlines\tand tabs  ",
    "def add(a, b):\n    return a + b\n",
]
SPECIALS = ["<|bos|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def byte_level() -> Tokenizer:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.token_to_id("<|bos|>"))]
    )
    return tokenizer


@cache
def byte_fallback() -> Tokenizer:
    """SentencePiece-like BPE with byte fallback, as Llama 2 and Mistral have it."""
    base = Tokenizer(models.BPE())
    base.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=80, limit_alphabet=40, special_tokens=[], show_progress=False)
    base.train_from_iterator(LINES[:2], trainer)
    trained = json.loads(base.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [piece for piece in trained["vocab"] if piece not in pieces]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[tuple(merge) for merge in trained["merges"]],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    tokenizer.normalizer = base.normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@cache
def metaspace() -> Tokenizer:
    """Unigram with a Metaspace decoder, as T5 and older SentencePiece conversions have it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def write_folder(
    path: Path, tokenizer: Tokenizer | None = None, template: str | None = CHATML, **config: object
) -> Path:
    """A model folder with only the text side."""
    path.mkdir(parents=True, exist_ok=True)
    (tokenizer or byte_level()).save(str(path / "tokenizer.json"))
    entries: dict[str, object] = {"bos_token": "<|bos|>", "eos_token": {"content": "<|im_end|>"}, **config}
    if template is not None:
        entries["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(entries))
    return path
