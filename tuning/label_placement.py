"""Labels beside points, where they cover neither each other nor what is drawn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

# Nearest first; to the right of a point before anywhere else.
_DISTANCES = (9, 18, 30, 44, 60, 80)
_DIRECTIONS = (0, 30, -30, 180, 150, -150, 90, -90)
# From here on a line leads from the label to its point.
_FAR = 18


@dataclass(frozen=True)
class PointLabel:
    """A text and the point that it belongs to.

    Attributes:
        text: One or more lines.
        point: Where, in data coordinates.
        colour: Of the text and of its leader line.
        bold: Whether it stands out.
    """

    text: str
    point: tuple[float, float]
    colour: str
    bold: bool = False


def place_labels(
    axes: Axes, labels: Sequence[PointLabel], lines: Sequence[np.ndarray], *, fontsize: float = 10.5
) -> None:
    """Write each label near its point, in the order given: the first ones choose first.

    Scales and limits of the axes must be set before, as what is free depends on them.

    Args:
        axes: Where to write.
        labels: What to write.
        lines: Polylines to keep clear of, each `(points, 2)` in data coordinates; a point is a line of one.
        fontsize: Points.
    """
    figure = axes.get_figure(root=True)
    if figure is None:
        raise ValueError("the axes belong to no figure.")
    figure.draw_without_rendering()
    pixels = figure.dpi / 72
    inside = axes.get_window_extent()
    taken = [box for line in lines for box in _boxes(axes.transData.transform(line), 5 * pixels)]
    for label in labels:
        annotation = axes.annotate(
            label.text,
            label.point,
            textcoords="offset points",
            xytext=(0, 0),
            fontsize=fontsize,
            fontweight="bold" if label.bold else "normal",
            color=label.colour,
            ha="center",
            va="center",
            arrowprops={"arrowstyle": "-", "color": label.colour, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 4},
            # What a label takes must not move the axes that it was placed by.
            in_layout=False,
        )
        extent = super(type(annotation), annotation).get_window_extent()
        size = np.array([extent.width, extent.height])
        point = axes.transData.transform(label.point)
        choices = list(itertools.product(_DISTANCES, _DIRECTIONS))
        places = [_place(point, size, distance * pixels, direction) for distance, direction in choices]
        chosen = int(np.argmin([_cost(place, taken, inside) for place in places]))
        best = places[chosen]
        annotation.set_position(tuple((best.get_points().mean(0) - point) / pixels))
        if annotation.arrow_patch is not None:
            annotation.arrow_patch.set_visible(choices[chosen][0] >= _FAR)
        taken.append(best.padded(2 * pixels))


def _place(point: np.ndarray, size: np.ndarray, distance: float, direction: float) -> Bbox:
    towards = np.array([math.cos(math.radians(direction)), math.sin(math.radians(direction))])
    # Its edge or corner, not its centre, keeps the distance.
    half = np.where(np.abs(towards) > 0.1, np.sign(towards) * size / 2, 0)
    low = point + distance * towards + half - size / 2
    return Bbox([low, low + size])


def _cost(place: Bbox, taken: Sequence[Bbox], inside: Bbox) -> float:
    covered = sum(_area(Bbox.intersection(place, box)) for box in taken)
    return covered + 10 * (_area(place) - _area(Bbox.intersection(place, inside)))


def _area(box: Bbox | None) -> float:
    return 0.0 if box is None else float(box.width * box.height)


def _boxes(line: np.ndarray, width: float) -> list[Bbox]:
    """Boxes along a polyline, short enough to follow it where it is slanted."""
    steps = max(2, int(np.abs(np.diff(line, axis=0)).sum() / width)) if len(line) > 1 else 2
    places = np.linspace(0, len(line) - 1, steps)
    corners = np.arange(len(line))
    points = np.stack([np.interp(places, corners, line[:, axis]) for axis in (0, 1)], 1)
    return [Bbox([point - width / 2, point + width / 2]) for point in points]
