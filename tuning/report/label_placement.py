"""Labels beside points, where they cover neither each other nor what is drawn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

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
    inside = axes.get_window_extent().get_points()
    taken = np.concatenate(
        [np.empty((0, 2, 2)), *(_boxes(axes.transData.transform(line), 5 * pixels) for line in lines)]
    )
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
        places = np.array([_place(point, size, distance * pixels, direction) for distance, direction in choices])
        # What leaves the axes is worse than what covers something.
        costs = _shared(places, taken).sum(1) + 10 * (size.prod() - _shared(places, inside[None])[:, 0])
        # Less than a pixel is rounding, and the nearest place is the best of equals.
        chosen = int(np.argmin(costs.round()))
        annotation.set_position(tuple((places[chosen].mean(0) - point) / pixels))
        if annotation.arrow_patch is not None:
            annotation.arrow_patch.set_visible(choices[chosen][0] >= _FAR)
        taken = np.append(taken, places[chosen][None] + 2 * pixels * np.array([[-1], [1]]), axis=0)


def _place(point: np.ndarray, size: np.ndarray, distance: float, direction: float) -> np.ndarray:
    """Lower left and upper right corner of a text of `size` that keeps a distance from a point."""
    towards = np.array([math.cos(math.radians(direction)), math.sin(math.radians(direction))])
    # Its edge or corner, not its centre, keeps the distance.
    half = np.where(np.abs(towards) > 0.1, np.sign(towards) * size / 2, 0)
    low = point + distance * towards + half - size / 2
    return np.array([low, low + size])


def _shared(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Areas `(boxes, others)` that boxes, each `(2, 2)`, share with each of the others."""
    low = np.maximum(boxes[:, None, 0], others[None, :, 0])
    high = np.minimum(boxes[:, None, 1], others[None, :, 1])
    areas: np.ndarray = np.maximum(high - low, 0).prod(-1)
    return areas


def _boxes(line: np.ndarray, width: float) -> np.ndarray:
    """Boxes `(n, 2, 2)` along a polyline, short enough to follow it where it is slanted."""
    along = np.append(0, np.hypot(*np.diff(line, axis=0).T).cumsum())
    places = np.linspace(0, along[-1], 1 + int(along[-1] / width))
    points = np.stack([np.interp(places, along, line[:, axis]) for axis in (0, 1)], 1)
    return points[:, None] + width / 2 * np.array([[-1], [1]])
