"""What must be equal on a GPU before anything is timed there."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from policies import (
    AlwaysFull,
    BudgetConstrained,
    CosineThreshold,
    FixedStride,
    LearnedLogistic,
    NeverFull,
    RefreshKeys,
    Selection,
    StepPolicy,
)
from policies.stops import FixedDrafts
from recycler import recycled
from recycler.decode import engines
from recycler.decode.cuda.engine import CudaEngine

_BUDGET = BudgetConstrained(CosineThreshold(0.99), 0.2)
_LOGISTIC = LearnedLogistic(
    ("age", "query_drift", "step_drift", "refresh_loss", "refresh_churn"), (0.1, 3.0, 0.2, 1.0, 0.5), -6.0
)
_POLICIES = (FixedStride(4), _BUDGET, _LOGISTIC, RefreshKeys(_BUDGET))


@dataclass(frozen=True)
class IdentitySizes:
    """How large the model and its outputs are.

    Attributes:
        hidden: Width of the model.
        head_dim: Of a head.
        heads: Query heads.
        kv_heads: KV heads.
        layers: Decoder layers.
        context_tokens: Of the prompt.
        steps: Decode steps.
        k: Tokens of a set.
        drafts: Of a round.
    """

    hidden: int = 4096
    head_dim: int = 128
    heads: int = 32
    kv_heads: int = 8
    layers: int = 4
    context_tokens: int = 1501
    steps: int = 40
    k: int = 256
    drafts: int = 8

    @classmethod
    def of(cls, device: torch.device) -> IdentitySizes:
        """An 8B model's attention on a GPU, a tiny model's in the interpreter."""
        return cls() if device.type == "cuda" else cls(32, 16, 2, 1, 1, 44, 4, 40, 2)


class _Forced(LogitsProcessor):
    """Makes `generate` say given tokens."""

    def __init__(self, tokens: torch.Tensor, n_prompt: int) -> None:
        self._tokens, self._n_prompt = tokens, n_prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, float("-inf"))
        return forced.scatter(1, self._tokens[:, input_ids.shape[1] - self._n_prompt][:, None], 0.0)


@dataclass(frozen=True)
class _Ran:
    tokens: list[list[int]]
    logits: torch.Tensor
    receipt: Any


class _Subject:
    """A model with random weights, and prompts of which the last row is padded."""

    def __init__(self, sizes: IdentitySizes, device: torch.device) -> None:
        torch.manual_seed(0)
        self._sizes = sizes
        config = LlamaConfig(
            vocab_size=8192 if device.type == "cuda" else 128,
            hidden_size=sizes.hidden,
            intermediate_size=sizes.hidden,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.kv_heads,
            head_dim=sizes.head_dim,
            max_position_embeddings=65536,
            bos_token_id=None,
            eos_token_id=None,
        )
        with device:
            self.wide = LlamaForCausalLM(config).float().eval().requires_grad_(False)
        self.narrow = copy.deepcopy(self.wide).to(torch.bfloat16)
        self.tokens = torch.randint(config.vocab_size, (2, sizes.context_tokens), device=device)
        self.mask = torch.ones_like(self.tokens)
        self.mask[1, :17] = 0

    def run(
        self,
        model: PreTrainedModel,
        policy: StepPolicy | None,
        *,
        k: int | None = None,
        rows: slice = slice(None),
        forced: torch.Tensor | None = None,
        fast: bool = True,
        exact: bool = False,
    ) -> _Ran:
        tokens, mask = (part[rows].to(model.device) for part in (self.tokens, self.mask))
        asked: dict[str, Any] = {
            "attention_mask": mask,
            "max_new_tokens": self._sizes.steps,
            "min_new_tokens": self._sizes.steps,
            "do_sample": False,
            "pad_token_id": 0,
            "output_logits": True,
            "return_dict_in_generate": True,
        }
        if forced is not None:
            asked["logits_processor"] = LogitsProcessorList([_Forced(forced.to(model.device), tokens.shape[1])])
        if policy is None:
            done, receipt = model.generate(tokens, **asked), None  # type: ignore[operator]
        else:
            rule = FixedDrafts(self._sizes.drafts) if exact else False
            with recycled(model, policy, Selection.unpooled(k or self._sizes.k), fast=fast, exact=rule) as session:
                done = model.generate(tokens, **asked)  # type: ignore[operator]
            receipt = session.receipt()
        said = done.sequences[:, tokens.shape[1] :]
        return _Ran(said.tolist(), torch.stack(done.logits, 1).float().cpu(), receipt)


@contextmanager
def _step_by_step(device: torch.device) -> Iterator[None]:
    """Without graphs: every kernel is launched from the host."""
    usual = engines.engine_for

    def engine_for(model: PreTrainedModel) -> Any:
        engine = usual(model)
        machine = type(engine._machine)(**vars(engine._machine) | {"captures": False})
        return CudaEngine(model, machine)

    with patch.object(engines, "engine_for", engine_for):
        yield


def identities(sizes: IdentitySizes, device: torch.device) -> Iterator[dict[str, Any]]:
    """Claims, whether they hold, and how far things are apart."""
    subject = _Subject(sizes, device)
    stock = subject.run(subject.wide, None)

    def beside(claim: str, found: _Ran, other: _Ran, **more: Any) -> dict[str, Any]:
        apart = float((found.logits - other.logits).abs().max())
        same = found.tokens == other.tokens
        return {
            "claim": claim,
            "holds": same,
            "logits_apart": apart,
            "engine": getattr(found.receipt, "engine", None),
        } | more

    full = subject.run(subject.wide, AlwaysFull())
    yield beside("always full gives the tokens of stock generate, float32", full, stock)
    enough = sizes.context_tokens + sizes.steps
    yield beside(
        "k >= context gives the tokens of stock generate, float32",
        subject.run(subject.wide, NeverFull(), k=enough),
        stock,
    )

    for policy, k in ((NeverFull(), None), (NeverFull(), enough), (_BUDGET, None)):
        in_rounds = subject.run(subject.wide, policy, k=k, exact=True)
        claim = f"exact decoding gives the tokens of stock generate, float32, drafts by {policy.kind}"
        per_round = in_rounds.receipt.rounds.tokens_per_round
        yield beside(claim + (", k >= context" if k else ""), in_rounds, stock, tokens_per_round=per_round)

    forced = torch.tensor(stock.tokens, device=device)
    exact = subject.run(subject.wide, None, forced=forced).logits
    apart = {
        name: float((subject.run(subject.narrow, policy, forced=forced).logits - exact).square().mean().sqrt())
        for name, policy in (("stock", None), ("engine", AlwaysFull()))
    }
    in_rounds = subject.run(subject.narrow, NeverFull(), forced=forced, exact=True)
    apart["exact"] = float((in_rounds.logits - exact).square().mean().sqrt())
    yield {
        "claim": "in bfloat16, always full and exact are as near to float32 as stock generate is, within a quarter",
        "holds": max(apart["engine"], apart["exact"]) <= 1.25 * apart["stock"],
        "rms_apart": apart,
        "rms_of_logits": float(exact.square().mean().sqrt()),
    }

    for policy in _POLICIES:
        for model in (subject.wide, subject.narrow):
            captured = subject.run(model, policy)
            with _step_by_step(device):
                alone = subject.run(model, policy)
            same = bool((captured.receipt.full_steps == alone.receipt.full_steps).all())
            row = beside(
                f"a captured step is that of its kernels one by one, {policy.kind}, {model.dtype}", captured, alone
            )
            yield row | {
                "holds": row["holds"] and same and row["logits_apart"] == 0,
                "full_share": captured.receipt.full_share,
            }

    for model in (subject.wide, subject.narrow):
        captured = subject.run(model, _BUDGET, exact=True)
        with _step_by_step(device):
            alone = subject.run(model, _BUDGET, exact=True)
        row = beside(f"a captured round is that of its kernels one by one, {model.dtype}", captured, alone)
        yield row | {
            "holds": row["holds"] and row["logits_apart"] == 0 and captured.receipt.rounds == alone.receipt.rounds
        }

    for policy in _POLICIES:
        both = subject.run(subject.wide, policy)
        single = [subject.run(subject.wide, policy, rows=slice(row, row + 1)) for row in range(2)]
        row = beside(
            f"a batch is its rows alone, {policy.kind}",
            both,
            _Ran([one.tokens[0] for one in single], torch.cat([one.logits for one in single]), None),
        )
        counts = np.sum([one.receipt.full_steps for one in single], axis=0)
        yield row | {"holds": row["holds"] and bool((both.receipt.full_steps == counts).all())}

    on_host = copy.deepcopy(subject.wide).cpu()
    for policy in _POLICIES:
        there = subject.run(subject.wide, policy, forced=forced)
        here = subject.run(on_host, policy, forced=forced, fast=False)
        row = beside(f"decisions over a text are those of the CPU, {policy.kind}", there, here)
        same = bool((there.receipt.full_steps == here.receipt.full_steps).all())
        yield row | {"holds": same, "unit_steps_full": int(here.receipt.full_steps.sum())}
