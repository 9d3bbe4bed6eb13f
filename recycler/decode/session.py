"""What a `with recycled(...)` does with calls of a model: prompts are read, steps are taken, audits made."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from policies import Selection, StepPolicy
from policies.stops import StopRule
from recycler.decode import engines
from recycler.decode.audit import Auditor
from recycler.decode.engine import Engine
from recycler.decode.engine_run import EngineRun
from recycler.decode.forward_call import ForwardCall
from recycler.decode.governor import Governor
from recycler.decode.last_prompt import LastPrompt
from recycler.decode.plain.decoding import PlainEngine
from recycler.decode.plain.run import PlainRun
from recycler.decode.receipt import Receipt
from recycler.decode.rounds import ExactEngine
from recycler.decode.session_sentences import (
    MODEL_CHANGED,
    NOT_CALLED,
    NOTHING_RECYCLED,
    SPOILED,
    STEPPED_INSIDE,
)
from recycler.decode.token_ids import check_tokens, n_vocabulary
from recycler.decode.turns import Turns
from recycler.model.attention_hook import AttentionFunction, Functions, owner_here, refuse_full_window, replaced
from recycler.model.decoder_parts import NotCovered
from recycler.model.model_watch import ModelWatch
from recycler.model.shape import max_positions, model_shape, most_tokens, recycled_layers
from recycler.sets.scores import Scoring

_AnyRun = TypeVar("_AnyRun", EngineRun | PlainRun, PlainRun)
# What a model gives beside logits if its config says so.
_MORE_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")


class Session:
    """The state of one `recycled` block: what the last prompt left, the run that decodes after it, and the receipt.

    Args:
        model: The model.
        policy: Who decides; for the model's shape.
        selection: How sets are chosen; likewise.
        horizon_steps: As in `recycled`.
        notes: What receipts say of the model.
        auditor: Who measures how far steps were from full attention; None for nobody.
        governor: Who decides how much the policy may, between audits; None for the policy alone.
        exact: When a round of drafts ends that is verified; None for decoding that is approximate.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: StepPolicy,
        selection: Selection,
        horizon_steps: int | None = None,
        notes: tuple[str, ...] = (),
        auditor: Auditor | None = None,
        governor: Governor | None = None,
        exact: StopRule | None = None,
    ) -> None:
        shape = model_shape(model)
        self._model = model
        self._layers = recycled_layers(model)
        self._policy, self._governor = policy, governor
        # A text of twice a model's positions is none that it can read.
        self._prompt = LastPrompt(shape, selection.within(2 * max_positions(model)))
        self._n_vocabulary = n_vocabulary(model)
        self._auditor = auditor
        self._exact, self._most_tokens = exact, most_tokens(model)
        # To a cache in the middle of which an audit was interrupted.
        self._spoiled: Callable[[], Any] = lambda: None
        self._audits = self._warned = False
        self._generating = threading.RLock()
        # Whether the model was called; read several tokens that `generate` did not call prefill; took a step, or was
        # refused one.
        self._was_called = self._has_read = self._has_stepped = False
        self._turns = Turns(shape.units, horizon_steps, notes)
        self._engine: Engine | None = None
        self._watch: ModelWatch | None = None
        self._run: EngineRun | PlainRun | None = None
        # Ids that the model's forward is running on, `(rows, tokens)`.
        self._fed: Tensor | None = None
        self.in_prefill = False

    def use(self, engine: Engine) -> None:
        """Run decode steps on an engine, as far as it covers them; what they run on is compiled now."""
        of_session = self._in_rounds(engine)
        of_session.compile(drafts=self._auditor is not None)
        self._engine = of_session
        self._watch = ModelWatch(self._model) if engine.holds_weights else None
        self._turns.why_plain = engine.why_modules

    def stay_plain(self, reason: str) -> None:
        """Run decode steps on the plain path; `reason` goes into the receipt."""
        self._turns.why_plain = reason

    def applied(self) -> AbstractContextManager[None]:
        """Run this session's functions in the place of the model's, in this thread or task."""
        return replaced(self._model, self._functions)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`model.generate` of this session, from any thread, inside of its `with` and after it; one call at a time."""
        with self._generating:
            if owner_here(self._model) is self:
                return self._model.generate(*args, **kwargs)  # type: ignore[operator]
            with self.applied():
                try:
                    return self._model.generate(*args, **kwargs)  # type: ignore[operator]
                finally:
                    self._end_turn()

    def forward(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """The model's forward in this session, given its own."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            call = ForwardCall(args, kwargs)
            self._was_called = True
            check_tokens(call.known_tokens, self._n_vocabulary)
            if (spoiled := self._spoiled()) is not None and call.arguments.get("past_key_values") is spoiled:
                raise ValueError(SPOILED)
            if self.in_prefill or not call.is_one_token or not self._prompt.is_read:
                self._end_turn()
                read = self._plainly(call, stock, args, kwargs)
                self._prompt.check_read()
                self._has_read |= not (self.in_prefill or call.is_one_token)
                return read
            self._has_stepped = True
            if self._auditor is not None:
                self._auditor.check(call)
            if self._run is None:
                self._run = self._led(self._begin_run(call), self._prompt.bad_rows)
            if isinstance(self._run, EngineRun):
                if self._watch is not None and self._watch.has_changed:
                    raise ValueError(MODEL_CHANGED)
                stepped = self._run.step(call)
            else:
                stepped = self._plainly(call, stock, args, kwargs)
            logits = stepped[0] if isinstance(stepped, tuple) else stepped.logits
            assert logits is not None
            if (bad := self._turns.see(logits[:, -1])) is not None:
                self._run.run_full(bad)
            if self._auditor is not None:
                self._auditor.keep(call, logits)
                if self._auditor.is_due:
                    self._audit(self._auditor, stock, call.arguments["past_key_values"])
            return stepped

        return forward

    def _functions(self, stock: Functions) -> Functions:
        return Functions(
            attention=self.attention(stock.attention),
            forward=None if stock.forward is None else self.forward(stock.forward),
            prefill=None if stock.prefill is None else self._prefill(stock.prefill),
            owner=self,
        )

    def _prefill(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """What `generate` calls to read a prompt, which tells that what it runs is prefill.

        The last chunk of a prefill may be one token, as a decode step is: its length does not tell.
        """

        def prefill(*args: Any, **kwargs: Any) -> Any:
            self.in_prefill = True
            try:
                return stock(*args, **kwargs)
            finally:
                self.in_prefill = False

        return prefill

    def attention(self, stock: AttentionFunction) -> AttentionFunction:
        """The attention function of this session, given the one that it replaces."""

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
        ) -> tuple[Tensor, Tensor | None]:
            layer, scoring = self._layers[int(module.layer_idx)], Scoring.of_call(key, kwargs)  # type: ignore[arg-type]
            end, visible = _visible(query, key, mask)
            refuse_full_window(layer, end, kwargs.get("sliding_window"))
            keys, values = key[:, :, :end], value[:, :, :end]
            if self.in_prefill or query.shape[2] > 1 or not self._prompt.is_read:
                if not self._audits:
                    self._end_turn()
                self._prompt.read(layer, query, keys, visible, scoring)
                return stock(module, query, key, value, mask, **kwargs)
            # Whoever calls inner modules of the model comes here without a call of its forward.
            self._has_stepped = True
            if self._run is None:
                self._run = self._led(self._plain_run(), self._prompt.bad_rows)
            if isinstance(self._run, EngineRun):
                raise ValueError(STEPPED_INSIDE)
            attended = self._run.attend(layer, query, keys, values, visible, scoring, self._fed)
            if not attended.recycled[0].numel():
                # The very numbers of the stock function, so that always full is the stock decoder.
                return stock(module, query, key, value, mask, **kwargs)
            return attended.output.flatten(1, 2)[:, None], None

        return attend

    def receipt(self) -> Receipt:
        """What was done since the `with` began."""
        return self._turns.receipt(self._run)

    def turns(self) -> tuple[Receipt, ...]:
        """A receipt for each output, what was decoded after one prompt or one more turn of it: the last 100 of them."""
        return self._turns.each(self._run)

    def finish(self) -> None:
        """End decoding: an engine's memory is given back, and what it still has to say of the padding is said."""
        self._end_turn()
        if not (self._was_called or self._has_stepped):
            warnings.warn(NOT_CALLED, stacklevel=3)
        elif self._has_read and not self._has_stepped:
            warnings.warn(NOTHING_RECYCLED, stacklevel=3)

    def _led(self, run: _AnyRun, bad_rows: Tensor) -> _AnyRun:
        """A run that begins, in which rows that are no numbers run full; `bad_rows` are those of what was read."""
        if (bad := self._turns.see_prompt(bad_rows)) is not None:
            run.run_full(bad)
        return run

    def _begin_run(self, call: ForwardCall) -> EngineRun | PlainRun:
        """On the engine, if there is one and it covers this."""
        if self._engine is not None:
            try:
                if self._watch is not None and self._watch.has_changed:
                    self.use(engines.engine_for(self._model))
                self._prompt.check(call.arguments.get("past_key_values"), self._layers)
                return self._engine_run(self._engine, call)
            except NotCovered as reason:
                self._turns.why_plain = str(reason)
        if self._exact is not None:
            try:
                return self._engine_run(self._in_rounds(PlainEngine(self._model, inside_of=self)), call)
            except NotCovered as reason:
                raise ValueError(f"exact decoding takes drafts back, and {reason}: leave out exact.") from reason
        return self._plain_run()

    def _engine_run(self, engine: Engine, call: ForwardCall) -> EngineRun:
        if wanted := [name for name in _MORE_OUTPUTS if getattr(self._model.config, name, False)]:
            raise NotCovered(f"the model's config asks for {wanted[0]}")
        return EngineRun(engine, call, self._deciding, self._prompt.first_sets(), self._layers)

    def _in_rounds(self, engine: Engine) -> Engine:
        return engine if self._exact is None else ExactEngine(engine, self._exact, self._most_tokens)

    def _plain_run(self) -> PlainRun:
        return PlainRun(self._prompt.first_sets(), self._deciding, self._prompt.watches)

    @property
    def _deciding(self) -> StepPolicy:
        return self._policy if self._governor is None else self._governor.policy

    def _audit(self, auditor: Auditor, stock: Callable[..., Any], cache: Any) -> None:
        """Repeat the last steps as if they were a prompt, on the engine where it reads several tokens at once."""
        run = self._run if isinstance(self._run, EngineRun) and self._run.repeats(self._policy.needs) else None
        self._end_run()
        # An audit of one step is no step.
        self.in_prefill = self._audits = True
        try:
            audited = auditor.run(stock, None if run is None else run.repeat)
        except BaseException:
            self._spoiled = weakref.ref(cache)
            raise
        finally:
            self.in_prefill = self._audits = False
        window = None if self._governor is None else self._governor.learn(audited.kl)
        self._turns.add_audit(audited.kl, audited.tokens_read, window)
        if run is not None:
            run.begin_again(self._deciding)
            self._run = self._led(run, audited.bad_rows)

    def _end_run(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            self._turns.add(run)

    def _end_turn(self) -> None:
        self._end_run()
        if self._auditor is not None:
            self._auditor.forget()
        if self._turns.end():
            if self._governor is not None:
                self._governor.begin()
            self._warn_beyond_horizon()

    def _warn_beyond_horizon(self) -> None:
        beyond = "" if self._warned else self._turns.beyond_horizon
        if beyond:
            self._warned = True
            warnings.warn(beyond, stacklevel=2)

    def _plainly(self, call: ForwardCall, stock: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run the model's own forward, with its tokens known to the attention meanwhile."""
        self._fed = call.known_tokens
        try:
            return stock(*args, **kwargs)
        finally:
            # Else a call of an inner module would be taken for one with these tokens.
            self._fed = None


def _visible(query: Tensor, key: Tensor, mask: Tensor | None) -> tuple[int, Tensor | None]:
    """Tokens in the cache, and bool `(rows, tokens)`: what the last query of each row may see, None if all of them."""
    if mask is None:
        # Several tokens without a mask are the first ones: after them, a static cache has empty places.
        return query.shape[2] if query.shape[2] > 1 else key.shape[2], None
    last = mask[:, 0, -1].expand(key.shape[0], -1)
    visible = last if last.dtype == torch.bool else last == 0
    # Not the end of any one row: a row may be padding on the right, or all of it so far.
    end = int((visible * torch.arange(1, visible.shape[1] + 1, device=visible.device)).amax())
    return end, visible[:, :end]
