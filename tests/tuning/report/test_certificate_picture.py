from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import to_hex

from traces.reporting import picture_style as style
from tuning.certify.certificate import KlLimit
from tuning.certify.ladder import Ladder, fixed_sequence
from tuning.confirm.results import TuningResult
from tuning.report.certificate_picture import draw_ladder


def with_ladder(result: TuningResult, ladder: Ladder) -> TuningResult:
    assert ladder.chosen is not None
    best = replace(result.best, measured=replace(result.best.measured, label=ladder.chosen.label))
    return replace(result, families=[best], ladder=ladder)


def test_every_prompt_of_every_policy_is_a_dot_and_every_bound_a_line(ladder_result: TuningResult) -> None:
    axes = draw_ladder(ladder_result).axes[0]
    assert ladder_result.ladder is not None
    rungs = ladder_result.ladder.rungs
    drawn = np.concatenate([line.get_ydata() for line in axes.get_lines() if line.get_marker() in ("o", "^")])
    counted = np.concatenate([np.minimum(rung.prompt_kl, 0.8) for rung in rungs])
    np.testing.assert_allclose(np.sort(drawn), np.sort(counted))
    bounds = [collection.get_segments()[0][0, 1] for collection in axes.collections]
    assert bounds == [rung.certificate.kl_bound for rung in rungs]
    bars = [patch.get_height() for patch in axes.patches]
    assert bars == pytest.approx([np.minimum(rung.prompt_kl, 0.8).mean() for rung in rungs])


def test_a_prompt_beyond_the_cap_is_a_triangle_at_it(ladder_result: TuningResult) -> None:
    axes = draw_ladder(ladder_result).axes[0]
    assert ladder_result.ladder is not None
    beyond = np.concatenate([line.get_ydata() for line in axes.get_lines() if line.get_marker() == "^"])
    assert (beyond == 0.8).all()
    assert len(beyond) == sum((rung.prompt_kl > 0.8).sum() for rung in ladder_result.ladder.rungs) > 0


def test_colours_tell_what_is_certified_and_what_is_exported(ladder_result: TuningResult) -> None:
    axes = draw_ladder(ladder_result).axes[0]
    certified, exported, *others = [to_hex(patch.get_facecolor()).upper() for patch in axes.patches]
    assert exported == style.ACCENT
    assert set(others) == {style.GREY}
    assert certified not in (style.ACCENT, style.GREY)
    names = [tick.get_text() for tick in axes.get_xticklabels()]
    assert [name.split("\n")[0] for name in names] == ["50%", "30%", "10%", "5%"]


def test_the_limit_is_a_line(ladder_result: TuningResult) -> None:
    axes = draw_ladder(ladder_result).axes[0]
    assert [0.2, 0.2] in [list(line.get_ydata()) for line in axes.get_lines()]
    assert {"limit\n0.2", "cap\n0.8"} <= {text.get_text() for text in axes.texts}


# Warnings are errors: a drawing that matplotlib complains about fails here.
@pytest.mark.parametrize(
    ("n_rungs", "n_prompts", "kl"), [(1, 4, 0.0), (10, 300, 1e-7), (2, 12, 1e-3)], ids=["nothing lost", "many", "few"]
)
def test_ladders_of_every_size_can_be_drawn(
    ladder_result: TuningResult, n_rungs: int, n_prompts: int, kl: float
) -> None:
    budgets = np.linspace(0.9, 0.1, n_rungs).tolist()
    labels = [f"at {budget:g}" for budget in budgets]
    ladder = fixed_sequence(KlLimit(0.1, 0.15, 0.9), budgets, labels, [np.full(n_prompts, kl)] * n_rungs)
    file = io.BytesIO()
    draw_ladder(with_ladder(ladder_result, ladder)).savefig(file, format="png", dpi=30)
    assert file.getvalue().startswith(b"\x89PNG")


def test_a_result_without_a_ladder_has_no_such_picture(report_result: TuningResult) -> None:
    with pytest.raises(ValueError, match="no ladder to draw"):
        draw_ladder(report_result)
