"""What the engine runs on."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Machine:
    """How kernels are launched.

    Attributes:
        n_programs: Programs of a kernel that shares out its work: as many as run at once.
        tile_bytes: Keys of a tile of attention, in bytes; as many again are values.
        chunk_tokens: Tokens of a chunk in the kernels that choose sets, a power of 2.
        captures: Whether steps are captured in a CUDA graph.
        compiles: Whether the torch parts of a layer are compiled.
    """

    n_programs: int
    tile_bytes: int = 16384
    chunk_tokens: int = 2048
    captures: bool = True
    compiles: bool = True

    def __post_init__(self) -> None:
        for name in ("n_programs", "tile_bytes", "chunk_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.chunk_tokens & (self.chunk_tokens - 1):
            raise ValueError(f"chunk_tokens must be a power of 2, not {self.chunk_tokens}.")

    @classmethod
    def of(cls, device: torch.device) -> Machine:
        """Of a GPU: three stages of tiles let two programs of `walk` share a multiprocessor of 227 KiB."""
        return cls(2 * torch.cuda.get_device_properties(device).multi_processor_count)

    def tile_tokens(self, head_dim: int, dtype: torch.dtype) -> int:
        """Tokens of a tile, a power of 2 and at least 16, the least that `tl.dot` takes."""
        tokens = self.tile_bytes // (head_dim * dtype.itemsize)
        return max(16, 1 << (tokens.bit_length() - 1)) if tokens else 16
