"""`python benchmarks/peers.py`: other people's own code beside ours, on the same model, prompts and steps.

kvpress (NVIDIA) runs in an environment of its own in the output folder, because it needs an older transformers; it is
installed there from PyPI on the first run. Teacher-forced along the same texts: KL to full attention, which each
environment computes by itself. Its methods keep k tokens of the prompt and every token that comes after, ours keep k in
all. Writes `docs/results/peers.json` and a section of `docs/long_outputs.md`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from long_outputs_report import page
from machine import machine_name
from tqdm import tqdm

from policies import FixedStride, PolicyFile
from recycler.evaluate.answers import measure_once
from recycler.evaluate.baselines import refreshkv_set, snapkv_set, streaming_llm_set, tova_set
from recycler.evaluate.method import Scheduled
from recycler.measure.store import Store
from recycler.model.default_model import default_model_folder
from recycler.model.loading import load_model
from recycler.prompts import default_prompts
from recycler.tasks import TaskPrompt
from traces.reporting.command import run_command
from traces.reporting.whole_file import write_text

_DOCS = Path(__file__).parents[1] / "docs"
_WORKER = Path(__file__).with_name("peers_worker.py")
_REQUIREMENTS = ("torch==2.13.0", "kvpress==0.5.5", "transformers==4.57.*")


def main(
    policy: Annotated[Path, typer.Option(help="Policy file of ours.")] = _DOCS
    / "results/policy-budget-0.1-512-steps.json",
    out: Annotated[Path, typer.Option(help="Folder of the environment and of results.")] = Path("results/peers"),
    context_tokens: Annotated[int, typer.Option(help="Prompt tokens.")] = 2048,
    steps: Annotated[int, typer.Option(help="Decode steps.", min=1)] = 48,
    per_kind: Annotated[int, typer.Option(help="Prompts per kind.", min=1)] = 2,
) -> dict[str, Any]:
    """Run both sides, and put them beside each other."""
    began = time.perf_counter()
    loaded, file = load_model(None), PolicyFile.read(policy)
    k = file.selection.k
    prompts = default_prompts(
        loaded.tokenizer, n_per_kind=per_kind, first_index=4, context_tokens=context_tokens, n_steps=steps
    )
    methods = [
        Scheduled("StreamingLLM", "ours", FixedStride(1e9), streaming_llm_set(k)),
        Scheduled("SnapKV", "ours", FixedStride(1e9), snapkv_set(k)),
        Scheduled("TOVA", "ours", FixedStride(1e9), tova_set(k)),
        Scheduled("stride 10, RefreshKV's set", "ours", FixedStride(10), refreshkv_set(k)),
        Scheduled("tuned on 512 steps", "ours", file.policy, file.selection),
    ]
    store = Store(out / "outcomes")
    outcomes = [
        measure_once(store, loaded, TaskPrompt(prompt, 0, lambda _: 0.0), methods)
        for prompt in tqdm(prompts, desc="ours", unit="prompt")
    ]
    ours = {
        method.name: {
            "kl": float(np.mean([outcome.methods[method.name].kl.mean() for outcome in outcomes])),
            "read_share": float(np.mean([outcome.methods[method.name].read_share for outcome in outcomes])),
        }
        for method in methods
    }
    # What the tuned policy reads, as tokens that a set of one size would hold.
    as_many = round(ours["tuned on 512 steps"]["read_share"] * (context_tokens + steps / 2))
    np.savez(out / "prompts.npz", tokens=np.stack([prompt.tokens for prompt in prompts]), n_prompt=context_tokens)
    _write_model(out / "model")
    python = _environment(out / "env")
    sizes = f"{k},{as_many}"
    command = [str(python), str(_WORKER), str(out / "model"), str(out / "prompts.npz"), sizes, str(out / "peers.json")]
    subprocess.run(command, check=True)
    theirs = json.loads((out / "peers.json").read_text(encoding="utf-8"))
    result = {
        "model": loaded.id,
        "machine": machine_name(),
        "context_tokens": context_tokens,
        "steps": steps,
        "prompts": len(prompts),
        "k": k,
        "as_many": as_many,
        "ours": ours,
        **theirs,
    }
    write_text(_DOCS / "results" / "peers.json", json.dumps(result, indent=1) + "\n")
    write_text(_DOCS / "long_outputs.md", page(_DOCS / "results"))
    print(json.dumps(result, indent=1))
    return {"minutes": round((time.perf_counter() - began) / 60, 1)}


def _write_model(folder: Path) -> None:
    """The default model, with the base of its rotary embedding where transformers 4 looks for it.

    Without that it takes 10,000, and measures another model, quite plausibly.
    """
    shutil.copytree(default_model_folder(), folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    write_text(folder / "config.json", json.dumps(config, indent=1))


def _environment(folder: Path) -> Path:
    """Python of an environment with kvpress in it."""
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *_REQUIREMENTS], check=True)
        ready.touch()
    return python


if __name__ == "__main__":
    run_command(main)
