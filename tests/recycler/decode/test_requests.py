"""Requests at once on one model: stock ones and recycled ones with policies of their own, each as it is alone."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from policies import CosineThreshold, FixedStride, NeverFull, Selection, StepPolicy
from recycler.decode.recycled import recycled
from recycler.decode.session import Session

SELECTION = Selection(12, sinks=2, window=4)
POLICIES: tuple[StepPolicy | None, ...] = (
    None,
    FixedStride(3),
    NeverFull(),
    CosineThreshold(0.9),
    None,
    FixedStride(5),
)


@pytest.fixture(params=["engine", "modules", "plain"])
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def fast(path: str) -> bool:
    return path != "plain"


@pytest.fixture
def model(make_model: Callable[..., PreTrainedModel], path: str) -> Iterator[PreTrainedModel]:
    """With a hook in a layer its own modules run around compiled attention."""
    made = make_model("llama")
    hooks = [made.model.layers[0].mlp.register_forward_hook(lambda *_: None)] if path == "modules" else []
    yield made
    for hook in hooks:
        hook.remove()


@dataclass(frozen=True)
class Request:
    """A prompt, and who decides; nobody for a stock request."""

    tokens: Tensor
    policy: StepPolicy | None
    n_new: int

    def generate(self, model: PreTrainedModel, fast: bool) -> list[int]:
        """What is written, in this thread."""
        if self.policy is None:
            return self.call(model.generate)
        with recycled(model, self.policy, SELECTION, fast=fast) as session:
            written = self.call(model.generate)
        assert session.receipt().n_steps == self.n_new - 1
        return written

    def call(self, generate: Callable[..., Any]) -> list[int]:
        """The same by some function."""
        mask = torch.ones_like(self.tokens)
        found = generate(self.tokens, attention_mask=mask, max_new_tokens=self.n_new, min_new_tokens=self.n_new)
        written: list[int] = found[0].tolist()
        return written


def requests(make_tokens: Callable[..., Tensor], n: int) -> list[Request]:
    rng = random.Random(0)
    return [
        Request(make_tokens(rng.randint(16, 40), seed=i % 7), POLICIES[i % len(POLICIES)], rng.randint(6, 16))
        for i in range(n)
    ]


def test_requests_of_many_threads_are_each_as_alone(
    model: PreTrainedModel, make_tokens: Callable[..., Tensor], fast: bool
) -> None:
    asked = requests(make_tokens, 42)
    methods = model.forward, model.config._attn_implementation
    alone = [request.generate(model, fast) for request in asked]
    # A policy changes what is written, so that whoever got another's would be found.
    assert len({tuple(written) for written in alone}) > 20
    with ThreadPoolExecutor(16) as threads:
        together = list(threads.map(lambda request: request.generate(model, fast), asked * 2))
    assert together == alone * 2
    assert (model.forward, model.config._attn_implementation) == methods


async def step_by_step(
    model: PreTrainedModel, request: Request, fast: bool, meet: Callable[[Session], None]
) -> list[int]:
    """Write greedily, and let others go on after every token."""
    assert request.policy is not None
    with recycled(model, request.policy, SELECTION, fast=fast) as session:
        cache = DynamicCache(config=model.config)
        fed, written = request.tokens, []
        for _ in range(request.n_new):
            fed = model(fed, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            written.append(int(fed))
            meet(session)
            await asyncio.sleep(0)
    return written


def side_by_side(
    model: PreTrainedModel, asked: list[Request], fast: bool, meet: Callable[[Session], None] = lambda _: None
) -> list[list[int]]:
    """What tasks write that take their steps in turn."""

    async def gather() -> list[list[int]]:
        return list(await asyncio.gather(*(step_by_step(model, request, fast, meet) for request in asked)))

    # Around all tasks: modes of torch belong to threads.
    with torch.inference_mode():
        return asyncio.run(gather())


def test_tasks_that_take_steps_in_turn_are_each_as_alone(
    model: PreTrainedModel, make_tokens: Callable[..., Tensor], fast: bool
) -> None:
    asked = [request for request in requests(make_tokens, 16) if request.policy is not None]
    alone = [side_by_side(model, [request], fast)[0] for request in asked]
    assert side_by_side(model, asked, fast) == alone


def test_sessions_that_change_places_are_found_out(
    model: PreTrainedModel, make_tokens: Callable[..., Tensor], fast: bool
) -> None:
    # The control of the test above: two sessions swap what they remember once, in the middle.
    asked = [Request(make_tokens(30), policy, 14) for policy in (NeverFull(), FixedStride(2))]
    alone = [side_by_side(model, [request], fast)[0] for request in asked]
    met: list[Session] = []

    def swap(session: Session) -> None:
        met.append(session)
        if len(met) == 12:
            one, other = met[-2:]
            one._run, other._run = other._run, one._run

    try:
        together = side_by_side(model, asked, fast, swap)
    except ValueError as error:
        assert "cache changed" in str(error)  # noqa: PT017
    else:
        assert together != alone


def test_a_session_generates_from_other_threads_inside_its_with_and_after_it(
    model: PreTrainedModel, make_tokens: Callable[..., Tensor], fast: bool
) -> None:
    request = Request(make_tokens(30), FixedStride(3), 12)
    expected, stock = request.generate(model, fast), request.call(model.generate)
    assert expected != stock
    found: dict[str, list[int]] = {}

    def run(name: str, generate: Callable[..., Any]) -> None:
        found[name] = request.call(generate)

    with recycled(model, FixedStride(3), SELECTION, fast=fast) as session:
        for name, generate in (("session's", session.generate), ("model's", model.generate)):
            thread = threading.Thread(target=run, args=(name, generate))
            thread.start()
            thread.join()
        run("here", session.generate)
    run("after", session.generate)
    assert (found["session's"], found["here"], found["after"]) == (expected, expected, expected)
    # A thread begins with nothing: what it calls of the model itself is the model's.
    assert found["model's"] == stock
    assert [turn.n_steps for turn in session.turns()] == [11, 11, 11]
    assert request.call(model.generate) == stock


def test_a_with_that_ends_in_another_context_says_that_not_all_was_recycled(
    model: PreTrainedModel, make_tokens: Callable[..., Tensor]
) -> None:
    request = Request(make_tokens(20), FixedStride(3), 8)
    stock = request.call(model.generate)

    def stream() -> Iterator[list[int]]:
        with recycled(model, FixedStride(3), SELECTION):
            yield request.call(model.generate)
            yield request.call(model.generate)

    # As a server runs a generator: every step of it in a copy of its own context.
    steps = stream()
    first, second = (contextvars.copy_context().run(next, steps) for _ in range(2))
    assert first != stock
    assert second == stock
    with pytest.warns(UserWarning, match="ended in another thread or task than it began in"):
        contextvars.copy_context().run(steps.close)
    assert request.call(model.generate) == stock


def test_a_hook_that_is_added_inside_stays(model: PreTrainedModel, make_tokens: Callable[..., Tensor]) -> None:
    request, calls = Request(make_tokens(20), FixedStride(3), 8), []
    stock = request.call(model.generate)
    try:
        with recycled(model, FixedStride(3), SELECTION):
            recycled_first = request.call(model.generate)
            inside = model.forward

            def hooked(*args: Any, **kwargs: Any) -> Any:
                calls.append(1)
                return inside(*args, **kwargs)

            # As accelerate and adapters do.
            hooked.__signature__ = inspect.signature(inside)  # type: ignore[attr-defined]
            model.forward = hooked
            assert request.call(model.generate) == recycled_first
        n_inside = len(calls)
        assert n_inside == 8
        assert request.call(model.generate) == stock
        assert len(calls) == n_inside + 8
    finally:
        model.__dict__.pop("forward", None)
