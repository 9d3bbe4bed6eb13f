"""Pictures of a tuning result: the Pareto front, where full steps go, KL per kind of text, the search."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator, PercentFormatter

from traces.reporting import picture_style as style
from tuning.confirm.results import TuningResult
from tuning.report.result_rows import ResultRow, Role, interval, nats, percent, result_rows, whole_percent

BLUE = "#0072B2"
_COLOURS = {Role.EXPORTED: style.ACCENT, Role.FAMILY: BLUE, Role.BASELINE: style.INK}
_MARKERS = {Role.EXPORTED: "D", Role.FAMILY: "o", Role.BASELINE: "s"}
_SIZES = {Role.EXPORTED: 8.5, Role.FAMILY: 6.5, Role.BASELINE: 7.5}
_FRONT = "#C4C4C4"
KL_AXIS = "KL to full attention (nats per step)"
_SHARE_TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
# Wider than this, numbers in the cells of the map could not be read.
_MOST_NUMBERED_LAYERS = 40


def draw_pareto(result: TuningResult) -> Figure:
    """Draw KL against full share with the Pareto front, and the policies at the budget by their KL."""
    rows = result_rows(result)
    figure = style.new_figure("What a full step buys", picture_caption(result), (13.5, 6.4))
    grid = figure.add_gridspec(2, 2, height_ratios=(1.0, 0.05), width_ratios=(1.35, 1.0))
    front, ranking, legend = (figure.add_subplot(grid[place]) for place in ((0, 0), (0, 1), (1, slice(None))))
    at_budget = sorted((row for row in rows if row.role is not Role.REFERENCE), key=lambda row: -row.kl.value)
    _draw_ranking(ranking, at_budget, result)
    _draw_front(front, rows, result)
    legend.set_axis_off()
    style.add_legend(legend, of=front)
    return figure


def draw_unit_shares(result: TuningResult) -> Figure:
    """Draw how often each layer and KV head ran full under the exported policy."""
    shares = result.best.measured.unit_full_share
    layers, heads = shares.shape
    figure = style.new_figure("Where the full steps go", picture_caption(result), (13.5, 2.6 + 0.36 * min(heads, 16)))
    axes = figure.add_subplot()
    title = f"Full share by layer and KV head, {result.best.measured.label}: mean {percent(float(shares.mean()))}"
    style.style_axes(axes, title, "layer", "KV head", grid=False)
    # The root spreads out the many small shares; a uniform schedule comes out in the middle of the scale.
    norm = PowerNorm(0.5, 0, min(1.0, max(float(shares.max()), 3 * result.budget)))
    columns, lines = np.arange(layers + 1) - 0.5, np.arange(heads + 1) - 0.5
    image = axes.pcolormesh(
        columns, lines, shares.T, norm=norm, cmap=style.SHARES, edgecolors="white", linewidth=0.8 if layers <= 80 else 0
    )
    axes.xaxis.set_major_locator(style.index_ticks(layers))
    axes.yaxis.set_major_locator(style.index_ticks(heads))
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    axes.invert_yaxis()
    if layers <= _MOST_NUMBERED_LAYERS and heads <= 16:
        for (layer, head), share in np.ndenumerate(shares):
            colour = "white" if norm(share) < 0.6 else style.INK
            axes.text(layer, head, f"{100 * share:.0f}", ha="center", va="center", fontsize=8.5, color=colour)
    style.add_colour_bar(figure, image, axes, "full share")
    figure.axes[-1].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.axes[-1].yaxis.set_minor_locator(NullLocator())
    return figure


def draw_kl_by_kind(result: TuningResult) -> Figure:
    """Draw the KL per kind of text of the baseline, the best fixed stride and the exported policy."""
    kinds = list(dict.fromkeys(result.prompt_kinds))
    bars = [(result.baseline, "baseline", style.GREY)]
    bars += [(family.measured, "tuned", BLUE) for family in result.families[1:] if family.family == "fixed_stride"]
    bars.append((result.best.measured, "exported", style.ACCENT))
    size = (min(max(2.2 + 1.9 * len(kinds), 9.6), 13.5), 5.2)
    figure = style.new_figure("KL by kind of text", picture_caption(result), size)
    axes = figure.add_subplot()
    style.style_axes(axes, "Mean over prompts; a dot is a prompt", "", KL_AXIS)
    axes.grid(visible=False, axis="x")
    width = 0.8 / len(bars)
    for number, (measured, part, colour) in enumerate(bars):
        means = result.kl_by_kind(measured)
        places = np.arange(len(kinds)) + (number - (len(bars) - 1) / 2) * width
        label = f"{measured.label} ({part})"
        axes.bar(places, list(means.values()), 0.9 * width, color=colour, label=label, alpha=0.85)
        place_of = dict(zip(kinds, places, strict=True))
        at = [place_of[kind] for kind in result.prompt_kinds]
        axes.plot(at, measured.prompt_kl, "o", color=style.INK, markersize=3, markeredgecolor="white", mew=0.4)
    axes.set_xticks(np.arange(len(kinds)), kinds, fontsize=11.5)
    # Few kinds do not make wide bars.
    margin = 0.55 * max(len(kinds), 3) - (len(kinds) - 1) / 2
    axes.set_xlim(-margin, len(kinds) - 1 + margin)
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(bottom=0)
    axes.legend(loc="best", fontsize=10.5, frameon=False, labelcolor=style.INK)
    return figure


def draw_search(result: TuningResult) -> Figure:
    """Draw the replay loss of every trial, one panel per family."""
    n = len(result.families)
    columns = min(n, 3)
    n_rows = -(-n // columns)
    figure = style.new_figure(
        "The search: lost mass in replay, weighted by unit cost",
        picture_caption(result),
        (max(4.4 * columns, 9.6), 2.9 * n_rows + 1.2),
    )
    panels = np.ravel(figure.subplots(n_rows, columns, sharey=True, squeeze=False))
    losses = np.concatenate([family.trials[:, 1] for family in result.families])
    losses = losses[np.isfinite(losses) & (losses > 0)]
    # Panels share their axis, and one without a positive loss has no place on a logarithmic one.
    all_positive = all((family.trials[:, 1] > 0).any() for family in result.families)
    logarithmic = losses.size > 0 and all_positive and losses.max() > 10 * losses.min()
    for number, (panel, family) in enumerate(zip(panels, result.families, strict=False)):
        role = Role.FAMILY if number else Role.EXPORTED
        loss = family.trials[:, 1]
        trial = np.arange(1, len(loss) + 1)
        best = f": best {np.nanmin(loss):.4g}" if np.isfinite(loss).any() else ""
        bottom, left = number + columns >= n, number % columns == 0
        style.style_axes(
            panel,
            f"{family.family}{best}",
            "trial" if bottom else "",
            "replay loss" if left else "",
        )
        panel.plot(trial, loss, "o", color=style.GREY, markersize=4, alpha=0.7, mew=0, label="a trial")
        panel.step(trial, np.fmin.accumulate(loss), where="post", color=_COLOURS[role], label="best so far")
        panel.set_xlim(0, len(loss) + 1)
        panel.xaxis.get_major_locator().set_params(integer=True)
        if logarithmic:
            panel.set_yscale("log")
    for panel in panels[n:]:
        panel.set_axis_off()
    panels[0].legend(loc="best", fontsize=10, framealpha=0.9, edgecolor="none", labelcolor=style.INK)
    return figure


def _draw_front(axes: Axes, rows: Sequence[ResultRow], result: TuningResult) -> None:
    style.style_axes(axes, "Pareto front: how often full, and what is lost", "full share in closed loop", KL_AXIS)
    # A logarithmic axis has no place for none.
    rows = [row for row in rows if row.kl.value > 0]
    _share_axis(axes, np.array([*(row.measured.full_share for row in rows), result.budget]))
    _kl_axis(axes, rows)
    budget, family = f"{100 * result.budget:.4g}%", result.best.family
    series = {
        Role.BASELINE: f"fixed stride (at {budget}: baseline)",
        Role.FAMILY: "other families",
        Role.EXPORTED: f"{family} (at {budget}: exported)",
    }
    for role, label in series.items():
        members = [row for row in rows if _series(row, family) is role]
        if members:
            _draw_series(axes, members, role, label)
    front = _front(np.array([(row.measured.full_share, row.kl.value) for row in rows]).reshape(-1, 2))
    if len(front):
        corners = np.concatenate([[(front[0, 0], axes.get_ylim()[1])], front, [(axes.get_xlim()[1], front[-1, 1])]])
        axes.step(*corners.T, where="post", color=_FRONT, linewidth=2.4, zorder=1, label="Pareto front")
    axes.axvline(result.budget, color=style.INK, linestyle=":", linewidth=1.2, zorder=1, label=f"budget {budget}")


def _series(row: ResultRow, family: str) -> Role:
    """The role whose look a policy has: a reference is the exported family or the fixed stride at another budget."""
    if row.role is not Role.REFERENCE:
        return row.role
    return Role.EXPORTED if row.label.startswith(f"{family} at ") else Role.BASELINE


def _draw_series(axes: Axes, rows: Sequence[ResultRow], role: Role, label: str) -> None:
    """Draw policies with their intervals in the look of a role; one policy at several budgets as a line."""
    points = sorted((row.measured.full_share, row.kl.value, row.kl.low, row.kl.high) for row in rows)
    share, kl, low, high = np.array(points).T
    low = np.maximum(low, axes.get_ylim()[0])
    axes.errorbar(
        share,
        kl,
        # The mean of one prompt differs from its interval by rounding.
        np.maximum([kl - low, high - kl], 0),
        label=label,
        color=_COLOURS[role],
        marker=_MARKERS[role],
        markersize=_SIZES[role],
        mec="white",
        mew=0.6,
        linestyle="" if role is Role.FAMILY else "-",
        linewidth=1.2,
        elinewidth=1.3,
        ecolor=(_COLOURS[role], 0.55),
    )


def _draw_ranking(axes: Axes, rows: Sequence[ResultRow], result: TuningResult) -> None:
    style.style_axes(axes, f"At the budget of {100 * result.budget:.4g}%, with 95% intervals", KL_AXIS, "")
    axes.grid(visible=False, axis="y")
    axes.axvline(result.baseline.kl.value, color=style.INK, linestyle=":", linewidth=1.2, zorder=1)
    names = []
    for place, row in enumerate(rows):
        colour = _COLOURS[row.role]
        axes.hlines(place, row.kl.low, row.kl.high, color=colour, linewidth=2.2, alpha=0.55, zorder=2)
        marker, size = _MARKERS[row.role], _SIZES[row.role]
        axes.plot(row.kl.value, place, marker, color=colour, markersize=size, mec="white", mew=0.6)
        named = row.role in (Role.EXPORTED, Role.BASELINE)
        names.append(f"{row.label}\n({row.role})" if named else row.label)
        if row.kl_share is not None and row.role is not Role.BASELINE:
            share = whole_percent(row.kl_share.value)
            if row.kl_share.high > row.kl_share.low:
                share += f"\n[{interval(row.kl_share, whole_percent, ', ')}]"
            axes.text(1.02, place, share, transform=axes.get_yaxis_transform(), color=colour, fontsize=10, va="center")
    axes.set_yticks(range(len(rows)), names)
    for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_color(_COLOURS[row.role])
        tick.set_fontweight("bold" if row.role is Role.EXPORTED else "normal")
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlim(left=0)
    axes.text(1.02, 1.0, "share of\nbaseline's", transform=axes.transAxes, color=style.INK, fontsize=10, va="bottom")


def _front(points: np.ndarray) -> np.ndarray:
    """The points that no other one beats in both coordinates, by full share."""
    order = np.lexsort((points[:, 1], points[:, 0]))
    lowest = np.minimum.accumulate(np.append(np.inf, points[order, 1]))[:-1]
    front: np.ndarray = points[order][points[order, 1] < lowest]
    return front


def _share_axis(axes: Axes, shares: np.ndarray) -> None:
    """Make x a doubling scale of full shares, linear around 0 if one is 0."""
    lowest, highest = shares[shares > 0].min(), shares.max()
    if (shares == 0).any():
        axes.set_xscale("symlog", linthresh=lowest / 1.5, linscale=0.35, base=2)
        axes.set_xlim(-0.2 * lowest, highest * 1.8)
    else:
        axes.set_xscale("log", base=2)
        axes.set_xlim(lowest / 1.8, highest * 1.8)
    ticks = [tick for tick in _SHARE_TICKS if lowest / 1.8 <= tick <= highest * 1.8]
    axes.xaxis.set_major_locator(FixedLocator([0, *ticks] if (shares == 0).any() else ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))


def _kl_axis(axes: Axes, rows: Sequence[ResultRow]) -> None:
    """Make y a logarithmic scale that holds all intervals."""
    if not rows:
        return
    lowest = min(row.kl.low if row.kl.low > 0 else row.kl.value for row in rows)
    axes.set_yscale("log")
    axes.set_ylim(lowest / 1.25, max(row.kl.high for row in rows) * 1.35)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: nats(value).rstrip("0").rstrip(".")))


def picture_caption(result: TuningResult) -> str:
    """Where the numbers of a picture come from."""
    n = len(result.prompt_names)
    return (
        f"{result.model.id}, k = {result.selection.k} tokens, budget {100 * result.budget:.4g}%, "
        f"held-out prompts: {n:,}, steps each: {result.n_steps:,}"
    )
