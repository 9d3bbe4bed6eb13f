"""A step captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch


class StepGraph:
    """Replays a step that reads and writes the same memory every time.

    The first call after `forget` runs the step as it is, so that kernels are compiled and libraries get ready; the
    second one captures it; from then on it is one launch. All three take the step once.

    Args:
        step: What to do. Whatever it allocates is the graph's own.
        device: The GPU.
    """

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        self._step = step
        self._stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._is_ready = False

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        elif self._is_ready:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream):
                self._step()
            self._graph = graph
            graph.replay()
        else:
            # On the stream of the capture: a library's workspace belongs to a stream.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._step()
            torch.cuda.current_stream().wait_stream(self._stream)
            self._is_ready = True

    def forget(self) -> None:
        """Begin anew: memory has moved."""
        # Nothing may run that is thrown away.
        self._stream.synchronize()
        torch.cuda.current_stream().synchronize()
        self._graph, self._is_ready = None, False
