"""The comparison as tables, for a terminal and for a document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from recycler.evaluate.comparison import Screened
from recycler.evaluate.method import Method
from recycler.evaluate.summary import ALL_TASKS, QUARTERS, Row
from traces.reporting.estimate import Estimate
from traces.reporting.text_table import TextTable

_COLUMNS: Mapping[str, str] = {
    "kl": "KL to full (nats/step)",
    "agreement": "same next token",
    "nll_change": "added NLL (nats/token)",
    "accuracy_kept": "accuracy kept",
}


def tables(rows: Sequence[Row], screened: Sequence[Screened]) -> list[TextTable]:
    """What full attention can do; methods over all tasks, and along the output; KL and accuracy by task. Best first."""
    by_key = {(row.method, row.task, row.measure): row for row in rows}
    methods = sorted(
        dict.fromkeys(row.method for row in rows),
        key=lambda name: by_key[name, ALL_TASKS, "kl"].value if (name, ALL_TASKS, "kl") in by_key else 0.0,
    )
    found = [_what_full_can_do(screened, by_key)]
    if any(row.task == ALL_TASKS for row in rows):
        found += [_over_all(methods, by_key), _along_the_output(methods, by_key)]
    compared = [one.task for one in screened if one.compared]
    for measure, title in (("kl", "KL to full attention (nats per step)"), ("accuracy", "Mean score of own answers")):
        tasks = [task for task in compared if (methods[0], task, measure) in by_key]
        if tasks:
            cells = tuple((name, *(_estimate(by_key.get((name, task, measure))) for task in tasks)) for name in methods)
            found.append(TextTable(title, ("method", *tasks), cells))
    return found


def share_table(method: str, shares: Mapping[str, Estimate]) -> TextTable:
    """KL of a method beside every other's, the least share first; see `summary.kl_shares`."""
    ordered = sorted(shares.items(), key=lambda item: item[1].value)
    cells = tuple(
        (name, f"{share.value:.0%} [{share.low:.0%}, {share.high:.0%}]") for name, share in ordered if share.value > 0
    )
    title = f"KL of {method} as a share of each method's (same prompts, 95% bootstrap interval)"
    return TextTable(title, ("method", f"KL of {method} / its KL"), cells)


def source_table(methods: Sequence[Method]) -> TextTable:
    """What each method is."""
    return TextTable("The methods", ("method", "source"), tuple((method.name, method.source) for method in methods))


def _what_full_can_do(screened: Sequence[Screened], by_key: Mapping[tuple[str, str, str], Row]) -> TextTable:
    cells = []
    for one in screened:
        row = by_key.get(("full", one.task, "accuracy"))
        score = "teacher-forced only" if one.score is None else f"{row.value if row else one.score:.2f}"
        cells.append((one.task, score, f"{one.chance:.2f}", "yes" if one.compared else "no: full attention cannot"))
    header = ("task", "score of full attention", "chance", "methods compared")
    return TextTable("What the model can do with full attention", header, tuple(cells))


def _over_all(methods: Sequence[str], by_key: Mapping[tuple[str, str, str], Row]) -> TextTable:
    cells = []
    for name in methods:
        shown = [by_key.get((name, ALL_TASKS, measure)) for measure in _COLUMNS]
        known = next((row for row in shown if row), None)
        shares = (f"{known.full_share:.1%}", f"{known.read_share:.1%}") if known else ("", "")
        cells.append((name, *shares, *(_estimate(row) for row in shown)))
    header = ("method", "full share", "tokens read", *_COLUMNS.values())
    return TextTable("All compared tasks (mean over prompts, 95% bootstrap interval)", header, tuple(cells))


def _along_the_output(methods: Sequence[str], by_key: Mapping[tuple[str, str, str], Row]) -> TextTable:
    """Whether KL grows with the output, and how it is spread over steps."""
    cells = []
    for name in methods:
        found = [by_key.get((name, ALL_TASKS, measure)) for measure in (*QUARTERS, "kl_p95", "above_1_nat")]
        numbers = ["-" if row is None else f"{row.value:.3f}" for row in found[:-1]]
        share = "-" if found[-1] is None else f"{found[-1].value:.1%}"
        first, last = found[0], found[3]
        grown = f"{last.value / first.value:.1f}" if first and last and first.value > 0 else "-"
        cells.append((name, *numbers[:4], grown, numbers[4], share))
    header = ("method", "first quarter", "second", "third", "last", "last / first", "95th percentile", "above 1 nat")
    return TextTable("KL along the continuation (nats per step, mean over prompts)", header, tuple(cells))


def _estimate(row: Row | None) -> str:
    if row is None:
        return "-"
    if row.low == row.high:
        return f"{row.value:.3f}"
    return f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]"
