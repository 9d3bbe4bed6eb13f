"""The harness's own Hugging Face model, with decode steps under a policy."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from policies import AlwaysFull, PolicyFile, Selection, StepPolicy
from policies.stops import StopRule
from recycler.decode.asked import Asked, model_of
from recycler.decode.receipt import Receipt
from recycler.decode.recycled import recycled
from recycler.decode.score import score_each
from recycler.decode.tally import Tally
from recycler.model.shape import model_shape

# A child of the harness's logger, which shows it as its own.
_LOGGER = logging.getLogger("lm_eval.recycler")


@register_model("recycler")
class RecycledLM(HFLM):
    """`HFLM` whose generation runs in `recycled(...)`, and whose log-likelihoods are those of `recycler.score`.

    Encoding, batches, stop strings and what else there is are `HFLM`'s. A log-likelihood reads its context with full
    attention and then decodes the continuation token by token, one at a time: `batch_size` is of generation alone. A
    rolling one has one token of context, so that all of the text is decoded. What was applied is in the results, under
    `config.recycled`.

    Args:
        pretrained: As `HFLM` takes it: an id, a folder or a model.
        policy: As in `recycled`.
        selection: As in `recycled`.
        fast: As in `recycled`.
        exact: As in `recycled`, for generation; log-likelihoods are then decoded with every unit full.
        kwargs: Of `HFLM`; `device` is cuda where there is one, else cpu, if not given.

    Raises:
        ValueError: As `recycled` does, or if the model is an encoder with a decoder.
    """

    def __init__(
        self,
        pretrained: Any,
        policy: StepPolicy | PolicyFile | str | Path | None = None,
        selection: Selection | None = None,
        fast: bool = True,
        exact: bool | StopRule = False,
        **kwargs: Any,
    ) -> None:
        if policy is None:
            raise ValueError("the model recycler decodes with a policy: give policy=FILE in --model_args.")
        if kwargs.get("device") is None:
            kwargs["device"] = "cuda" if torch.cuda.is_available() else "cpu"
        super().__init__(pretrained, **kwargs)
        if self.backend != "causal":
            raise ValueError(f"recycled attention runs decoders alone, and this model's backend is {self.backend!r}.")
        model = model_of(self.model)
        self._asked, self._fast = Asked.of(policy, selection, None, model).in_rounds(exact), fast
        for note in self._asked.notes:
            _LOGGER.warning("%s", note)
        self._tally, self._why_plain = Tally(model_shape(model).units), ""

    @property
    def receipt(self) -> Receipt:
        """What was done in all requests so far."""
        return self._tally.receipt(self._why_plain, self._asked.horizon_steps, self._asked.notes)

    def get_model_info(self) -> dict[str, Any]:
        """What the results say of the model. The harness asks for it when all requests are done."""
        _LOGGER.info("%s", self.receipt.sentence)
        return {**super().get_model_info(), "recycled": self.receipt.to_json()}

    def _model_generate(self, *args: Any, **kwargs: Any) -> Tensor:
        asked = self._asked
        with recycled(
            self.model,
            asked.policy,
            asked.selection,
            fast=self._fast,
            horizon_steps=asked.horizon_steps,
            exact=asked.stop or False,
        ) as session:
            tokens: Tensor = super()._model_generate(*args, **kwargs)
        self._count(session.receipt())
        return tokens

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """Sum of log-probabilities, and whether all tokens are greedy, of `(texts, context, continuation)` each."""
        asked = self._asked
        of_context: dict[tuple[int, ...], list[int]] = {}
        for place, (_texts, context, continuation) in enumerate(requests):
            of_context.setdefault(self._fitting(context, len(continuation)), []).append(place)
        answers: dict[int, tuple[float, bool]] = {}
        done = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Decoding loglikelihood requests")
        for fitting, places in of_context.items():
            scored = score_each(
                self.model,
                asked.policy if asked.stop is None else AlwaysFull(),
                fitting,
                [requests[place][2] for place in places],
                asked.selection,
                fast=self._fast,
                horizon_steps=asked.horizon_steps,
            )
            for place, one in zip(places, scored, strict=True):
                answers[place] = float(one.log_probabilities.sum()), bool(one.is_greedy.all())
                self._count(one.receipt)
                if requests[place][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[place][0], answers[place])
            done.update(len(places))
        done.close()
        return [answers[place] for place in range(len(requests))]

    def _fitting(self, context: list[int], n_continuation: int) -> tuple[int, ...]:
        """A context cut from the left as `HFLM` does: the last token of the continuation needs no position."""
        too_many = len(context) + n_continuation - (self.max_length + 1)
        if too_many <= 0:
            return tuple(context)
        _LOGGER.warning(
            "a context of %d tokens loses its first %d: with its continuation of %d it is longer than max_length=%d.",
            *(len(context), too_many, n_continuation, self.max_length),
        )
        return tuple(context[too_many:])

    def _count(self, receipt: Receipt) -> None:
        self._tally.add(receipt)
        self._why_plain = receipt.why_plain or self._why_plain
