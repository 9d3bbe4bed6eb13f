"""What a decode step reads of a model, and how fast a device reads memory."""

from __future__ import annotations

import time

import torch
from torch import nn
from transformers import PreTrainedModel

_NUMBERS_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def weight_bytes(model: PreTrainedModel) -> int | None:
    """Bytes of the weights that a decode step of one row reads; None if they are packed in ways that do not tell.

    Of a table of embeddings that is not the head as well a step reads a row, which does not count; of experts, those
    that a token is sent to.
    """
    decoder: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    tables = {id(table.weight) for table in decoder.modules() if isinstance(table, nn.Embedding)}
    weights = {name: weight for name, weight in decoder.named_parameters() if id(weight) not in tables}
    weights |= {f"head.{name}": weight for name, weight in head.named_parameters()} if head is not None else {}
    packed = getattr(model.config, "quantization_config", None) is not None
    if packed or any(type(weight.data) is not torch.Tensor for weight in weights.values()):
        return None
    of_experts = sum(weight.nbytes for name, weight in weights.items() if ".experts." in name)
    share = _share_of_experts(model) if of_experts else 1.0
    if share is None:
        return None
    return round(sum(weight.nbytes for weight in weights.values()) - of_experts * (1 - share))


def _share_of_experts(model: PreTrainedModel) -> float | None:
    """Of its experts those that a token is sent to; None if the configuration tells in another way."""
    config = model.config.get_text_config(decoder=True)
    n_experts = next((n for name in _NUMBERS_OF_EXPERTS if (n := getattr(config, name, None))), None)
    n_chosen = getattr(config, "num_experts_per_tok", None)
    return n_chosen / n_experts if isinstance(n_chosen, int) and isinstance(n_experts, int) else None


def read_gb_per_s(device: torch.device, *, n_bytes: int | None = None, n_times: int = 5) -> float:
    """What reading memory reaches, in 10^9 bytes per second: the best of some sums.

    Args:
        device: Whose memory.
        n_bytes: How much is summed; None for a quarter of a GiB, and on a GPU, where launching a sum takes as long as
            reading a tenth of that, 2 GiB, or a quarter of what is free.
        n_times: How often.
    """
    if n_bytes is None:
        n_bytes = 1 << 28
        if device.type == "cuda":
            n_bytes = max(n_bytes, min(1 << 31, torch.cuda.mem_get_info(device)[0] // 4))
    numbers = torch.ones(n_bytes // 4, device=device)
    best = float("inf")
    for _ in range(n_times):
        began = time.perf_counter()
        numbers.sum().item()
        best = min(best, time.perf_counter() - began)
    return numbers.nbytes / best / 1e9
