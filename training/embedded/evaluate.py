"""Measures an exported folder and writes the figures, and a transcript, as JSON.

With ``transformers`` installed, it also checks that it loads the folder, renders conversations and decodes tokens as
the training model does. Figures of several models share one file, a section for each.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.util
import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.common import machine
from tokenizers import Tokenizer
from torch import Tensor
from training.embedded import chat_calls, probes
from training.embedded.chat_render import Message, Renderer, Tool
from training.embedded.generate import greedy, load_exported
from training.embedded.models import KINDS, Network
from training.embedded.pools import DOCS, parse_marks, read_pool, weigh
from training.embedded.transcript import EXCHANGES, transcript
from training.embedded.world import World, load_world

from isthmus.bench.report import commit

SEED = 11
LENGTHS = (256, 512, 1024)
_SKILL_LENGTH = 512
_MOST = 120  # tokens of a generated answer

_CALL = re.compile("<tool_call>(.*?)</tool_call>", re.DOTALL)

Speak = Callable[[list[Message], list[Tool]], str]


def parity(folder: Path, model: Network, tokenizer: Tokenizer) -> dict[str, Any]:
    """Whether ``transformers`` decodes the same tokens from the same folder, and how far its logits are."""
    if importlib.util.find_spec("transformers") is None:
        return {"checked": False}
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    unused = tokenizer.token_to_id("<|reserved_4|>")
    renderer, other_tokenizer, same, distance = Renderer(), AutoTokenizer.from_pretrained(folder), 0, 0.0
    for turns in EXCHANGES:
        messages = [{"role": "user", "content": turns[0]}]
        ids = tokenizer.encode(renderer.prompt(messages)).ids
        text = other_tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        if other_tokenizer(text)["input_ids"] != ids:
            raise SystemExit("transformers renders or tokenises a prompt differently")
        made = other.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False, eos_token_id=unused)
        same += made[0, len(ids) :].tolist() == greedy(model, ids, 40, set())
        with torch.no_grad():
            distance = max(distance, float((other(made).logits - model(made)).abs().max()))
    return {"checked": True, "prompts": len(EXCHANGES), "same_tokens": same, "largest_logit_difference": distance}


def _positions(tokenizer: Tokenizer, marked: str) -> probes.Fitted:
    text, spans = parse_marks("<|bos|>" + marked)
    encoding = tokenizer.encode(text)
    return encoding.ids, [at for at, weight in enumerate(weigh(encoding.offsets, spans, 1, 0)) if weight]


def uses_result(world: World, tokenizer: Tokenizer, logits: probes.Logits, speak: Speak, count: int) -> float:
    """The share of final answers that tell every value which the tool returned, however they are worded.

    An answer that is exact is one of them; only the others are generated.
    """
    rng, renderer = random.Random(SEED), Renderer()
    cases: list[probes.Called] = []
    while len(cases) < count:
        case = probes.called(world, rng, new=rng.random() < 0.5)
        if case.values:
            cases.append(case)
    made = [_positions(tokenizer, probes.last_turn(renderer, c.talk.messages, c.talk.tools())) for c in cases]
    right = 0
    for case, (ids, answer), best in zip(cases, made, probes.hits(made, logits), strict=True):
        exact = best == [ids[position] for position in answer]
        said = "" if exact else speak(case.talk.messages[:-1], case.talk.tools())
        right += exact or all(value in said for value in case.values)
    return right / count


def answers_passage(
    world: World, tokenizer: Tokenizer, logits: probes.Logits, speak: Speak, count: int, *, new: bool
) -> float:
    """The share of answers that tell the value asked for, and none of the passage's others, however they are worded.

    An answer that is exact is one of them; only the others are generated.
    """
    rng, renderer, right = random.Random(SEED), Renderer(), 0
    cases = [probes.asked(world, rng, new=new) for _ in range(count)]
    made = [_positions(tokenizer, probes.last_turn(renderer, case.messages)) for case in cases]
    for case, (ids, answer), best in zip(cases, made, probes.hits(made, logits), strict=True):
        exact = best == [ids[position] for position in answer]
        said = "" if exact else speak(case.messages[:-1], [])
        right += exact or (_tells(said, case.value) and not any(_tells(said, other) for other in case.others))
    return right / count


def calls_the_same(
    world: World, tokenizer: Tokenizer, logits: probes.Logits, speak: Speak, count: int, *, new: bool
) -> float:
    """The share of requests that are answered with the right call: the same name and arguments as JSON, and no more.

    A value can be spelled in several ways of tokens, which whoever reads the call cannot tell apart. A call that is
    exact token by token is one of them; only the others are generated.
    """
    rng, renderer, right = random.Random(SEED), Renderer(), 0
    talks = [probes.called(world, rng, new=new).talk for _ in range(count)]
    made = [_positions(tokenizer, probes.last_turn(renderer, talk.messages[:2], talk.tools())) for talk in talks]
    for talk, (ids, answer), best in zip(talks, made, probes.hits(made, logits), strict=True):
        exact = best == [ids[position] for position in answer]
        said = "" if exact else speak(talk.messages[:1], talk.tools())
        wanted = [call["function"] for call in talk.messages[1]["tool_calls"]]
        right += exact or calls_in(said) == wanted
    return right / count


def calls_in(said: str) -> list[Any]:
    """The calls that a text is made of; none when there is anything else in it."""
    texts = _CALL.findall(said)
    if "".join(f"<tool_call>{text}</tool_call>" for text in texts) != said.strip():
        return []
    try:
        return [json.loads(text) for text in texts]
    except ValueError:
        return []


def _tells(said: str, value: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", said) is not None


def two_tools(world: World, tokenizer: Tokenizer, logits: probes.Logits, count: int) -> float:
    """The share of conversations with two dependent tools in which all three turns of the assistant are exact.

    Each turn is asked for after the right ones, so that greedy decoding would have written the whole.
    """
    rng, renderer, right = random.Random(SEED), Renderer(), 0
    for _ in range(count):
        talk = chat_calls.chained(world, rng)
        made = [
            _positions(tokenizer, probes.last_turn(renderer, talk.messages[:turns], talk.tools()))
            for turns in (2, 4, 6)
        ]
        found = probes.hits(made, logits)
        right += all(best == [ids[p] for p in answer] for (ids, answer), best in zip(made, found, strict=True))
    return right / count


def figures(folder: Path, model: Network, work: Path, pools: str, count: int) -> dict[str, Any]:
    """Every figure of one model in the model card."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    world, pool = load_world(work, held_out=True), read_pool(work / pools, f"{DOCS}-held-out")
    stops = set(json.loads((folder / "generation_config.json").read_text())["eos_token_id"])
    renderer = Renderer()

    def logits(tokens: Tensor) -> Tensor:
        out: Tensor = model(tokens)
        return out

    def speak(messages: list[Message], tools: list[Tool]) -> str:
        prompt = tokenizer.encode(renderer.prompt(messages, tools)).ids
        return str(tokenizer.decode(greedy(model, prompt, _MOST, stops)))

    found: dict[str, Any] = {"bits_per_byte": round(probes.bits_per_byte(pool, tokenizer, logits, 1024, 100), 4)}
    asked = [(f"{name}@{length}", probe, length) for name, probe in probes.PROBES.items() for length in LENGTHS]
    asked += [(name, probe, _SKILL_LENGTH) for name, probe in probes.SKILLS.items()]
    for name, probe, length in asked:
        answered = probes.ask(probe, world, tokenizer, logits, length, count, seed=SEED)
        found[name] = {"exact": answered.exact, "tokens": round(answered.tokens, 4)}
        if name == "passage":
            found["passage_false_refusals"] = answered.refused
        print(name, answered, flush=True)
    found["passage_tells_value"] = answers_passage(world, tokenizer, logits, speak, count, new=False)
    found["passage_new_tells_value"] = answers_passage(world, tokenizer, logits, speak, count, new=True)
    found["tool_call_same"] = calls_the_same(world, tokenizer, logits, speak, count, new=False)
    found["tool_call_new_same"] = calls_the_same(world, tokenizer, logits, speak, count, new=True)
    found["tool_answer_uses_result"] = uses_result(world, tokenizer, logits, speak, count)
    found["two_tools"] = two_tools(world, tokenizer, logits, count)
    return found


