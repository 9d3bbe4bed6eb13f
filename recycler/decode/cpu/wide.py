"""What a decoder layer does besides attention, for many rows: products are torch's, which use what they load for all.

With many rows a matrix product is bound by arithmetic and not by reading the weights. torch's reaches 82 and 96 GFLOP/s
at 48 and 96 rows of the default model on two Zen 3 cores, `recycler.decode.cpu.linear` 38: a step of 48 rows takes 247
ms instead of 381. With few rows torch's threads and ours, which wait for work in turns, take longer: 211 ms instead of
165 at 17 rows.
"""

from __future__ import annotations

import numpy as np
import torch

from recycler.decode.cpu.arrays import Array, Cache, LayerWeights, Rules, Scratch, Units
from recycler.decode.cpu.dense import gate, normalise, rotate

# Rows from which on it pays.
LEAST_ROWS = 32


def project(
    x: Array,
    weights: LayerWeights,
    cosine: Array,
    sine: Array,
    cache: Cache,
    n_own: int,
    units: Units,
    signals: Array,
    rules: Rules,
    scratch: Scratch,
    n_threads: int,
) -> None:
    """As `recycler.decode.cpu.dense.project`."""
    normalise(x, weights.norm, weights.eps, scratch.normed)
    column = 0
    for weight, bias in (
        (weights.query, weights.query_bias),
        (weights.key, weights.key_bias),
        (weights.value, weights.value_bias),
    ):
        _product(scratch.normed, weight, bias, scratch.projected[:, column : column + len(weight)])
        column += len(weight)
    rotate(weights, cosine, sine, cache, n_own, units, signals, rules, scratch)


def feed(x: Array, weights: LayerWeights, scratch: Scratch, n_threads: int) -> None:
    """As `recycler.decode.cpu.dense.feed`."""
    _product(scratch.attended.reshape(len(x), -1), weights.output, weights.output_bias, x, add=True)
    normalise(x, weights.feed_norm, weights.feed_eps, scratch.normed)
    _product(scratch.normed, weights.gate, weights.gate_bias, scratch.gate)
    _product(scratch.normed, weights.up, weights.up_bias, scratch.up)
    gate(scratch.gate, scratch.up)
    _product(scratch.gate, weights.down, weights.down_bias, x, add=True)


def predict(
    x: Array, norm: Array, eps: float, head: Array, head_bias: Array, scratch: Scratch, logits: Array, n_threads: int
) -> None:
    """As `recycler.decode.cpu.dense.predict`."""
    normalise(x, norm, eps, scratch.normed)
    _product(scratch.normed, head, head_bias, logits)


def _product(x: Array, weight: Array, bias: Array, out: Array, *, add: bool = False) -> None:
    """`out = x @ weight.T + bias`, or that added to what is there."""
    into, transposed = torch.from_numpy(out), torch.from_numpy(weight).T
    torch.addmm(into, torch.from_numpy(x), transposed, beta=int(add), out=into)
    if len(bias):
        np.add(out, bias, out=out)
