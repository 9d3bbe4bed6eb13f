"""How kernels are launched."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recycler.decode.cuda import machine
from recycler.decode.cuda.machine import Machine
from recycler.model.decoder_parts import NotCovered


@pytest.mark.parametrize(
    ("head_dim", "dtype", "tokens"),
    [(128, torch.bfloat16, 64), (64, torch.bfloat16, 128), (256, torch.float32, 16), (128, torch.float32, 32)],
)
def test_a_tile_holds_as_many_bytes_whatever_the_heads(head_dim: int, dtype: torch.dtype, tokens: int) -> None:
    assert Machine(1).tile_tokens(head_dim, dtype) == tokens


def test_a_tile_is_never_too_small_for_a_matrix_product() -> None:
    assert Machine(1, tile_bytes=1).tile_tokens(128, torch.float32) == 16


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"n_programs": 0}, "n_programs must be at least 1, not 0."),
        ({"n_programs": 1, "tile_bytes": -3}, "tile_bytes must be at least 1, not -3."),
        ({"n_programs": 1, "walk_warps": 3}, "walk_warps must be a power of 2, not 3."),
        ({"n_programs": 1, "chunk_tokens": 100}, "chunk_tokens must be a power of 2, not 100."),
    ],
)
def test_a_machine_that_cannot_be_is_refused(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        Machine(**wrong)


def test_the_launches_of_every_known_device_can_be() -> None:
    for launch in machine._TUNED.values():
        assert Machine(1, *launch).walk_stages > 0


def test_torch_for_rocm_whose_devices_are_called_cuda_is_left_to_the_plain_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(NotCovered, match=r"^it has run on NVIDIA's GPUs only, and this is torch for ROCm"):
        Machine.of(torch.device("cuda"), 128, 4)


def test_a_launch_that_was_tuned_is_of_its_device_and_shape_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_TUNED", {("a GPU", 128, 4): (8192, 8, 2)})

    def launched(name: str, head_dim: int, group: int) -> tuple[int, int, int]:
        found = SimpleNamespace(name=name, multi_processor_count=3)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
        of = Machine.of(torch.device("cuda"), head_dim, group)
        assert of.n_programs == 6
        return of.tile_bytes, of.walk_warps, of.walk_stages

    assert launched("a GPU", 128, 4) == (8192, 8, 2)
    usual = Machine.tile_bytes, Machine.walk_warps, Machine.walk_stages
    assert launched("a GPU", 64, 4) == launched("a GPU", 128, 7) == launched("another", 128, 4) == usual
