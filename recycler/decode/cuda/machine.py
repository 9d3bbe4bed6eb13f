"""What the engine runs on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from recycler.model.decoder_parts import NotCovered

# How `walk` is launched best, as `benchmarks/gpu.py --only walk` found: by the name of a device, the size of a head and
# the query heads of a KV head. Bytes of a tile, warps, stages; what is not here has the defaults of `Machine`.
_TUNED: Mapping[tuple[str, int, int], tuple[int, int, int]] = MappingProxyType({("NVIDIA H200", 128, 4): (16384, 4, 3)})


@dataclass(frozen=True)
class Machine:
    """How kernels are launched.

    Attributes:
        n_programs: Programs of a kernel that shares out its work: as many as run at once.
        tile_bytes: Keys of a tile of attention, in bytes; as many again are values.
        walk_warps: Warps of a program of the attention, a power of 2.
        walk_stages: Tiles of which it has copies under way or in use.
        chunk_tokens: Tokens of a chunk in the kernels that choose sets, a power of 2.
        captures: Whether steps are captured in a CUDA graph.
        compiles: Whether the torch parts of a layer are compiled.
    """

    n_programs: int
    tile_bytes: int = 16384
    walk_warps: int = 4
    walk_stages: int = 3
    chunk_tokens: int = 2048
    captures: bool = True
    compiles: bool = True

    def __post_init__(self) -> None:
        for name in ("n_programs", "tile_bytes", "walk_warps", "walk_stages", "chunk_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("walk_warps", "chunk_tokens"):
            if getattr(self, name) & (getattr(self, name) - 1):
                raise ValueError(f"{name} must be a power of 2, not {getattr(self, name)}.")

    @classmethod
    def of(cls, device: torch.device, head_dim: int, group: int) -> Machine:
        """Of a GPU: three stages of tiles let two programs of `walk` share a multiprocessor of 227 KiB.

        Args:
            device: The GPU.
            head_dim: Numbers per head of the model.
            group: Query heads of a KV head.

        Raises:
            NotCovered: If it is none of NVIDIA's.
        """
        if torch.version.hip is not None:
            raise NotCovered(
                "it has run on NVIDIA's GPUs only, and this is torch for ROCm, which calls its devices cuda"
            )
        found = torch.cuda.get_device_properties(device)
        return cls(2 * found.multi_processor_count, *_TUNED.get((found.name, head_dim, group), ()))

    def tile_tokens(self, head_dim: int, dtype: torch.dtype) -> int:
        """Tokens of a tile, a power of 2 and at least 16, the least that `tl.dot` takes."""
        tokens = self.tile_bytes // (head_dim * dtype.itemsize)
        return max(16, 1 << (tokens.bit_length() - 1)) if tokens else 16
