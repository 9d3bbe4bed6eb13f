from __future__ import annotations

import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from tuning.report.label_placement import PointLabel, place_labels


def placed(points: list[tuple[float, float]], lines: list[np.ndarray]) -> list[tuple[Annotation, Bbox]]:
    figure = Figure((6, 4))
    axes = figure.add_subplot(xlim=(0, 10), ylim=(0, 10))
    labels = [PointLabel(f"label {number}", point, "#222222") for number, point in enumerate(points)]
    place_labels(axes, labels, lines)
    figure.draw_without_rendering()
    return [(text, Text.get_window_extent(text)) for text in axes.texts if isinstance(text, Annotation)]


def test_a_lonely_label_is_right_beside_its_point() -> None:
    ((label, box),) = placed([(5, 5)], [])
    x, y = label.axes.transData.transform((5, 5))
    assert 0 < box.x0 - x < 20
    assert box.y0 < y < box.y1
    assert not label.arrow_patch.get_visible()


def test_labels_of_points_on_top_of_each_other_do_not_overlap() -> None:
    labels = placed([(5, 5), (5.01, 5.02), (5, 4.98), (5.02, 5), (4.98, 5.01)], [np.array([(5, 5)])])
    for (_, one), (_, other) in itertools.combinations(labels, 2):
        assert not one.overlaps(other)
    assert any(label.arrow_patch.get_visible() for label, _ in labels)


def test_a_label_keeps_clear_of_lines() -> None:
    line = np.array([(0.0, 5.0), (10.0, 5.0)])
    ((label, box),) = placed([(5, 5)], [line])
    y = label.axes.transData.transform((0, 5))[1]
    assert not box.y0 < y < box.y1


@pytest.mark.parametrize("point", [(9.9, 5.0), (0.1, 5.0), (5.0, 9.9), (9.9, 0.1)])
def test_a_label_stays_inside_the_axes(point: tuple[float, float]) -> None:
    ((label, box),) = placed([point], [])
    inside = label.axes.get_window_extent()
    assert inside.x0 <= box.x0 < box.x1 <= inside.x1
    assert inside.y0 <= box.y0 < box.y1 <= inside.y1
