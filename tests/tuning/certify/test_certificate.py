from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tuning.certify.certificate import Certificate, KlLimit, certify, check_n_prompts, held_out_by
from tuning.certify.risk_bounds import conformal_risk, mean_upper_bound, share_upper_bound

ASKED = KlLimit(0.1, 0.4, 0.9)
# Of 24 prompts one loses far more than the cap.
KL = np.tile([*np.tile([0.02, 0.03, 0.01, 0.05, 0.11, 0.02, 0.04, 0.02, 0.01, 0.03, 0.05, 0.02], 2)[:-1], 5.0], 3)


def test_a_prompt_counts_up_to_four_limits_unless_told_otherwise() -> None:
    assert KlLimit.of(0.1) == KlLimit(0.1, 0.4, 0.9)
    assert KlLimit.of(0.1, cap=0.15, confidence=0.99) == KlLimit(0.1, 0.15, 0.99)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"nats": 0.0}, "a number of nats per step above 0, not 0"),
        ({"nats": -1.0}, "above 0, not -1"),
        ({"nats": math.nan}, "above 0, not nan"),
        ({"nats": math.inf}, "above 0, not inf"),
        ({"cap": 0.1}, "more nats than the limit: the cap is 0.1, the limit 0.1"),
        ({"cap": math.inf}, "the cap is inf"),
        ({"cap": math.nan}, "the cap is nan"),
        ({"confidence": 0.5}, r"in \[0.75, 1\), not 0.5"),
        ({"confidence": 1.0}, "not 1"),
        ({"confidence": 90.0}, "not 90"),
        ({"confidence": math.nan}, "not nan"),
    ],
)
def test_a_limit_that_cannot_be_certified_is_refused(values: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(ASKED, **values)


def test_a_certificate_holds_the_bounds_of_the_numbers() -> None:
    found = certify(KL, ASKED)
    assert (found.n_prompts, found.n_exceeding, found.n_policies) == (72, 9, 1)
    assert found.kl_bound == mean_upper_bound(KL, 0.4, 0.9)
    assert found.share_bound == share_upper_bound(9, 72, 0.9)
    assert found.conformal_risk == conformal_risk(KL, 0.4)
    # Without the cap the mean alone would be above the limit.
    assert found.certified
    assert KL.mean() > 0.1


def test_the_bound_decides() -> None:
    bound = certify(KL, ASKED).kl_bound
    assert certify(KL, KlLimit(bound, 0.4, 0.9)).certified
    assert not certify(KL, KlLimit(bound * 0.999, 0.4, 0.9)).certified
    assert not certify(KL, replace(ASKED, confidence=0.9999)).certified


def test_a_kl_at_the_limit_does_not_exceed_it() -> None:
    assert certify(np.array([0.1, 0.1, np.nextafter(0.1, 1)]), ASKED).n_exceeding == 1


def test_the_share_s_bound_pays_for_the_choice_among_policies() -> None:
    alone, chosen = certify(KL, ASKED), certify(KL, ASKED, n_policies=5)
    assert chosen.share_bound == share_upper_bound(9, 72, 0.98)
    assert chosen.share_bound > alone.share_bound
    assert chosen.kl_bound == alone.kl_bound


def test_json_is_plain_and_says_what_was_asked() -> None:
    found = certify(KL, ASKED, n_policies=3)
    values = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert values == found.to_json()
    assert (values.pop("max_kl"), values.pop("cap"), values.pop("confidence")) == (0.1, 0.4, 0.9)
    assert Certificate(asked=ASKED, **values) == found


def test_the_sentence_claims_the_limit_and_no_more() -> None:
    found = certify(KL, ASKED)
    assert str(found) == (
        "with 90% confidence each, prompts like the 72 measured lose at most 0.1 nats per step on average, each "
        f"counted up to 0.4, and at most {math.ceil(100 * found.share_bound)}% of them lose more than 0.1"
    )
    assert f"{found.kl_bound:.3g}" not in str(found)


def test_the_sentence_of_what_is_not_certified_says_so() -> None:
    found = certify(KL, replace(ASKED, nats=0.05))
    assert str(found).startswith("not certified: with 90% confidence each")
    assert f"at most {found.kl_bound:.3g} nats per step on average" in str(found)
    assert str(found).endswith("where 0.05 was asked for")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"n_exceeding": 73}, "73 of 72 prompts"),
        ({"n_policies": 0}, "0 policies certify nothing"),
        ({"kl_bound": 0.5, "certified": False}, r"KL bound must be in \(0, 0.4\], not 0.5"),
        ({"kl_bound": math.nan, "certified": False}, "not nan"),
        ({"kl_bound": 0.11}, "a bound of 0.11 nats certifies no limit of 0.1"),
        ({"share_bound": 1.1}, r"share bound must be in \(0, 1\], not 1.1"),
        ({"conformal_risk": 0.0}, "conformal risk must be"),
    ],
)
def test_a_certificate_that_contradicts_itself_is_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(certify(KL, ASKED), **values)


@pytest.mark.parametrize("kl", [[], [0.1, math.nan]])
def test_what_was_not_measured_certifies_nothing(kl: list[float]) -> None:
    with pytest.raises(ValueError, match=r"no prompt|not nan"):
        certify(np.array(kl), ASKED)


def test_prompts_that_can_never_do_are_refused_with_how_many_could() -> None:
    check_n_prompts(ASKED, 9, 3)
    with pytest.raises(ValueError, match="8 held-out prompts can never certify") as refusal:
        check_n_prompts(ASKED, 8, 3)
    assert str(refusal.value) == (
        "8 held-out prompts can never certify a KL of at most 0.1 nats per step, prompts counted up to 0.4, at 90% "
        "confidence: at least 9 are needed, half of all that are recorded (--per-kind 6)."
    )
    with pytest.raises(ValueError, match="1 held-out prompt can"):
        check_n_prompts(ASKED, 1, 3)


@pytest.mark.parametrize(("n_prompts", "n_kinds", "per_kind"), [(9, 6, 4), (12, 6, 4), (13, 6, 6), (9, 1, 18)])
def test_half_of_every_kind_is_held_out(n_prompts: int, n_kinds: int, per_kind: int) -> None:
    assert held_out_by(n_prompts, n_kinds).endswith(f"(--per-kind {per_kind})")
    assert n_kinds * (per_kind // 2) >= n_prompts
