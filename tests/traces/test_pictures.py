from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from traces import Trace
from traces.pictures import draw_overlap, draw_recovered_mass, draw_similarity, write_picture
from traces.reporting.picture_style import index_ticks, looks
from traces.summary import summarise

MakeTrace = Callable[..., Trace]
PNG = b"\x89PNG\r\n\x1a\n"


def draw_all(traces: list[Trace], folder: Path) -> list[Path]:
    overall, by_kind = summarise(traces)
    return [
        write_picture(draw_recovered_mass(overall, by_kind, "from here", 1), folder / "mass.png"),
        write_picture(draw_similarity(overall, "from here"), folder / "similarity.png"),
        write_picture(draw_overlap(overall, by_kind, "from here"), folder / "overlap.png"),
    ]


# Warnings are errors: a drawing that matplotlib complains about fails here.
@pytest.mark.parametrize(
    "shapes",
    [
        [{"n_steps": 12, "max_age": 8}],
        [{"n_steps": 1, "max_age": 1, "units": (1, 1)}],
        [{"n_steps": 3, "max_age": 8}],
        [{"n_steps": 0, "max_age": 2}],
        [{"n_steps": 4, "max_age": 4, "kind": f"kind {i}"} for i in range(8)],
        [{"n_steps": 4, "max_age": 3, "kind": "a"}, {"n_steps": 9, "max_age": 5, "kind": "b"}],
    ],
    ids=["usual", "one of everything", "ages older than the trace", "no steps", "eight kinds", "two oldest ages"],
)
def test_traces_of_every_shape_can_be_drawn(
    make_trace: MakeTrace, tmp_path: Path, shapes: list[dict[str, object]]
) -> None:
    for picture in draw_all([make_trace(**shape) for shape in shapes], tmp_path):
        assert picture.read_bytes().startswith(PNG)


@pytest.mark.parametrize("age", [0, 5])
def test_a_map_at_an_age_that_was_not_recorded_is_refused(make_trace: MakeTrace, age: int) -> None:
    overall, by_kind = summarise([make_trace(max_age=4)])
    with pytest.raises(ValueError, match=f"recorded ages 1 to 4, not {age}"):
        draw_recovered_mass(overall, by_kind, "", age)


def test_the_map_of_layers_and_heads_shows_the_means_at_its_age(make_trace: MakeTrace) -> None:
    overall, by_kind = summarise([make_trace(units=(3, 2))])
    figure = draw_recovered_mass(overall, by_kind, "", age=2)
    (axes,) = [axes for axes in figure.axes if "at age 2" in axes.get_title("left")]
    (mesh,) = [child for child in axes.get_children() if isinstance(child, QuadMesh)]
    np.testing.assert_array_equal(mesh.get_array(), overall.by_unit("recovered_mass")[1].T)


def test_curves_are_the_means_by_kind_from_age_0_on(make_trace: MakeTrace) -> None:
    overall, by_kind = summarise([make_trace(kind="a", seed=1), make_trace(kind="b", seed=2)])
    curves = draw_recovered_mass(overall, by_kind, "", age=1).axes[0].get_lines()
    for line, (kind, summary) in zip(curves, by_kind.items(), strict=True):
        assert line.get_label() == kind
        np.testing.assert_array_equal(line.get_xdata(), [0, 1, 2, 3, 4])
        np.testing.assert_array_equal(line.get_ydata(), [summary.mean_fresh_mass, *summary.by_age("recovered_mass")])


def test_every_axis_has_a_title_and_labels_with_units(make_trace: MakeTrace) -> None:
    overall, by_kind = summarise([make_trace()])
    mass, similarity = draw_recovered_mass(overall, by_kind, "", 1), draw_similarity(overall, "")
    for axes in (*mass.axes[:3], similarity.axes[0], draw_overlap(overall, by_kind, "").axes[1]):
        assert axes.get_title("left")
        assert axes.get_xlabel()
        assert axes.get_ylabel()
    assert mass.axes[0].get_xlabel() == "age of the set (steps)"
    assert mass.axes[0].get_ylabel() == "recovered mass (share of attention)"


def test_drawing_leaves_matplotlib_s_settings_alone_and_pyplot_unused(tmp_path: Path, make_trace: MakeTrace) -> None:
    before = dict(mpl.rcParams)
    draw_all([make_trace()], tmp_path)
    assert dict(mpl.rcParams) == before
    code = "import sys, traces.pictures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_picture_that_fails_leaves_the_one_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_picture(Figure(), tmp_path / "new" / "x.png")
    before = path.read_bytes()

    def save_half(self: Figure, path: Path, **options: object) -> None:
        Path(path).write_bytes(PNG)
        raise OSError("no space left on device")

    monkeypatch.setattr(Figure, "savefig", save_half)
    with pytest.raises(OSError, match="no space"):
        write_picture(Figure(), path)
    assert path.read_bytes() == before


def test_lines_of_21_kinds_can_be_told_apart() -> None:
    assert len(set(looks(21))) == 21


@pytest.mark.parametrize("n", [1, 3, 16, 30, 32, 80, 126, 5000])
def test_ticks_are_few_and_start_at_0(n: int) -> None:
    ticks = index_ticks(n).tick_values(0, n)
    assert ticks[0] == 0
    assert ticks[-1] < n
    assert len(ticks) <= 16