def measure(folder: Path, work: Path, pools: str, count: int) -> dict[str, Any]:
    """The figures, the comparison with transformers, and a transcript."""
    model, tokenizer = load_exported(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    stops = set(json.loads((folder / "generation_config.json").read_text())["eos_token_id"])
    return {
        "figures": figures(folder, model, work, pools, count),
        "parity": parity(folder, model, tokenizer),
        "transcript": transcript(model, tokenizer, stops),
    }


def write(path: Path, name: str, section: dict[str, Any]) -> None:
    """Puts one model's section into the file and leaves the others as they are."""
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    models = report.get("models", {})
    models[name] = section
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"models": models}, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/embedded"), help="work folder")
    parser.add_argument("--pools", default="pools", help="folder below it with the held-out documents")
    parser.add_argument("--model", choices=sorted(KINDS), default="main", help="which model")
    parser.add_argument("--folder", type=Path, help="exported folder, where it is not the model's own in the package")
    results = Path("benchmarks/results/embedded_model.json")
    parser.add_argument("--out", type=Path, default=results, help="where to write")
    parser.add_argument("--count", type=int, default=100, help="probes of each kind and length")
    parser.add_argument("--threads", type=int, default=2, help="threads of computation")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kind = KINDS[options.model]
    result = measure(
        options.folder or Path("src/isthmus/data") / kind.folder, options.work, options.pools, options.count
    )
    latest = options.work / kind.run / "latest.json"
    training = json.loads(latest.read_text()) if latest.exists() else {}
    training.pop("tensors", None)
    section = {
        "when": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "load_average": os.getloadavg(),
        "probes_each": options.count,
        "seed": SEED,
        "training": training,
        **result,
    }
    write(options.out, options.model, section)
    print(json.dumps(result["figures"]), json.dumps(result["parity"]))


if __name__ == "__main__":
    main()
