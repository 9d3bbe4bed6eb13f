"""The targets of the GPU engine, beside what `benchmarks/decode.py` measured."""

from __future__ import annotations

from typing import Any


def on_h200(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The targets for an H200 at a tenth full, and what was reached by the policy that reads queries."""
    policy = {
        (row["batch"], row["context_tokens"]): row for row in rows if row["case"] == "engine, cosine under a budget"
    }
    recycled_rows = [row for row in rows if row["case"] == "engine, never full"]
    wanted = (
        (1, 131072, "vs_best_stock", 1.7),
        (8, 65536, "vs_best_stock", 3.0),
        (1, 4096, "vs_best_stock", 0.97),
    )
    reached = [
        _target(
            f"{least} x the best stock generate at batch {batch} x {context:,}", least, policy[batch, context][name]
        )
        for batch, context, name, least in wanted
        if (batch, context) in policy
    ]
    reached.append(_target("0.85 of ideal everywhere", 0.85, min(row["ideal_share"] for row in policy.values())))
    floor = min(row["floor_share"] for row in recycled_rows)
    reached.append(_target("a recycled step within 1.3 x its floor everywhere", round(1 / 1.3, 4), floor))
    peak = max(row["peak_share"] for row in policy.values())
    return [
        *reached,
        {
            "target": "cache and all that decoding takes within 1.05 x the dense cache",
            "reached": peak,
            "met": peak <= 1.05,
        },
    ]


def _target(target: str, least: float, reached: float) -> dict[str, Any]:
    return {"target": target, "reached": reached, "met": reached >= least}
