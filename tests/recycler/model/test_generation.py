"""What a generation says of its speed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedModel

from recycler.model.generation import Generation, generate_tokens


def test_steps_in_which_a_gpu_gets_ready_are_no_speed() -> None:
    cold = Generation(tuple(range(12)), prefill_s=1.0, decode_s=31.8, warming_steps=2, warming_s=30.0)
    assert cold.tokens_per_s == pytest.approx(9 / 1.8)
    assert Generation((1,), prefill_s=1.0, decode_s=0.0).tokens_per_s is None


@pytest.mark.parametrize(("warming_steps", "left_out"), [(0, 0), (2, 2), (5, 0)])
def test_steps_that_get_an_engine_ready_are_left_out_if_there_are_others(
    make_model: Callable[..., PreTrainedModel], warming_steps: int, left_out: int
) -> None:
    run = generate_tokens(make_model("llama"), [1, 2, 3], max_new_tokens=6, ends=False, warming_steps=warming_steps)
    assert run.warming_steps == left_out
    assert (run.warming_s > 0) == (left_out > 0)
    assert run.tokens_per_s == pytest.approx((5 - left_out) / (run.decode_s - run.warming_s))
