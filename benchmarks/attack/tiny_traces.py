"""Random traces of the tiny model's shape, as arrays and a header that may be damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from policies import Selection
from traces.trace import FORMAT
from traces.trace_file import METADATA_KEY

N_PROMPT, N_STEPS, AGES, UNITS = 60, 6, (1, 2, 3, 4), (2, 2)
KINDS = ("prose", "code")


def tiny_trace(name: str, kind: str, model: str, seed: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and header of a trace that is whole."""
    rng = np.random.default_rng(seed)
    by_age = (N_STEPS, len(AGES), *UNITS)
    there_is_no_set = (np.array([0, *AGES[:-1]]) >= np.arange(N_STEPS)[:, None] + 1)[:, :, None, None]
    arrays = {
        name: np.where(there_is_no_set, np.nan, rng.uniform(0, 1, by_age)).astype(np.float32)
        for name in ("recovered_mass", "query_similarity", "overlap")
    }
    arrays["fresh_mass"] = rng.uniform(0, 1, (N_STEPS + 1, *UNITS)).astype(np.float32)
    arrays["token_log_prob"] = np.zeros(N_STEPS, dtype=np.float32)
    arrays["tokens"] = rng.integers(1, 200, N_PROMPT + N_STEPS, dtype=np.int32)
    header = {
        "format": FORMAT,
        "model": {"id": model, "dtype": "float32", "layers": 2, "kv_heads": 2, "query_heads": 4, "head_dim": 8},
        "selection": Selection(40).to_json(),
        "prompt": {"name": name, "kind": kind, "source": "drawn", "licence": "CC0-1.0", "n_prompt_tokens": N_PROMPT},
        "n_steps": N_STEPS,
        "ages": list(AGES),
        "versions": {"numpy": np.__version__},
    }
    return arrays, header


def save(path: Path, arrays: dict[str, np.ndarray], header: str) -> None:
    """Write a trace as it is, whole or not."""
    save_file(arrays, path, metadata={METADATA_KEY: header})


def save_folder(folder: Path, model: str) -> None:
    """Four whole traces, two of each kind."""
    folder.mkdir(parents=True)
    for seed, name in enumerate(f"{kind}-{i:03d}" for kind in KINDS for i in range(2)):
        arrays, header = tiny_trace(name, name.partition("-")[0], model, seed)
        save(folder / f"{name}.safetensors", arrays, json.dumps(header))
