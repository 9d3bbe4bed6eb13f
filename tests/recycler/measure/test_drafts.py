"""What becomes of drafts is what becomes of them in exact decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from policies import FixedStride, NeverFull, Selection
from policies.stops import FixedDrafts
from recycler import LoadedModel, recycled
from recycler.measure.drafts import drafted_rounds, round_costs
from recycler.prompts import Prompt
from traces.drafted_rounds import RoundCosts

Make = Callable[..., Any]
SELECTION = Selection(24, 1, 3)


@pytest.fixture
def loaded(make_model: Make) -> LoadedModel:
    return LoadedModel(make_model(), None, "tiny")  # type: ignore[arg-type]


def prompts(n: int, n_tokens: int = 40) -> list[Prompt]:
    drawn = torch.randint(1, 61, (n, n_tokens + 1), generator=torch.Generator().manual_seed(3)).numpy()
    return [Prompt(f"drawn-{i}", "random", tokens, n_tokens, "drawn", "none") for i, tokens in enumerate(drawn)]


@pytest.mark.parametrize("policy", [NeverFull(), FixedStride(2)], ids=lambda policy: policy.kind)
def test_drafts_hold_as_in_exact_decoding(loaded: LoadedModel, policy: Any) -> None:
    (prompt,) = prompts(1)
    rounds = drafted_rounds(loaded, [prompt], policy, SELECTION, n_tokens=30, n_drafts=5)
    tokens = torch.from_numpy(prompt.tokens[None, :40].astype("int64"))
    with recycled(loaded, policy, SELECTION, exact=FixedDrafts(5)) as session:
        n_text = int((rounds.n_held + 1).sum())
        loaded.model.generate(tokens, max_new_tokens=n_text + 1, do_sample=False, eos_token_id=63, pad_token_id=0)  # type: ignore[operator]
    counted = session.receipt().rounds
    assert counted is not None
    assert (counted.n_rounds, counted.n_accepted) == (len(rounds.n_held), rounds.n_held.sum())
    assert 0 < rounds.n_held.mean() < 5
    assert (rounds.signals.n_drafts == np.arange(1, 6)).all()
    assert (rounds.signals.margin >= 0).all()
    assert ((rounds.signals.probability > 0) & (rounds.signals.probability <= 1)).all()


def test_texts_side_by_side_are_each_alone(loaded: LoadedModel) -> None:
    both = prompts(2)
    how: dict[str, Any] = {"n_tokens": 20, "n_drafts": 4}
    together = drafted_rounds(loaded, both, NeverFull(), SELECTION, **how)
    for text, prompt in enumerate(both):
        alone = drafted_rounds(loaded, [prompt], NeverFull(), SELECTION, **how)
        mine = together.n_held[together.text == text]
        # The slower text decides how many rounds there are.
        np.testing.assert_array_equal(mine[: len(alone.n_held)], alone.n_held)


def test_sets_of_all_tokens_make_every_draft_hold(loaded: LoadedModel) -> None:
    rounds = drafted_rounds(loaded, prompts(2), NeverFull(), Selection(200, 1, 3), n_tokens=20, n_drafts=4)
    assert (rounds.n_held == 4).all()


def test_what_is_drawn_holds_less_often_than_what_is_most_likely(loaded: LoadedModel) -> None:
    how: dict[str, Any] = {"n_tokens": 40, "n_drafts": 4}
    wide = Selection(200, 1, 3)
    drawn = drafted_rounds(loaded, prompts(2), NeverFull(), wide, temperature=1.0, **how)
    again = drafted_rounds(loaded, prompts(2), NeverFull(), wide, temperature=1.0, **how)
    assert drawn.n_held.mean() < 4
    np.testing.assert_array_equal(drawn.n_held, again.n_held)


def test_along_a_given_text_a_draft_holds_that_full_attention_chooses_too(loaded: LoadedModel) -> None:
    n_tokens, n_drafts = 20, 4
    drawn = torch.randint(1, 61, (2, 40 + n_tokens + n_drafts), generator=torch.Generator().manual_seed(5)).numpy()
    given = [Prompt(f"drawn-{i}", "random", tokens, 40, "drawn", "none") for i, tokens in enumerate(drawn)]
    how: dict[str, Any] = {"n_tokens": n_tokens, "n_drafts": n_drafts, "forced": True}
    wide = drafted_rounds(loaded, given, NeverFull(), Selection(200, 1, 3), **how)
    # Nothing is lost, and the text goes its own way all the same.
    assert (wide.n_held == n_drafts).all()
    together = drafted_rounds(loaded, given, NeverFull(), SELECTION, **how)
    assert 0 < together.n_held.mean() < n_drafts
    for text, prompt in enumerate(given):
        alone = drafted_rounds(loaded, [prompt], NeverFull(), SELECTION, **how)
        mine = together.n_held[together.text == text]
        # No round reaches beyond its text, however slow the other one is.
        assert (mine[:-1] + 1).sum() + n_drafts < n_tokens + n_drafts
        n = min(len(mine), len(alone.n_held))
        assert n >= n_tokens / (n_drafts + 1)
        np.testing.assert_array_equal(mine[:n], alone.n_held[:n])
        # In plain words: the choices of full attention, and of a session that recycles from the round's first token.
        full = loaded.model(torch.from_numpy(prompt.tokens[None].astype("int64"))).logits[0].argmax(-1).numpy()
        tokens = torch.from_numpy(prompt.tokens[None].astype("int64"))
        with recycled(loaded, NeverFull(), SELECTION):
            cache = loaded.model(tokens[:, :40], use_cache=True).past_key_values
            found = [
                int(loaded.model(tokens[:, at : at + 1], past_key_values=cache).logits[0, -1].argmax())
                for at in range(40, 44)
            ]
        holds = np.cumprod([choice == full[40 + i] for i, choice in enumerate(found)])
        assert alone.n_held[0] == holds.sum()


def test_texts_that_are_too_short_to_follow_are_refused(loaded: LoadedModel) -> None:
    with pytest.raises(ValueError, match="one length, at least 24 tokens, not \\[1\\]"):
        drafted_rounds(loaded, prompts(2), NeverFull(), SELECTION, n_tokens=20, n_drafts=4, forced=True)


def test_costs_are_of_this_machine_and_add_up(loaded: LoadedModel) -> None:
    costs = round_costs(loaded, prompts(1)[0], NeverFull(), SELECTION, repeats=2)
    assert costs.draft_ms > 0
    assert costs.full_ms > 0
    assert costs.verify_ms + costs.token_ms > 0
    assert RoundCosts(5.0, 9.0, 0.5, 11.0).round_ms(8) == 8 * 5 + 9 + 9 * 0.5


@pytest.mark.parametrize(("costs", "problem"), [((-1, 1, 1, 1), "draft_ms"), ((0, 0, 0, 1), "takes no time")])
def test_costs_that_cannot_be_are_refused(costs: tuple[float, float, float, float], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        RoundCosts(*costs)


def test_prompts_of_two_lengths_do_not_draft_side_by_side(loaded: LoadedModel) -> None:
    with pytest.raises(ValueError, match=r"one length, not \[40, 41\]"):
        drafted_rounds(loaded, prompts(1) + prompts(1, 41), NeverFull(), SELECTION, n_tokens=4, n_drafts=2)
