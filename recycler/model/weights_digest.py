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
