from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from policies import AlwaysFull, NeverFull
from tuning.confirm.results import Measured, TuningResult
from tuning.report.pictures import draw_kl_by_kind, draw_pareto, draw_search, draw_unit_shares

MakeResult = Callable[..., TuningResult]
DRAWINGS = (draw_pareto, draw_unit_shares, draw_kl_by_kind, draw_search)


def save(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=30)
    return file.getvalue()


def drawn_on_the_front(result: TuningResult) -> dict[str, np.ndarray]:
    """Points `(policies, 2)` of full share and KL by what the legend calls them."""
    series = draw_pareto(result).axes[0].containers
    return {str(drawn.get_label()): np.asarray(drawn.lines[0].get_xydata()) for drawn in series}


def share_and_kl(*policies: Measured) -> list[tuple[float, float]]:
    return sorted((policy.full_share, policy.kl.value) for policy in policies)


def without_kl(measured: Measured) -> Measured:
    return replace(measured, prompt_kl=np.zeros_like(measured.prompt_kl))


# Warnings are errors: a drawing that matplotlib complains about fails here.
@pytest.mark.parametrize("draw", DRAWINGS)
@pytest.mark.parametrize(
    "shape",
    [
        {"units": (1, 1), "families": ("fixed_stride",), "kinds": {"user": 0.3}, "n_per_kind": 1, "n_trials": 1},
        {"units": (126, 8), "budget": 0.02, "kinds": {f"kind {i}": 1e-4 for i in range(9)}, "n_per_kind": 1},
    ],
    ids=["one of everything", "many units and kinds, small numbers"],
)
def test_results_of_every_shape_can_be_drawn(
    make_report_result: MakeResult, draw: Callable[[TuningResult], Figure], shape: dict[str, object]
) -> None:
    assert save(draw(make_report_result(**shape))).startswith(b"\x89PNG")


@pytest.mark.parametrize("draw", DRAWINGS)
def test_a_result_without_any_kl_can_be_drawn(
    report_result: TuningResult, draw: Callable[[TuningResult], Figure]
) -> None:
    lossless = replace(
        report_result,
        families=[replace(family, measured=without_kl(family.measured)) for family in report_result.families],
        baseline=without_kl(report_result.baseline),
        references=[],
    )
    assert save(draw(lossless)).startswith(b"\x89PNG")


def test_policies_that_never_or_always_run_full_fit_on_the_axes(report_result: TuningResult) -> None:
    other = report_result.references[0]
    never = replace(other, label="never full", policy=NeverFull(), prompt_full_share=np.zeros(12))
    always = replace(without_kl(other), label="always full", policy=AlwaysFull(), prompt_full_share=np.ones(12))
    result = replace(report_result, references=[never, always])
    low, high = draw_pareto(result).axes[0].get_xlim()
    assert low < 0 < 0.1 < high
    # A logarithmic axis has no place for a KL of 0.
    drawn = drawn_on_the_front(result)["fixed stride (at 10%: baseline)"]
    np.testing.assert_array_equal(drawn, share_and_kl(never, result.baseline))


def test_a_policy_at_several_budgets_is_a_line_on_the_front(ladder_result: TuningResult) -> None:
    drawn, others = drawn_on_the_front(ladder_result), ladder_result.references
    strides, ours = drawn["fixed stride (at 30%: baseline)"], drawn["logistic_profile (at 30%: exported)"]
    np.testing.assert_array_equal(strides, share_and_kl(ladder_result.baseline, *others[1::2]))
    np.testing.assert_array_equal(ours, share_and_kl(ladder_result.best.measured, *others[::2]))
    assert len(drawn) == 2


def test_points_of_different_policies_are_not_joined(report_result: TuningResult) -> None:
    series = draw_pareto(report_result).axes[0].containers
    joined = {drawn.get_label() for drawn in series if drawn.lines[0].get_linestyle() != "None"}
    assert joined == {"fixed stride (at 10%: baseline)", "logistic_profile (at 10%: exported)"}
    families = [family.measured for family in report_result.families[1:]]
    np.testing.assert_array_equal(drawn_on_the_front(report_result)["other families"], share_and_kl(*families))


