"""`with recycled(model, policy, selection):` around any `generate` that takes one token per step and row."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from policies import PolicyFile, Selection, StepPolicy
from policies.stops import StopRule
from recycler.decode import engines
from recycler.decode.asked import Asked, model_of
from recycler.decode.audit import Auditor
from recycler.decode.governor import Governor
from recycler.decode.session import Session
from recycler.model.decoder_parts import NotCovered
from recycler.model.shape import changing_rope_type

# Steps between audits where they only serve to govern.
_GOVERNED_STEPS = 64


@contextmanager
def recycled(
    target: Any,
    policy: StepPolicy | PolicyFile | str | Path,
    selection: Selection | None = None,
    *,
    fast: bool = True,
    horizon_steps: int | None = None,
    exact: bool | StopRule = False,
    audit: int | None = None,
    audit_tokens: int | None = None,
    govern_kl: float | None = None,
    most: float | None = None,
) -> Iterator[Session]:
    """Decode with recycled attention inside the `with`.

    Stock `generate`, greedy or sampling, and calls of the model itself work unchanged. A forward of several tokens,
    or one that `generate` calls prefill, runs full and starts the schedule anew; every other forward is a decode step.
    So in a conversation over one growing cache every turn chooses sets and opens accounts of its own, whatever was
    cropped or rewritten before it, and what a turn saves the next one cannot spend.
    Decode steps run on the engine for the model's device where there is one that covers them, and else on the plain
    path; the receipt says which, and why. The model is as it was afterwards, also after an exception.

    What is recycled is what this thread or task calls, and tasks that begin inside: other threads have the stock model
    meanwhile, and may recycle it with policies of their own. `session.generate` is the session's from any thread,
    inside the `with` and after it. A `with` in which nothing was recycled warns and says what may be the reason.

    Args:
        target: A causal language model with `sdpa` or `eager` attention, or what is around one: a pipeline, a
            `LoadedModel`, what torch.compile made, a PEFT model with adapters in its layers. Calls of either are
            recycled.
        policy: Who decides which units run full: a policy, or a policy file or its path, which also say how sets are
            chosen and for how long outputs the policy was tuned. A file that was tuned on other weights of this
            shape is applied, with a warning and a note in the receipt.
        selection: How sets are chosen; None for as the policy file has it.
        fast: False keeps to the plain path.
        horizon_steps: Decode steps of the outputs that the policy was tuned on; None for what the policy file says, if
            there is one. An output of more than twice as many warns, once, and the receipt says so.
        exact: True for text that is full attention's own: the policy's steps are drafts, and a full forward verifies
            several of them at once, which pays where reading the cache takes long. A forward returns full attention's
            logits then, however a caller samples from them, up to rounding in sums of another order; those of a
            bfloat16 model on the CPU engine are the engine's own, whose activations are in float32. Rounds end by
            the policy file's rule, or `FixedDrafts(8)` if it has none, or by a rule that is given instead of True.
        audit: Steps after which they are repeated, all at once, with full attention, again and again; None for never.
            The receipt has the divergence that was measured. Keys and values of these tokens become full attention's,
            and sets and schedule begin anew, as after a prompt: accounts too, a policy's burst included. What is left
            at the end of an output is not audited; rows that have ended are, as long as others go on. It keeps the
            logits of so many steps, and computes as many. Of a bfloat16 model on the CPU engine, full attention is the
            engine's own there, whose activations are in float32.
        audit_tokens: How many of the steps between two audits are repeated, the last ones; None for all of them. Of a
            sample the receipt says that it is one: what it costs is a sample's part, what it measures is how far these
            steps were from full attention over the text as it is, and the keys and values of the others stay.
        govern_kl: Limit of the divergence from full attention, in nats, mean over an output, that audits hold by
            raising and lowering the policy's budget (`Governor`); they are every 64 steps then, unless `audit` says
            otherwise. None for the policy's budget as it is.
        most: With `govern_kl`, the largest budget; None for the policy's own.

    Yields:
        The session; its `receipt()` tells what was done so far.

    Raises:
        ValueError: If the target is no model, a policy file cannot be read, a bare policy comes without a selection,
            something is for another model shape, the model cannot be recycled, or `exact` is no rule, comes with what
            measures a distance, or with a rotary embedding that depends on the longest text of a call; during decoding,
            if the cache changes in a way that sets cannot follow, or the model has layers that cannot take back drafts.
    """
    model = model_of(target)
    asked = Asked.of(policy, selection, horizon_steps, model).in_rounds(exact)
    for note in asked.notes:
        warnings.warn(note, stacklevel=3)
    if most is not None and govern_kl is None:
        raise ValueError(f"most={most} is the largest budget of govern_kl, which is not given.")
    if (audit is not None or govern_kl is not None) and getattr(model.config, "return_dict", True) is False:
        raise ValueError("an audit reads the model's logits by name, and its config has return_dict=False.")
    if exact and (rope := changing_rope_type(model)):
        raise ValueError(
            f"exact decoding reads several tokens at once, and this model's rotary embedding, of type {rope!r}, turns "
            "all of them by the last one's position: leave out exact."
        )
    if exact and (audit is not None or govern_kl is not None):
        raise ValueError(
            "exact decoding is no way from full attention: leave out audit and govern_kl, which measure it."
        )
    governor = None if govern_kl is None else Governor(asked.policy, govern_kl, most)
    if governor is not None and audit is None:
        audit = _GOVERNED_STEPS
    if audit_tokens is not None and audit is None:
        raise ValueError(f"audit_tokens={audit_tokens} is how much an audit repeats, and audit is not given.")
    auditor = None if audit is None else Auditor(audit, audit_tokens)
    notes = (*asked.notes, auditor.note) if auditor is not None and auditor.note else asked.notes
    session = Session(model, asked.policy, asked.selection, asked.horizon_steps, notes, auditor, governor, asked.stop)
    if fast:
        try:
            session.use(engines.engine_for(model))
        except NotCovered as reason:
            session.stay_plain(str(reason))
    else:
        session.stay_plain("fast is False")
    with session.applied():
        yield session
        session.finish()
