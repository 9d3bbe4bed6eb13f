"""Streams and captures, with stand-ins that keep CUDA's rules: work runs at once, and who waits for whom is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from policies import BudgetConstrained, CosineThreshold, FixedStride, Selection
from recycler.decode.cuda import engine, step_graph
from recycler.decode.cuda.unit_kernels import UnitKernels
from recycler.decode.recycled import recycled

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has streams of its own")

Make = Callable[..., Any]


class Stream:
    """Knows what has been launched on it, and what it has waited for."""

    def __init__(self, gpu: Gpu, name: str) -> None:
        self.gpu, self.name, self.known = gpu, name, set[int]()

    def wait_stream(self, other: Stream) -> None:
        capturing = self.gpu.capturing
        if self in capturing and other not in capturing:
            raise RuntimeError(f"{self.name} is captured and may not wait for {other.name}, which is not.")
        if other in capturing:
            capturing.add(self)
        self.known |= other.known

    def synchronize(self) -> None:
        assert not self.gpu.capturing, "nothing may wait for a stream during a capture."
        self.gpu.current.known |= self.known


class Gpu:
    """What `torch.cuda` offers to `step_graph`; counts launches, steps by capture and steps by replay."""

    def __init__(self) -> None:
        self.current = Stream(self, "the main stream")
        self.streams = {"step": Stream(self, "the stream of steps"), "aside": Stream(self, "the stream aside")}
        self.capturing: set[Stream] = set()
        self.n_launched = self.n_captures = self.n_replays = 0

    def launch(self) -> int:
        """Something runs on the current stream; returns its number."""
        self.n_launched += 1
        self.current.known.add(self.n_launched)
        return self.n_launched

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextmanager
    def graph(self, graph: Graph, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        self.n_captures += 1
        graph.gpu, graph.is_new = self, True
        self.capturing = {stream}
        with self.stream(stream):
            yield
        lost = {launch for one in self.capturing for launch in one.known} - stream.known
        assert not lost, "a branch of the capture was not joined."
        self.capturing = set()
        graph.known = set(stream.known)


class Graph:
    """A capture takes the step, as stand-ins cannot take it later, so its first replay does not, and others may not."""

    gpu: Gpu
    known: set[int]
    is_new = False

    def replay(self) -> None:
        assert self.is_new
        self.is_new = False
        self.gpu.n_replays += 1
        self.gpu.current.known |= self.known


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", gpu.graph)
    monkeypatch.setattr(torch.cuda, "stream", gpu.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: gpu.current)
    monkeypatch.setattr(engine, "stream_for", lambda device, purpose: gpu.streams[purpose])
    return gpu


@pytest.fixture
def launches(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What a layer's units do, in the order of launches, checked to know all that went before it."""
    launched: list[tuple[str, int]] = []

    def watch(name: str) -> None:
        stock = getattr(UnitKernels, name)

        def call(self: UnitKernels, *args: Any) -> Any:
            # They work on memory that all layers share.
            missing = {before for _, before in launched} - gpu.current.known
            assert not missing, f"{name} may begin before {missing} of {launched} have ended."
            launched.append((name, gpu.launch()))
            return stock(self, *args)

        monkeypatch.setattr(UnitKernels, name, call)

    for name in ("prepare", "attend", "settle"):
        watch(name)
    return launched


def test_one_line_tells_before_the_first_step_what_is_waited_for(
    make_model: Make,
    make_tokens: Make,
    on_engine: Make,
    gpu: Gpu,
    launches: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[tuple[str, int]] = []
    step_graph._tell_that_a_gpu_gets_ready.cache_clear()
    monkeypatch.setattr(
        step_graph._LOGGER, "warning", lambda line: told.append((line.partition(":")[0], len(launches)))
    )
    model, tokens = make_model(head_dim=16, dtype=torch.float32), make_tokens(20)
    on_engine(captures=True)
    for _ in range(2):
        with recycled(model, FixedStride(2), Selection(12, sinks=2, window=4)):
            model.generate(tokens, max_new_tokens=3, min_new_tokens=3)
    assert launches
    assert told == [("getting kernels for this GPU", 0)]


@pytest.mark.parametrize(
    "policy", [FixedStride(2), BudgetConstrained(CosineThreshold(0.99), 0.3)], ids=lambda policy: policy.kind
)
def test_two_steps_run_and_are_captured_by_the_rules_of_cuda(
    make_model: Make, make_tokens: Make, on_engine: Make, gpu: Gpu, launches: list[tuple[str, int]], policy: Any
) -> None:
    model, tokens = make_model(head_dim=16, dtype=torch.float32), make_tokens(20, rows=2)
    logits = []
    for captures in (False, True):
        on_engine(captures=captures)
        with torch.no_grad(), recycled(model, policy, Selection(12, sinks=2, window=4)) as session:
            cache = model(tokens, use_cache=True).past_key_values
            steps = [model(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(2)]
        assert session.receipt().engine == "cuda"
        logits.append(torch.cat(steps, 1))
    assert (gpu.n_captures, gpu.n_replays) == (1, 1)
    assert len(launches) == 2 * 2 * 3 * model.config.num_hidden_layers
    assert {launch for _, launch in launches} <= gpu.current.known
    np.testing.assert_array_equal(*(part.numpy() for part in logits))
