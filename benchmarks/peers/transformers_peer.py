"""transformers' `generate` as a peer: `transformers_peer.py FOLDER THREADS DTYPE`, driven over lines.py.

It has no scheduler: asks of one length that wait together are one batch, others wait their turn. So `mixed` runs one
ask at a time, which is what its users get without a server.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from lines import Arrivals, Ask, Trace, serve
from transformers import AutoModelForCausalLM, LogitsProcessorList


class Steps:
    """Notes each step of a batch: it is called with the logits of every step, and leaves them as they are.

    (A streamer would do for one sequence; transformers refuses one for several.)
    """

    def __init__(self, arrivals: Arrivals, indices: list[int]) -> None:
        self._arrivals, self._indices = arrivals, indices

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """One step's logits."""
        del input_ids
        for index in self._indices:
            self._arrivals.came(index, 1)
        return scores


def main() -> None:
    """Load, then answer."""
    torch.set_num_threads(int(sys.argv[2]))
    dtype = torch.bfloat16 if sys.argv[3] == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=dtype).eval()

    def answer(asks: list[Ask]) -> list[Trace]:
        arrivals, waiting = Arrivals(asks), list(enumerate(asks))
        while waiting:
            time.sleep(max(0.0, waiting[0][1]["at_s"] - arrivals.now))
            shape = len(waiting[0][1]["prompt"]), waiting[0][1]["output"]
            come = [(i, a) for i, a in waiting if a["at_s"] <= arrivals.now]
            batch = [(i, a) for i, a in come if (len(a["prompt"]), a["output"]) == shape]
            waiting = [entry for entry in waiting if entry not in batch]
            ids = torch.tensor([ask["prompt"] for _, ask in batch])
            with torch.inference_mode():
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=shape[1],
                    min_new_tokens=shape[1],
                    do_sample=False,
                    pad_token_id=0,
                    logits_processor=LogitsProcessorList([Steps(arrivals, [index for index, _ in batch])]),
                )
        return arrivals.traces

    serve(answer)


if __name__ == "__main__":
    main()
