"""The result of a tuning run in a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from traces.reporting.estimate import Estimate
from tuning.certify.ladder import Ladder
from tuning.confirm.results import TuningResult
from tuning.report.result_rows import ResultRow, Role, interval, nats, percent, result_rows, whole_percent

_CAPTION = (
    "\n* exported. Below each value its 95% interval, bootstrap over prompts. "
    "Full share: unit-steps that ran full. Mass: recovered mass. KL: to full attention, in closed loop."
)


def print_table(result: TuningResult, console: Console) -> None:
    """Print the winners of all families beside the baseline, their KL per kind of text, and what is certified of them.

    80 columns are enough.
    """
    rows = [row for row in result_rows(result) if row.role is not Role.REFERENCE]
    console.print(_policies(result, rows))
    console.print()
    console.print(_kinds(result, rows))
    if result.ladder is not None:
        console.print()
        console.print(_ladder(result.ladder))
        console.print(f"\n{result.best.measured.label}: {result.certificate}.", markup=False, highlight=False)


def _policies(result: TuningResult, rows: list[ResultRow]) -> Table:
    n = len(result.prompt_names)
    table = _table(
        f"{result.model.id}, k = {result.selection.k} tokens, budget {100 * result.budget:.4g}%, "
        f"{n} held-out {'prompt' if n == 1 else 'prompts'} x {result.n_steps} steps",
        "family\nparameters",
    )
    table.caption = _CAPTION
    table.leading = 1
    for header in (
        "full\nshare,\nreplay",
        "full\nshare,\nloop",
        "mass,\nreplay",
        "KL\n(nats/step)",
        "KL of\nbase-\nline's",
        "same next\ntoken",
    ):
        table.add_column(header, justify="right", no_wrap=True, vertical="top")
    for row in rows:
        table.add_row(
            _name(row, row.parameters),
            percent(row.measured.replay_full_share),
            percent(row.measured.full_share),
            "-" if math.isnan(row.measured.recovered_mass) else f"{row.measured.recovered_mass:.3f}",
            _estimate(row.kl, nats),
            _estimate(row.kl_share, whole_percent),
            _estimate(row.agreement, percent),
        )
    return table


def _kinds(result: TuningResult, rows: list[ResultRow]) -> Table:
    table = _table("KL to full attention per kind of text (nats/step)", "family")
    for kind in dict.fromkeys(result.prompt_kinds):
        table.add_column(Text(kind), justify="right", overflow="fold")
    for row in rows:
        table.add_row(_name(row), *(nats(kl) for kl in result.kl_by_kind(row.measured).values()))
    return table


def _ladder(ladder: Ladder) -> Table:
    asked = ladder.asked
    table = _table(f"To be certified: {asked}", "policy")
    for header in ("mean KL", "bound", f"prompts\nabove {asked.nats:g}", "bound of\ntheir share", "certified"):
        table.add_column(header, justify="right", no_wrap=True)
    for rung in ladder.rungs:
        found = rung.certificate
        table.add_row(
            Text(
                f"{rung.label} *" if rung is ladder.chosen else rung.label,
                style="bold" if rung is ladder.chosen else "",
            ),
            nats(float(rung.prompt_kl.mean())),
            nats(found.kl_bound),
            f"{found.n_exceeding} of {found.n_prompts}",
            percent(found.share_bound),
            "yes" if found.certified else "no",
        )
    return table


def _table(title: str, first_column: str) -> Table:
    table = Table(
        title=Text(f"{title}\n", style="bold"),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column(first_column, min_width=16, overflow="fold")
    return table


def _name(row: ResultRow, parameters: str = "") -> Text:
    exported = row.role is Role.EXPORTED
    text = Text(f"{row.label} *" if exported else row.label, style="bold" if exported else "")
    return text.append(f"\n{parameters}", style="not bold dim") if parameters else text


def _estimate(estimate: Estimate | None, spelled: Callable[[float], str]) -> Text:
    if estimate is None:
        return Text("-")
    text = Text(spelled(estimate.value))
    # The baseline is itself for certain, and a single prompt tells nothing of others.
    return text.append(f"\n{interval(estimate, spelled)}", style="dim") if estimate.high > estimate.low else text
