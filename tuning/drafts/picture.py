"""The picture of what drafts come to: tokens for the time, against the drafts of a round."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from traces.reporting import picture_style as style
from tuning.drafts.choose import expected, fixed_rules
from tuning.drafts.results import DraftsResult


def draw_drafts(result: DraftsResult, costs_of_here: bool) -> Figure:
    """Draw rounds of every length on the tuning prompts, by drafter, and what was chosen, on the held-out ones."""
    figure = style.new_figure(
        "Exact decoding",
        f"tokens of full attention's own text, for the time of rounds; 1 is always full; {result.texts}",
        (9.6, 5.2),
    )
    axes = figure.add_subplot()
    style.style_axes(axes, "", "drafts per round", "times as fast as always full")
    for drafter in result.drafters:
        rules = fixed_rules(drafter.rounds.most_drafts)
        full_ms = drafter.costs.full_ms
        gains = [full_ms * expected(rule, drafter.rounds, drafter.costs).tokens_per_ms for rule in rules]
        axes.plot(np.arange(1, len(rules) + 1), gains, label=f"fixed, {drafter.name}")
    best, full_ms = result.best, result.best.costs.full_ms
    points: tuple[tuple[str, str, float, float], ...] = (
        ("chosen, tuning prompts", "o", best.tuned.drafts_per_round, full_ms * best.tuned.tokens_per_ms),
        (
            "chosen, held-out, predicted",
            "s",
            result.predicted.drafts_per_round,
            full_ms * result.predicted.tokens_per_ms,
        ),
        ("chosen, held-out, measured", "*", result.predicted.drafts_per_round, result.measured.gain),
    )
    rule, of_fixed = result.fixed
    points += (("best fixed, held-out, predicted", "D", rule.most_drafts, full_ms * of_fixed.tokens_per_ms),)
    for label, marker, drafts, gain in points:
        # What was measured here says nothing of costs of another machine.
        if costs_of_here or not label.endswith("measured"):
            axes.plot(drafts, gain, marker, color=style.INK, markersize=9, label=label)
    axes.axhline(1, color=style.GREY, linewidth=1, linestyle=":")
    axes.legend(frameon=False, fontsize=9)
    return figure
