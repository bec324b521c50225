"""Prints the tables of the model card from the figures that ``evaluate.py`` wrote."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

LENGTHS = (256, 512, 1024)
_BY_LENGTH = {
    "recall": "recall of one of 8 pairs, plain text",
    "recall_chat": "the same in a conversation",
    "passkey": "passkey, plain text",
    "passkey_chat": "the same in a conversation",
    "facts": "one of three facts told over turns",
    "copying": "copying 13 random words after a cue of 3",
}
_SKILLS = {
    "passage": "question that a passage of 2 to 8 sentences answers, unseen subjects and values",
    "passage_tells_value": "the answer tells that value and no other of the passage, in whatever words",
    "passage_new": "question about relations made up for the probe",
    "passage_new_tells_value": "the answer tells that value and no other",
    "passage_false_refusals": "of these, refused",
    "passage_missing": "question that it does not answer: the refusal",
    "passage_thinking": "answered after a thought",
    "tool_call": "call of an everyday tool, one of 1 to 3 that are offered: the whole call, unseen values",
    "tool_call_same": "the same as JSON, in whatever tokens it is spelled",
    "tool_call_new": "the same of a tool made up for the probe",
    "tool_call_new_same": "the same as JSON",
    "tool_call_thinking": "the same after a thought",
    "tool_answer": "final answer, word for word",
    "tool_answer_uses_result": "final answer tells every value of the result",
    "tool_second": "two dependent tools: the second call",
    "two_tools": "the same, both calls and the answer",
    "tool_none": "no tool fits or none is needed: no call",
}


def _exact(found: Any) -> str:
    """A share as per cent; a probe's figure also tells its share of right tokens."""
    if isinstance(found, dict):
        return f"{100 * found['exact']:.0f}% ({100 * found['tokens']:.1f}%)"
    return "" if found is None else f"{100 * found:.0f}%"


def tables(models: dict[str, Any]) -> str:
    """The tables in Markdown: for each model by length, and for all of them the skills."""
    lines = []
    for name, section in models.items():
        figures = section["figures"]
        lines += [
            f"{name}: {figures['bits_per_byte']:.3f} bits a byte",
            "",
            "| probe | 256 | 512 | 1024 |",
            "|---|---|---|---|",
        ]
        for probe, words in _BY_LENGTH.items():
            cells = [_exact(figures.get(f"{probe}@{length}")) for length in LENGTHS]
            lines.append(f"| {words} | {' | '.join(cells)} |")
        lines.append("")
    lines += [f"| probe | {' | '.join(models)} |", "|---|" + "---|" * len(models)]
    for probe, words in _SKILLS.items():
        cells = [_exact(section["figures"].get(probe)) for section in models.values()]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--figures", type=Path, default=Path("benchmarks/results/embedded_model.json"), help="the JSON")
    options = parser.parse_args()
    print(tables(json.loads(options.figures.read_text())["models"]))


if __name__ == "__main__":
    main()
