"""`python -m recycler.sensitivity FOLDER`: what each unit alone does to the model when it is never refreshed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from policies import written_by
from recycler.measure.ablation import measure_sensitivity
from recycler.model.loading import load_model
from recycler.model.shape import model_shape
from traces import TraceFolder
from traces.reporting.command import run_command


def main(
    folder: Annotated[Path, typer.Argument(help="Folder of traces.")],
    steps: Annotated[int, typer.Option(help="Decode steps per prompt.", min=1)] = 24,
    model: Annotated[str | None, typer.Option(help="Hugging Face id or folder; default: the embedded model.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is one, else cpu.")] = None,
) -> dict[str, Any]:
    """Measure, for every prompt of a folder of traces, how much each unit needs to be refreshed."""
    began = time.perf_counter()
    files = list(TraceFolder(folder))
    loaded = load_model(model, dtype=dtype, device=device)
    units = model_shape(loaded.model, loaded.id).units
    if units != files[0].header.units:
        raise ValueError(f"the traces are of {files[0].header.units} units, but {loaded.id} has {units}.")
    sensitivity = measure_sensitivity(loaded, folder, files, n_steps=steps)
    mean = np.mean(list(sensitivity.kl.values()), axis=0)
    layer, head = np.unravel_index(int(mean.argmax()), mean.shape)
    return {
        "folder": str(folder),
        "prompts": len(sensitivity.kl),
        "steps": sensitivity.n_steps,
        "most_sensitive": {"layer": int(layer), "kv_head": int(head), "kl": float(mean.max())},
        "seconds": time.perf_counter() - began,
    }


if __name__ == "__main__":
    run_command(main, version=written_by())