def test_the_legend_names_what_is_on_the_front_and_covers_nothing(report_result: TuningResult) -> None:
    figure = draw_pareto(report_result)
    figure.draw_without_rendering()
    front, ranking, below = figure.axes
    legend = below.get_legend()
    assert legend is not None
    assert {text.get_text() for text in legend.get_texts()} == {
        "logistic_profile (at 10%: exported)",
        "fixed stride (at 10%: baseline)",
        "other families",
        "Pareto front",
        "budget 10%",
    }
    box = legend.get_window_extent()
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
    caption = figure._supxlabel.get_window_extent()  # type: ignore[attr-defined]
    for other in (front.get_tightbbox(), ranking.get_tightbbox(), caption):
        assert not box.overlaps(other)


def test_the_front_steps_from_one_undominated_policy_to_the_next(report_result: TuningResult) -> None:
    (front,) = [line for line in draw_pareto(report_result).axes[0].get_lines() if line.get_drawstyle() == "steps-post"]
    x, y = np.array(front.get_xydata()[1:-1]).T
    assert (np.diff(x) > 0).all()
    assert (np.diff(y) < 0).all()
    families = [family.measured for family in report_result.families]
    points = [(p.full_share, p.kl.value) for p in (*families, report_result.baseline, *report_result.references)]
    for share, kl in points:
        assert kl >= y[x <= share].min()
    assert set(zip(x, y, strict=True)) <= set(points)


def test_the_ranking_is_by_kl_with_the_best_on_top(report_result: TuningResult) -> None:
    labels = [tick.get_text() for tick in draw_pareto(report_result).axes[1].get_yticklabels()]
    assert labels[0] == "fixed stride 10\n(baseline)"
    assert labels[-1] == "logistic_profile\n(exported)"
    assert len(labels) == 7


def test_the_map_is_the_exported_policy_s_full_share(report_result: TuningResult) -> None:
    figure = draw_unit_shares(report_result)
    (mesh,) = [child for child in figure.axes[0].get_children() if isinstance(child, QuadMesh)]
    np.testing.assert_array_equal(mesh.get_array(), report_result.best.measured.unit_full_share.T)
    assert figure.axes[-1].get_ylabel() == "full share"


def test_bars_are_the_means_by_kind(report_result: TuningResult) -> None:
    baseline, tuned, exported = draw_kl_by_kind(report_result).axes[0].containers
    fixed = next(family for family in report_result.families if family.family == "fixed_stride")
    for bars, measured in ((baseline, report_result.baseline), (tuned, fixed.measured)):
        heights = [bar.get_height() for bar in bars]
        assert heights == pytest.approx(list(report_result.kl_by_kind(measured).values()))
    assert exported.get_label() == "logistic_profile (exported)"


def test_an_exported_fixed_stride_has_one_bar(make_report_result: MakeResult) -> None:
    containers = draw_kl_by_kind(make_report_result(families=("fixed_stride", "cosine_profile"))).axes[0].containers
    assert [bars.get_label() for bars in containers] == ["fixed stride 10 (baseline)", "fixed_stride (exported)"]


def test_each_family_s_search_has_a_panel_with_the_best_so_far(report_result: TuningResult) -> None:
    panels = [axes for axes in draw_search(report_result).axes if axes.axison]
    for panel, family in zip(panels, report_result.families, strict=True):
        assert panel.get_title("left").startswith(f"{family.family}: best ")
        trials, best = panel.get_lines()
        np.testing.assert_array_equal(trials.get_ydata(), family.trials[:, 1])
        np.testing.assert_array_equal(best.get_ydata(), np.minimum.accumulate(family.trials[:, 1]))


def test_drawing_leaves_matplotlib_s_settings_alone_and_pyplot_unused(report_result: TuningResult) -> None:
    before = dict(mpl.rcParams)
    save(draw_pareto(report_result))
    assert dict(mpl.rcParams) == before
    code = "import sys, tuning.report.pictures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
