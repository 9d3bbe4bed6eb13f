"""The picture of a ladder: KL of every held-out prompt at every budget, with its bound, against the limit."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from traces.reporting import picture_style as style
from tuning.certify.ladder import Ladder, Rung
from tuning.confirm.results import TuningResult
from tuning.report.pictures import BLUE, KL_AXIS, picture_caption
from tuning.report.result_rows import nats


def draw_ladder(result: TuningResult) -> Figure:
    """Draw the policies of the result's ladder from expensive to cheap: a dot is a prompt, a bar the mean that counts.

    Raises:
        ValueError: If the result has no ladder.
    """
    ladder = result.ladder
    if ladder is None:
        raise ValueError("the budget of this result was given: it has no ladder to draw.")
    asked, rungs = ladder.asked, ladder.rungs
    figure = style.new_figure(
        "What is certified", picture_caption(result), (min(max(3.5 + 1.15 * len(rungs), 9.6), 13.5), 5.6)
    )
    axes = figure.add_subplot()
    style.style_axes(
        axes,
        f"Upper bounds at {100 * asked.confidence:g}% confidence, tested from left to right",
        "budget: share of unit-steps that may run full",
        KL_AXIS,
    )
    axes.grid(visible=False, axis="x")
    for place, rung in enumerate(rungs):
        colour = _colour(ladder, rung)
        counted = np.minimum(rung.prompt_kl, asked.cap)
        bound = rung.certificate.kl_bound
        axes.bar(place, counted.mean(), 0.62, color=colour, alpha=0.3)
        axes.hlines(bound, place - 0.31, place + 0.31, color=colour, linewidth=2.6)
        # Prompts of one policy side by side, in the same order everywhere.
        across = place + 0.5 * (np.arange(len(counted)) - (len(counted) - 1) / 2) / max(len(counted), 4)
        whole = rung.prompt_kl <= asked.cap
        axes.plot(across[whole], counted[whole], "o", color=style.INK, markersize=3.2, mec="white", mew=0.4)
        axes.plot(across[~whole], counted[~whole], "^", color=style.INK, markersize=5)
    axes.axhline(asked.nats, color=style.INK, linewidth=1.4, linestyle="--")
    axes.text(
        1.01, asked.nats, f"limit\n{asked.nats:g}", transform=axes.get_yaxis_transform(), va="center", fontsize=10.5
    )
    if any(rung.certificate.kl_bound > 0.8 * asked.cap or (rung.prompt_kl >= 0.8 * asked.cap).any() for rung in rungs):
        axes.axhline(asked.cap, color=style.GREY, linewidth=1.0, linestyle=":")
        axes.text(
            1.01, asked.cap, f"cap\n{asked.cap:g}", transform=axes.get_yaxis_transform(), va="center", fontsize=10.5
        )
    names = [f"{100 * rung.budget:g}%\nbound {nats(rung.certificate.kl_bound)}" for rung in rungs]
    axes.set_xticks(range(len(rungs)), names)
    for tick, rung in zip(axes.get_xticklabels(), rungs, strict=True):
        tick.set_color(_colour(ladder, rung))
    axes.set_xlim(-0.6, len(rungs) - 0.4)
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(bottom=0)
    axes.legend(
        handles=[
            Patch(color=style.ACCENT, label="certified and exported"),
            Patch(color=BLUE, label="certified"),
            Patch(color=style.GREY, label="not certified"),
        ],
        loc="upper left",
        fontsize=10.5,
        framealpha=0.9,
        edgecolor="none",
        labelcolor=style.INK,
    )
    return figure


def _colour(ladder: Ladder, rung: Rung) -> str:
    if rung is ladder.chosen:
        return style.ACCENT
    return BLUE if rung.certificate.certified else style.GREY
