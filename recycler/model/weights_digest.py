"""Which weights a model has."""

from __future__ import annotations

import hashlib
from itertools import chain

import torch
from torch import nn


def weights_digest(model: nn.Module) -> str:
    """`sha256:` and the hash of all parameters and buffers: their names, types, shapes and bytes.

    It takes a second for every gigabyte or two.
    """
    digest = hashlib.sha256()
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        bytes_of = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(bytes_of.numpy().data)
    return f"sha256:{digest.hexdigest()}"


def weights_sample(model: nn.Module) -> str | None:
    """A digest of some thousand numbers of every parameter, evenly spaced: milliseconds, whatever the model's size.

    Numbers are rounded to bfloat16, so that it is the same in float32, float64 and bfloat16; float16 rounds otherwise
    and has digests of its own, which begin with "float16:" and not with "bfloat16:". Names and sizes count too, so
    that adapters and quantized layers are other weights. None if numbers cannot be read, as of weights on
    the meta device and in packed tensor types.
    """
    rounded = torch.float16 if any(tensor.dtype == torch.float16 for tensor in model.parameters()) else torch.bfloat16
    digest = hashlib.sha256()
    for name, tensor in model.named_parameters():
        if tensor.is_meta or type(tensor.data) is not torch.Tensor:
            return None
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        numbers = tensor.detach().reshape(-1)
        # An odd stride meets all columns of a matrix, whose width is even.
        numbers = numbers[:: numbers.numel() // 1024 | 1]
        if numbers.is_floating_point():
            numbers = numbers.to(rounded)
        digest.update(numbers.cpu().contiguous().view(torch.uint8).numpy().data)
    return f"{rounded}:".removeprefix("torch.") + digest.hexdigest()
