"""A step captured in a CUDA graph, and work beside it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch

_LOGGER = logging.getLogger("recycler")


class StepGraph:
    """Replays a step that reads and writes the same memory every time.

    The first call after `forget` runs the step as it is, so that kernels are compiled and libraries get ready; the
    second one captures it; from then on it is one launch. All three take the step once.

    Args:
        stream: Of the GPU, where a step is captured.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._graph: torch.cuda.CUDAGraph | None = None
        self._is_ready = False

    def __call__(self, step: Callable[[], None]) -> None:
        """Take a step; what it allocates is the graph's own. The graph does not hold `step`, whose owner holds it."""
        if self._graph is not None:
            self._graph.replay()
        elif self._is_ready:
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on allocating meanwhile.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                step()
            self._graph = graph
            graph.replay()
        else:
            _tell_that_a_gpu_gets_ready()
            # On the stream of the capture: a library's workspace belongs to a stream.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                step()
            torch.cuda.current_stream().wait_stream(self._stream)
            self._is_ready = True

    def forget(self) -> None:
        """Begin anew: memory has moved."""
        # Nothing may run that is thrown away.
        self._stream.synchronize()
        torch.cuda.current_stream().synchronize()
        self._graph, self._is_ready = None, False


@cache
def _tell_that_a_gpu_gets_ready() -> None:
    """One line per process, before the first step: whoever waits for the second token wants to know for what."""
    _LOGGER.warning(
        "getting kernels for this GPU: the second token of a new policy or batch waits until they are compiled, or "
        "loaded from the folders where Triton and torch keep them"
    )


class Aside:
    """Work that nothing waits for until `join`, on a second stream, which a graph captures as a branch.

    Args:
        stream: Where it is done; None where there are no streams, and it is done at once.
    """

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._stream = stream
        self._is_under_way = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """What is launched inside begins after all that was launched before, and allocates nothing."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        self._is_under_way = True
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """Let what follows wait for it, if there is any."""
        # A capture must not wait for a stream that it has not reached yet.
        if self._stream is not None and self._is_under_way:
            torch.cuda.current_stream().wait_stream(self._stream)
            self._is_under_way = False


@cache
def stream_for(device: torch.device, purpose: str) -> torch.cuda.Stream | None:
    """A GPU's stream for a purpose; None on another device.

    Libraries keep memory for every stream that they have seen, so runs share one.
    """
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def on_gpu(device: torch.device) -> AbstractContextManager[object]:
    """Kernels and streams are of the current GPU, which need not be the model's."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
