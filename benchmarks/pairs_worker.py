"""One side of `benchmarks/pairs.py`: decodes with the checkout that is first on the path, a turn for a line read."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from decode_bench import Bench, Case, staggered
from decode_subject import subject_of
from transformers import LogitsProcessor, LogitsProcessorList

from policies import AlwaysFull, NeverFull, RefreshKeys, Selection
from recycler import model_shape

_K = 512
# Until caches have room and kernels are compiled.
_WARM_UP_STEPS = 5


class _Turns(LogitsProcessor):
    """Stops before every turn, until a line is read."""

    def __init__(self, turns: int, steps: int) -> None:
        self._turns, self._steps = turns, steps
        self._n_logits = 0
        self._began = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # The first logits are the prompt's.
        step = self._n_logits - _WARM_UP_STEPS
        self._n_logits += 1
        if step >= 0 and step % self._steps == 0:
            print(time.perf_counter() - self._began, flush=True)
            if step < self._turns * self._steps:
                sys.stdin.readline()
                self._began = time.perf_counter()
        return scores


def _scaled(selection: Selection) -> Selection:
    """What `Selection.at_k` does, which checkouts before 0.2 do not have."""
    if selection.unit_k is None:
        return replace(selection, k=_K)
    return replace(selection, k=_K, unit_k=[[size * _K // selection.k for size in row] for row in selection.unit_k])


def main() -> None:
    """Decode as the first argument says, a JSON object."""
    asked = json.loads(sys.argv[1])
    subject = subject_of(None, None, asked["dtype"], "cpu", Path(asked["policy"]))
    layers, kv_heads = model_shape(subject.model).units
    own = None if subject.selection is None else _scaled(subject.selection)
    cases = {
        "tuned": Case("tuned", subject.policy, selection=own),
        "stride": Case("stride", staggered(layers, kv_heads, 10)),
        "full": Case("full", AlwaysFull()),
        "never": Case("never", NeverFull()),
        "by keys": Case("by keys", RefreshKeys(staggered(layers, kv_heads, 4))),
    }
    bench = Bench(subject.model, subject.tokens, _K, 0)
    context, batch = asked["context"], asked["batch"]
    tokens = subject.tokens.repeat(batch, -(-context // subject.tokens.shape[1]))[:, :context]
    n_new = _WARM_UP_STEPS + 1 + asked["turns"] * asked["steps"]
    cache = bench._dynamic(context - 1, batch)
    with torch.inference_mode(), bench._session(cases[asked["case"]]):
        found = subject.model.generate(  # type: ignore[operator]
            tokens,
            attention_mask=torch.ones_like(tokens),
            past_key_values=cache,
            max_new_tokens=n_new,
            min_new_tokens=n_new,
            do_sample=False,
            logits_processor=LogitsProcessorList([_Turns(asked["turns"], asked["steps"])]),
            pad_token_id=0,
        )
    print(hashlib.sha256(found[:, context:].numpy().tobytes()).hexdigest(), flush=True)


if __name__ == "__main__":
    main()
