"""What `benchmarks/exact_texts.py` says of its JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Drafts of rounds that end by number.
NUMBERS = (4, 8, 16)


def table(found: Mapping[str, Any]) -> list[str]:
    """Tokens per verification by kind of text, as docs/ways.md has them; the rule is the second of those learned."""
    rounds = {(row["kind"], row["texts"]): row for row in found["rounds"]}
    kinds, texts = (list(dict.fromkeys(names)) for names in zip(*rounds, strict=True))
    lines = [f"| kind | {' | '.join(texts)} |", "|---|" + "---|" * len(texts)]
    lines += [f"| {kind} | {' | '.join(_cell([rounds[kind, one]]) for one in texts)} |" for kind in kinds]
    return [*lines, f"| mean | {' | '.join(_cell([rounds[kind, one] for kind in kinds]) for one in texts)} |"]


def _cell(rows: Sequence[Mapping[str, Any]]) -> str:
    learned = [row["by_costs"][1] for row in rows]
    held = sum(row["by_number"]["8"] for row in rows) / len(rows)
    of_rule = sum(row["tokens_per_round"] for row in learned) / len(rows)
    gain = sum(row["times_full"] / row["best_fixed_times_full"] for row in learned) / len(rows)
    return f"{held:.1f}; {of_rule:.1f} ({gain:.2f})"


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """All of it, as the command prints it."""
    for way, beside in (("greedy", "beside_stock"), ("drawn", "beside_stock"), ("bfloat16", "beside_full")):
        rows = [row for row in found["texts"] if row["way"] == way]
        counts = Counter(row[beside].split(" at ")[0] for row in rows)
        yield f"{way}: {len(rows)} texts, {dict(counts)}"
        yield from (f"    {row['prompt']}: {row[beside]}" for row in rows if row[beside] != "equal")
        for repeats in (False, True):
            some = [row for row in rows if row["repeats"] == repeats and "tokens_per_round" in row]
            if some:
                how = "repeat" if repeats else "do not repeat"
                mean = sum(row["tokens_per_round"] for row in some) / len(some)
                yield f"    {len(some)} that {how} themselves: {mean:.2f} tokens per round"
    shared = [row["shared_with_stock"] for row in found["texts"] if row["way"] == "bfloat16"]
    yield f"bfloat16 beside stock: {shared.count(found['tokens'])} of {len(shared)} texts are equal to their end"
    for texts in dict.fromkeys(row["texts"] for row in found["rounds"]):
        by_number = [row["by_number"] for row in found["rounds"] if row["texts"] == texts]
        means = [sum(of[str(n)] for of in by_number) / len(by_number) for n in NUMBERS]
        yield f"{texts}: " + ", ".join(f"{mean:.2f} of {n + 1}" for n, mean in zip(NUMBERS, means, strict=True))
    for row in found["rounds"]:
        for by in row["by_costs"]:
            yield (
                f"{row['kind']}, {row['texts']}, {by['costs_of']}: {by['tokens_per_round']:.2f} tokens per round, "
                f"{by['times_full']:.2f} x always full; {by['best_fixed_times_full']:.2f} by {by['best_fixed']} drafts"
            )
