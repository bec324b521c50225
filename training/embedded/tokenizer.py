"""Trains the tokenizer: byte-level BPE, 8192 entries, every digit on its own.

It is trained on the documents and on a sample of the exercises, so that the
words of a conversation are single tokens too. Nothing adds a bos token on its
own: the chat template writes it.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from training.embedded.chat_render import TEMPLATE, THINK, THINK_END, Renderer
from training.embedded.mixture import KINDS
from training.embedded.world import MARK_CLOSE, MARK_OPEN, load_world

VOCABULARY = 8192
NAMED = ["<|bos|>", "<|eos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|tool|>"]
# Single tokens that are text all the same: a parser of the output must see them. Their ids were reserved at first,
# so that models of the first edition and of this one share a layout; four names of the reserved ones are gone.
TAGS = ["<tool_call>", "</tool_call>", THINK, THINK_END]
SPECIAL = NAMED + TAGS + [f"<|reserved_{n}|>" for n in range(len(TAGS), 12)]
CONTEXT = 2048
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def unmarked(text: str) -> str:
    """The text without the marks of what is to be learned."""
    return text.replace(MARK_OPEN, "").replace(MARK_CLOSE, "")


def _texts(work: Path, seed: int) -> Iterator[str]:
    for line in (work / "docs.jsonl").read_text().splitlines():
        document = json.loads(line)
        if not document["held_out"]:
            yield document["text"]
    world, rng = load_world(work, held_out=False), random.Random(seed)
    renderer = Renderer()
    for kind, (make, _, _) in KINDS.items():
        for _ in range(14_000 if kind == "chat" else 3_000):
            yield unmarked(make(world, rng, renderer, 120))


def train(work: Path, seed: int) -> Tokenizer:
    """A tokenizer trained on the work folder's text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(t, special=True, normalized=False) for t in SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(work, seed), trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise ValueError(f"expected {VOCABULARY} entries, got {tokenizer.get_vocab_size()}: too little text")
    return tokenizer


def write(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the tokenizer's files in the Hugging Face layout."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.loads(tokenizer.to_str())
    for added_token in content["added_tokens"]:
        added_token["special"] = added_token["content"] not in TAGS
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    roles = {"bos_token": "<|bos|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    added = {
        str(tokenizer.token_to_id(t)): {
            "content": t,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": t not in TAGS,
        }
        for t in SPECIAL
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        **roles,
        "additional_special_tokens": [t for t in SPECIAL if t not in [*roles.values(), *TAGS]],
        "added_tokens_decoder": added,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "chat_template": TEMPLATE.read_text().strip(),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(roles, indent=2) + "\n")


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/embedded"), help="work folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the sampled exercises (default: %(default)s)")
    help_text = "write the files around the tokenizer again, the chat template among them, and train nothing"
    parser.add_argument("--keep", action="store_true", help=help_text)
    options = parser.parse_args()
    folder = options.work / "tokenizer"
    if options.keep:
        write(Tokenizer.from_file(str(folder / "tokenizer.json")), folder)
    else:
        write(train(options.work, options.seed), folder)


if __name__ == "__main__":
    main()
