"""KL and copying accuracy of all schedules against what they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, PercentFormatter

from traces.reporting import picture_style as style

_BLUE, _GREEN = "#0072B2", "#009E73"
# Names of methods by how they are drawn: prefix, colour, marker, whether points are joined.
_GROUPS = (
    ("tuned", style.ACCENT, "D", True),
    ("stride ", style.INK, "s", True),
    ("hindsight", _GREEN, "*", False),
)
_SETS = {", same set": ("--", "clock, the tuned ones' set"), ", RefreshKV's set": (":", "clock, RefreshKV's set")}
_TICKS = (0.02, 0.05, 0.1, 0.2)


def draw_schedulers(rows: Sequence[Mapping[str, Any]], caption: str) -> Figure:
    """Draw KL (left) and the share of full attention's copying accuracy that is kept (right) against the full share.

    Args:
        rows: As in the results of `schedulers.py`.
        caption: Where the numbers come from.
    """
    figure = style.new_figure("What a full step buys, by who decides on it", caption, (13.5, 6.2))
    left, right = figure.subplots(1, 2)
    _draw(left, rows, lambda row: float(row["kl"][0]), lambda row: (float(row["kl"][1]), float(row["kl"][2])))
    _draw(right, rows, lambda row: float(row["copying_kept"]), None)
    left.set_yscale("log")
    left.yaxis.set_minor_formatter(NullFormatter())
    style.style_axes(left, "All kinds of text", "full share (log scale)", "KL to full attention (nats per step)")
    style.style_axes(right, "Copying", "full share (log scale)", "share of full attention's accuracy kept")
    right.axhline(1, color=style.GREY, linewidth=1)
    right.annotate(
        "full attention", (0.016, 1), xytext=(0, 4), textcoords="offset points", fontsize=10, color=style.GREY
    )
    handles = left.get_legend_handles_labels()
    figure.legend(*handles, loc="outside right upper", frameon=False, fontsize=10.5)
    return figure


def _draw(axes: Axes, rows: Sequence[Mapping[str, Any]], value: Any, interval: Any) -> None:
    axes.set_xscale("log")
    axes.set_xlim(0.013, 0.3)
    axes.xaxis.set_major_locator(FixedLocator(_TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    budget_families = [row for row in rows if _family(row["method"])]
    looks = style.looks(len(budget_families))
    for place, (row, (colour, _)) in enumerate(zip(budget_families, looks, strict=True)):
        axes.plot(row["full_share"], value(row), "o^vPXh<>"[place % 8], color=colour, markersize=6, label=row["method"])
    for prefix, colour, marker, joined in _GROUPS:
        for suffix, (dashes, label) in {"": ("-", ""), **_SETS}.items():
            some = [row for row in rows if row["method"].startswith(prefix) and _suffix(row["method"]) == suffix]
            if not some:
                continue
            some = sorted(some, key=lambda row: row["full_share"])
            x, y = np.array([row["full_share"] for row in some]), np.array([value(row) for row in some])
            name = label or {"tuned": "tuned, best family", "stride ": "clock, pooled set"}.get(
                prefix, "hindsight (oracle)"
            )
            size = 12 if prefix == "hindsight" else 6.5
            axes.plot(x, y, marker, linestyle=dashes if joined else "", color=colour, markersize=size, label=name)
            if interval is not None and joined:
                low, high = np.array([interval(row) for row in some]).T
                axes.vlines(x, low, high, color=colour, linewidth=1, alpha=0.5)
    for suffix, dashes in (("", "-."), (", unpooled", "--")):
        (row,) = [row for row in rows if row["method"] == f"new set at every step{suffix}"]
        name = f"new set at every step{suffix or ', pooled'}"
        axes.axhline(value(row), color=_BLUE, linestyle=dashes, linewidth=1.2, label=name)


def _suffix(method: str) -> str:
    return next((suffix for suffix in _SETS if method.endswith(suffix)), "")


def _family(method: str) -> bool:
    return method.endswith(" 0.1") and not method.startswith(("tuned", "hindsight", "stride "))
