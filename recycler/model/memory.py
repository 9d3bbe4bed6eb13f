"""What a decode step reads of a model, and how fast a device reads memory."""

from __future__ import annotations

import time

import torch
from torch import nn
from transformers import PreTrainedModel

_NUMBERS_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def weight_bytes(model: PreTrainedModel) -> int | None:
    """Bytes of the weights that a decode step of one row reads at least; None if types hide how they are packed.

    Of a table of embeddings that is not the head as well a step reads a row, which does not count; of experts, those
    that a token is sent to.
    """
    decoder: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    tables = {id(table.weight) for table in decoder.modules() if isinstance(table, nn.Embedding)}
    config = model.config.get_text_config(decoder=True)
    n_experts = next((n for name in _NUMBERS_OF_EXPERTS if (n := getattr(config, name, None))), 1)
    share = min(1, (getattr(config, "num_experts_per_tok", None) or n_experts) / n_experts)
    shares = {id(weight): share if ".experts." in name else 1 for name, weight in decoder.named_parameters()}
    read = {id(weight): weight for weight in decoder.parameters() if id(weight) not in tables}
    read |= {id(weight): weight for weight in head.parameters()}
    if any(type(weight.data) is not torch.Tensor for weight in read.values()):
        return None
    return int(sum(weight.nbytes * shares.get(key, 1) for key, weight in read.items()))


def read_gb_per_s(device: torch.device, *, n_bytes: int | None = None, n_times: int = 5) -> float:
    """What reading memory reaches, in 10^9 bytes per second: the best of some sums.

    Args:
        device: Whose memory.
        n_bytes: How much is summed; None for an eighth of a GiB, on a GPU 2 GiB or a quarter of what is free: on either
            more than caches hold, and enough that a launch does not count.
        n_times: How often.
    """
    if n_bytes is None and device.type == "cuda":
        n_bytes = min(1 << 31, torch.cuda.mem_get_info(device)[0] // 4)
    numbers = torch.ones((1 << 27 if n_bytes is None else n_bytes) // 4, device=device)
    best = float("inf")
    for _ in range(n_times):
        began = time.perf_counter()
        numbers.sum().item()
        best = min(best, time.perf_counter() - began)
    return numbers.nbytes / best / 1e9
