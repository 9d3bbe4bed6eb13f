from __future__ import annotations

import io
import itertools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from policies import AlwaysFull, NeverFull
from tuning.confirm.results import Measured, TuningResult
from tuning.report.pictures import draw_kl_by_kind, draw_pareto, draw_search, draw_unit_shares

MakeResult = Callable[..., TuningResult]
DRAWINGS = (draw_pareto, draw_unit_shares, draw_kl_by_kind, draw_search)


def save(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=30)
    return file.getvalue()


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
    axes = draw_pareto(replace(report_result, references=[never, always])).axes[0]
    low, high = axes.get_xlim()
    assert low < 0 < 0.1 < high
    labels = {text.get_text() for text in axes.texts}
    assert "never full" in labels
    assert "always full" not in labels


def test_the_front_s_labels_overlap_neither_each_other_nor_the_edge(report_result: TuningResult) -> None:
    figure = draw_pareto(report_result)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    boxes = [Text.get_window_extent(text) for text in axes.texts if isinstance(text, Annotation)]
    assert len(boxes) == 7
    inside = axes.get_window_extent()
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    for box in boxes:
        assert inside.x0 <= box.x0 < box.x1 <= inside.x1


def test_of_many_references_only_those_on_the_front_are_named(ladder_result: TuningResult) -> None:
    texts = {text.get_text() for text in draw_pareto(ladder_result).axes[0].texts}
    assert {"logistic_profile\nat 0.5", "fixed stride 2"} <= texts
    many = [replace(other, label=f"{other.label} {n}") for n in range(2) for other in ladder_result.references]
    beaten = {text.get_text() for text in draw_pareto(replace(ladder_result, references=many)).axes[0].texts}
    assert "logistic_profile\nat 0.5 0" in beaten
    assert not any("fixed stride 2" in text for text in beaten)
    assert "fixed stride 3.333" in beaten


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
