"""A step captured in a CUDA graph, and work beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch


class StepGraph:
    """Replays a step that reads and writes the same memory every time.

    The first call after `forget` runs the step as it is, so that kernels are compiled and libraries get ready; the
    second one captures it; from then on it is one launch. All three take the step once.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        # Libraries keep memory for every stream that they have seen, so runs share one.
        self._stream = _stream(device, "step")
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


class Aside:
    """Work that nothing waits for until `join`, on a second stream, which a graph captures as a branch.

    Args:
        device: Where it is done; on anything but a GPU, at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = _stream(device, "aside") if device.type == "cuda" else None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """What is launched inside begins after all that was launched before, and allocates nothing."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """Let what follows wait for it."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)


@cache
def _stream(device: torch.device, purpose: str) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
