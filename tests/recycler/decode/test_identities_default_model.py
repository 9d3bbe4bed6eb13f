"""The identities of the session on the embedded default model and real text."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from policies import AlwaysFull, BudgetConstrained, CosineThreshold, FixedStride, NeverFull, Selection, StepSignals
from recycler import LoadedModel, Session, default_prompts, load_model, recycled
from recycler.measure.closed_loop import run_closed_loop

N_NEW = 12
CONTEXT_TOKENS = 256


@pytest.fixture(params=[True, False], ids=["engine", "plain"])
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A test that asks for it runs on the engine and on the plain path."""
    for function in (recycled, run_closed_loop):
        monkeypatch.setitem(globals(), function.__name__, partial(function, fast=request.param))
    return bool(request.param)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(None)


@pytest.fixture(scope="module")
def prompt(loaded: LoadedModel) -> Tensor:
    text = default_prompts(
        loaded.tokenizer, n_per_kind=1, context_tokens=CONTEXT_TOKENS, n_steps=8, kinds=["technical"]
    )[0]
    return torch.as_tensor(text.tokens[:CONTEXT_TOKENS].astype("int64"))[None]


@pytest.fixture(scope="module")
def generate(loaded: LoadedModel, prompt: Tensor) -> Callable[[], list[int]]:
    def run() -> list[int]:
        tokens = loaded.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=N_NEW, min_new_tokens=N_NEW, do_sample=False
        )
        return [int(token) for token in tokens[0, prompt.shape[1] :]]

    return run


@pytest.mark.usefixtures("fast")
def test_always_full_gives_the_tokens_of_stock_generate(loaded: LoadedModel, generate: Callable[[], list[int]]) -> None:
    stock = generate()
    with recycled(loaded.model, AlwaysFull(), Selection(128)) as session:
        assert generate() == stock
    assert session.receipt().full_share == 1


@pytest.mark.usefixtures("fast")
def test_a_set_as_large_as_the_context_gives_the_tokens_of_full_attention(
    loaded: LoadedModel, generate: Callable[[], list[int]]
) -> None:
    stock = generate()
    with recycled(loaded.model, NeverFull(), Selection(CONTEXT_TOKENS + N_NEW)) as session:
        assert generate() == stock
    receipt = session.receipt()
    assert (receipt.full_share, receipt.read_share) == (0, 1)


@pytest.mark.usefixtures("fast")
def test_two_generations_in_a_row_are_equal_and_leave_the_model_as_it_was(
    loaded: LoadedModel, generate: Callable[[], list[int]]
) -> None:
    stock = generate()
    attributes = set(loaded.model.__dict__)
    policy = BudgetConstrained(CosineThreshold(0.6), 0.2)

    def run(session: Session) -> list[int]:
        tokens = generate()
        assert session.receipt().full_share <= 0.2
        return tokens

    with recycled(loaded.model, policy, Selection(64)) as session:
        first, second = run(session), run(session)
    with recycled(loaded.model, policy, Selection(64)) as session:
        third = run(session)
    assert first == second == third
    assert loaded.model.config._attn_implementation == "sdpa"
    assert set(loaded.model.__dict__) == attributes
    assert generate() == stock


def test_a_fresh_process_generates_the_same_tokens(loaded: LoadedModel, generate: Callable[[], list[int]]) -> None:
    source = f"""
import torch
from policies import FixedStride, Selection
from recycler import default_prompts, load_model, recycled
torch.set_num_threads({torch.get_num_threads()})
loaded = load_model(None)
text = default_prompts(loaded.tokenizer, n_per_kind=1, context_tokens={CONTEXT_TOKENS}, n_steps=8, kinds=["technical"])
prompt = torch.as_tensor(text[0].tokens[:{CONTEXT_TOKENS}].astype("int64"))[None]
how = dict(attention_mask=torch.ones_like(prompt), max_new_tokens={N_NEW}, min_new_tokens={N_NEW}, do_sample=False)
for fast in (True, False):
    with recycled(loaded.model, FixedStride(4), Selection(64), fast=fast):
        print(loaded.model.generate(prompt, **how)[0, {CONTEXT_TOKENS}:].tolist())
"""
    here = []
    for fast in (True, False):
        with recycled(loaded.model, FixedStride(4), Selection(64), fast=fast):
            here.append(generate())
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert [json.loads(line) for line in done.stdout.splitlines()[-2:]] == here


@pytest.mark.usefixtures("fast")
def test_an_exception_while_decoding_leaves_the_model_as_it_was(
    loaded: LoadedModel, generate: Callable[[], list[int]]
) -> None:
    stock, attributes = generate(), set(loaded.model.__dict__)

    @dataclass(frozen=True)
    class Fails(AlwaysFull):
        def decide(self, signals: StepSignals) -> Tensor:
            raise RuntimeError("no decision")

    with pytest.raises(RuntimeError, match="no decision"), recycled(loaded.model, Fails(), Selection(64)):
        generate()
    assert loaded.model.config._attn_implementation == "sdpa"
    assert set(loaded.model.__dict__) == attributes
    assert generate() == stock


@pytest.mark.usefixtures("fast")
def test_closed_loop_and_session_predict_alike(loaded: LoadedModel, prompt: Tensor) -> None:
    """Float32 and two orders of summation: the same decisions, and divergences equal to rounding."""
    policy = FixedStride(3)
    tokens = prompt[0].numpy()
    n_prompt_tokens = CONTEXT_TOKENS - 8
    loop = run_closed_loop(loaded.model, tokens, n_prompt_tokens, [policy], Selection(64))
    with torch.inference_mode():
        stock = loaded.model(prompt).logits[0, n_prompt_tokens:].log_softmax(-1)
        with recycled(loaded.model, policy, Selection(64)):
            cache = loaded.model(prompt[:, :n_prompt_tokens], use_cache=True).past_key_values
            logits = [
                loaded.model(prompt[:, place : place + 1], past_key_values=cache).logits[0, -1]
                for place in range(n_prompt_tokens, CONTEXT_TOKENS)
            ]
    mine = torch.stack(logits).log_softmax(-1)
    kl = (stock.exp() * (stock - mine)).sum(-1)
    assert kl.max() > 1e-3
    torch.testing.assert_close(kl.double(), torch.as_tensor(loop.kl[0]), atol=2e-4, rtol=1e-2)
