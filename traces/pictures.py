"""Pictures of a summary: recovered mass by age, what query similarity tells of it, overlap by stride."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from traces.reporting import picture_style as style
from traces.reporting.whole_file import whole_file
from traces.summary import (
    MASS_EDGES,
    SIMILARITY_EDGES,
    Summary,
    doubling_ages,
    quantiles_by_similarity,
    quantiles_over_units,
)


def draw_recovered_mass(overall: Summary, by_kind: Mapping[str, Summary], caption: str, age: int) -> Figure:
    """Draw recovered mass by age: per kind of text, per layer and head at one age, and per unit and age.

    Args:
        overall: Summary of all traces.
        by_kind: Summary of each kind of text.
        caption: Where the numbers come from, one line.
        age: Age of the map of layers and heads, in steps.

    Raises:
        ValueError: If `age` is none of the recorded ages.
    """
    if age not in overall.ages:
        near = ", ".join(map(str, sorted(overall.ages, key=lambda recorded: abs(recorded - age))[:2]))
        raise ValueError(f"age must be one of the recorded ages 1 to {overall.max_age}, not {age}; {near} are near.")
    figure = style.new_figure("Recovered mass by age of the recycled set", caption, (13.5, 8.2))
    grid = figure.add_gridspec(2, 2, height_ratios=(1.5, 1.0), width_ratios=(1.15, 1.0))
    curves, layers_heads = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0])
    units_ages = figure.add_subplot(grid[:, 1])

    mass, from_fresh = overall.by_unit("recovered_mass"), (0, *overall.ages)
    style.style_axes(curves, "Mean by kind of text", "age of the set (steps)", "recovered mass (share of attention)")
    _draw_bands(curves, from_fresh, np.concatenate([overall.fresh_mass.mean()[None], mass]))
    for (kind, summary), look in zip(by_kind.items(), style.looks(len(by_kind)), strict=True):
        means = np.concatenate([[summary.mean_fresh_mass], summary.by_age("recovered_mass")])
        _draw_line(curves, (0, *summary.ages), means, look, kind)
    _age_axis(curves, 0, overall.max_age * 1.02)
    style.add_legend(curves)

    layers, heads = overall.units
    # A scale down to the lowest cell of all would leave few colours for the rest.
    recorded = mass[~np.isnan(mass)]
    lowest = np.floor(np.quantile(recorded, 0.01) * 20) / 20 if recorded.size else 0.0
    norm = Normalize(min(lowest, 0.95), 1.0)
    style.style_axes(layers_heads, f"Mean by layer and KV head at age {age}", "layer", "KV head", grid=False)
    columns, rows = np.arange(layers + 1) - 0.5, np.arange(heads + 1) - 0.5
    layers_heads.pcolormesh(columns, rows, mass[overall.ages.index(age)].T, norm=norm, cmap=style.SHARES)
    layers_heads.xaxis.set_major_locator(style.index_ticks(layers))
    layers_heads.yaxis.set_major_locator(style.index_ticks(heads))
    layers_heads.invert_yaxis()

    style.style_axes(
        units_ages, "Mean by unit and age", "age of the set (steps)", "layer (one row per KV head)", grid=False
    )
    columns = np.array([0.5, *np.add(overall.ages[:-1], overall.ages[1:]) / 2, overall.max_age + 0.5])
    rows = np.arange(layers * heads + 1) / heads - 0.5
    cells = mass.reshape(len(overall.ages), -1).T
    image = units_ages.pcolormesh(columns, rows, cells, norm=norm, cmap=style.SHARES)
    _age_axis(units_ages, 0.5, overall.max_age + 0.5)
    units_ages.yaxis.set_major_locator(style.index_ticks(layers))
    units_ages.invert_yaxis()
    below = bool(recorded.size and recorded.min() < lowest)
    style.add_colour_bar(figure, image, units_ages, "recovered mass (share of attention)", below=below)
    return figure


def draw_similarity(overall: Summary, caption: str) -> Figure:
    """Draw recovered mass by query similarity, over all steps, ages and units."""
    figure = style.new_figure("Recovered mass by query similarity", caption, (9.6, 6.6))
    axes = figure.add_subplot()
    style.style_axes(
        axes, "All steps, ages and units", "query similarity (cosine)", "recovered mass (share of attention)"
    )
    counts = overall.mass_by_similarity.count
    image = axes.pcolormesh(
        SIMILARITY_EDGES,
        MASS_EDGES,
        np.ma.masked_equal(overall.joint, 0).T,
        norm=LogNorm(1, max(overall.joint.max(), 10)),
        cmap=style.COUNTS,
    )
    style.add_colour_bar(figure, image, axes, "values in the bin (log scale)")
    if counts.any():
        lowest = MASS_EDGES[np.flatnonzero(overall.joint.sum(axis=0))[0]]
        axes.set_xlim(SIMILARITY_EDGES[np.flatnonzero(counts)[0]] - 0.02, 1.01)
        axes.set_ylim(max(lowest - 0.02, -0.005), 1.005)

    # Bins with few values would draw noise.
    enough = counts >= max(30, counts.sum() / 20_000)
    centres = (SIMILARITY_EDGES[1:] + SIMILARITY_EDGES[:-1]) / 2
    low, high = np.where(enough, quantiles_by_similarity(overall, (0.1, 0.9)), np.nan)
    mean = np.where(enough, overall.mass_by_similarity.mean(), np.nan)
    axes.plot(centres, mean, color=style.ACCENT, linewidth=2.5, label="mean at this similarity")
    axes.plot(centres, low, "--", color=style.ACCENT, linewidth=1.3, label="10 % and 90 % quantiles")
    axes.plot(centres, high, "--", color=style.ACCENT, linewidth=1.3)
    style.add_legend(axes)
    return figure


def draw_overlap(overall: Summary, by_kind: Mapping[str, Summary], caption: str) -> Figure:
    """Draw the overlap that a refresh finds by stride, one panel per kind of text."""
    n = len(by_kind)
    columns = {1: 1, 2: 2, 4: 2}.get(n, 3)
    rows = -(-n // columns)
    figure = style.new_figure(
        "Overlap at refresh by stride", caption, (max(3.8 * columns + 1.2, 9.6), 3.5 * rows + 1.2)
    )
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=(0.06, *[1] * rows))
    legend = figure.add_subplot(grid[0, :])
    legend.set_axis_off()
    for place, (look, (kind, summary)) in enumerate(zip(style.looks(n), by_kind.items(), strict=True)):
        panel = figure.add_subplot(grid[1 + place // columns, place % columns])
        bottom, left = place + columns >= n, place % columns == 0
        style.style_axes(
            panel, kind, "stride (steps)" if bottom else "", "overlap (share of the new set)" if left else ""
        )
        _draw_bands(panel, summary.ages, summary.by_unit("overlap"))
        for number, other in enumerate(name for name in by_kind if name != kind):
            label, grey = "other kinds" if number == 0 else "_", by_kind[other]
            _draw_line(panel, grey.ages, grey.by_age("overlap"), (style.GREY, "-"), label, width=0.8)
        _draw_line(panel, summary.ages, summary.by_age("overlap"), look, "mean of this kind")
        _age_axis(panel, 0.93, overall.max_age * 1.07)
        panel.set_ylim(0, 1.02)
        panel.tick_params(labelbottom=bottom, labelleft=left)
    style.add_legend(legend, of=figure.axes[1])
    return figure


def write_picture(figure: Figure, path: Path | str) -> Path:
    """Write a PNG: beside its place first, then renamed."""
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=150)
    return Path(path)


def _draw_bands(axes: Axes, ages: Sequence[int], by_unit: np.ndarray) -> None:
    lowest, low, high, highest = quantiles_over_units(by_unit, (0.1, 0.25, 0.75, 0.9))
    outer, inner = style.BANDS
    axes.fill_between(ages, lowest, highest, color=outer, linewidth=0, label="10 to 90 % of units")
    axes.fill_between(ages, low, high, color=inner, linewidth=0, label="25 to 75 % of units")


def _draw_line(
    axes: Axes, ages: Sequence[int], means: np.ndarray, look: style.Look, label: str, *, width: float = 2.2
) -> None:
    # A recording with a single age has no line to draw.
    marker = "o" if len(ages) == 1 else ""
    axes.plot(ages, means, look[1], color=look[0], linewidth=width, label=style.plain(label), marker=marker)


def _age_axis(axes: Axes, first: float, last: float) -> None:
    """Make x a doubling scale of ages in steps from `first` to `last`; linear up to 1 if it starts at 0."""
    if first == 0:
        axes.set_xscale("symlog", base=2, linthresh=1, linscale=0.7)
    else:
        axes.set_xscale("log", base=2)
    axes.set_xlim(first, last)
    axes.xaxis.set_major_locator(FixedLocator(([0] if first == 0 else []) + doubling_ages(int(last))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
