"""The comparison as pictures: all methods in a ranking, and their error along the continuation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recycler.evaluate.summary import ALL_TASKS, Row
from traces.reporting import picture_style as style


def draw_ranking(rows: Sequence[Row], tuned: Sequence[str], caption: str) -> Figure:
    """Draw KL and kept accuracy of every method over all tasks, best KL on top, with 95% intervals.

    Args:
        rows: Of `summarise`.
        tuned: Methods to stand out: those under evaluation.
        caption: Where the numbers come from.
    """
    of_all = {(row.method, row.measure): row for row in rows if row.task == ALL_TASKS and row.method != "full"}
    methods = sorted({name for name, _ in of_all}, key=lambda name: -of_all[name, "kl"].value)
    figure = style.new_figure("Fidelity at equal k", caption, (13.5, 2.2 + 0.30 * len(methods)))
    left, right = figure.subplots(1, 2, sharey=True)
    _draw(left, methods, [of_all[name, "kl"] for name in methods], tuned)
    left.set_xscale("log")
    style.style_axes(left, "All compared tasks", "KL to full attention (nats per step)", "")
    labels = [f"{name}   {of_all[name, 'kl'].full_share:.0%} full" for name in methods]
    left.set_yticks(range(len(methods)), labels)
    kept = [of_all.get((name, "accuracy_kept")) for name in methods]
    _draw(right, methods, kept, tuned)
    style.style_axes(right, "The model's own answers", "share of full attention's score", "")
    right.axvline(1, color=style.GREY, linewidth=1)
    return figure


def draw_pareto(rows: Sequence[Row], tuned: Sequence[str], caption: str) -> Figure:
    """Draw KL over all tasks against the tokens that methods read; those under evaluation stand out.

    Args:
        rows: Of `summarise`.
        tuned: Methods to stand out.
        caption: Where the numbers come from.
    """
    shown = [row for row in rows if row.task == ALL_TASKS and row.measure == "kl" and row.method != "full"]
    figure = style.new_figure("Fidelity by what is read", caption, (9.5, 6.2))
    axes = figure.add_subplot()
    style.style_axes(axes, "", "tokens read, share of full attention's", "KL to full attention (nats per step)")
    for row in shown:
        ours = row.method in tuned
        colour, value = style.ACCENT if ours else style.INK, max(row.value, 1e-4)
        axes.plot([row.read_share], [value], "D" if ours else "o", color=colour, markersize=7 if ours else 4)
        axes.annotate(row.method, (row.read_share, value), (5, 3), textcoords="offset points", color=colour, fontsize=8)
    axes.set_yscale("log")
    return figure


def draw_curves(
    curves: Mapping[str, Mapping[str, Sequence[float]]], methods: Sequence[str], caption: str, least_steps: int = 24
) -> Figure:
    """Draw the mean KL of some methods along the continuation, a panel for each task with at least `least_steps`."""
    tasks = [
        task
        for task, found in curves.items()
        if len(found["full"]) >= least_steps and any(name in found for name in methods)
    ]
    n_columns = min(3, max(1, len(tasks)))
    n_lines = max(1, -(-len(tasks) // n_columns))
    figure = style.new_figure("How the error compounds", caption, (13.5, 1.6 + 3.6 * n_lines))
    axes = figure.subplots(n_lines, n_columns, squeeze=False)
    looks = style.looks(len(methods))
    for place, panel in enumerate(axes.flat):
        if place >= len(tasks):
            panel.set_visible(False)
            continue
        found = curves[tasks[place]]
        for name, (colour, dashes) in zip(methods, looks, strict=True):
            if name in found:
                smooth = _smoothed(np.asarray(found[name]))
                panel.plot(np.arange(1, len(smooth) + 1), smooth, dashes, color=colour, label=name, linewidth=1.6)
        panel.set_yscale("log")
        style.style_axes(panel, tasks[place], "decode step", "KL (nats), mean of 8 steps" if place == 0 else "")
    if tasks:
        figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def _draw(axes: Axes, methods: Sequence[str], shown: Sequence[Row | None], tuned: Sequence[str]) -> None:
    for place, (name, row) in enumerate(zip(methods, shown, strict=True)):
        if row is None:
            continue
        colour = style.ACCENT if name in tuned else style.INK
        # Below a ten-thousandth of a nat a logarithmic axis would show nothing but rounding.
        value, low, high = (max(number, 1e-4) for number in (row.value, row.low, row.high))
        axes.plot([low, high], [place, place], color=colour, linewidth=1.4)
        axes.plot([value], [place], "D" if name in tuned else "o", color=colour, markersize=6)


def _smoothed(values: np.ndarray, width: int = 8) -> np.ndarray:
    """Running mean over the last `width` steps, fewer at the beginning."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(ends - width, 0)
    smoothed: np.ndarray = np.maximum((sums[ends] - sums[begins]) / (ends - begins), 1e-6)
    return smoothed
