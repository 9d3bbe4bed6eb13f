"""`python -m recycler.export`: a model folder that decodes with its policy wherever transformers loads it."""

from __future__ import annotations

import shutil
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoConfig, AutoModelForCausalLM

from policies import PolicyFile, written_by
from recycler.decode.custom_generate import POLICY_NAME
from recycler.model.default_model import DEFAULT_MODEL_ID, default_model_folder
from recycler.model.shape import model_shape
from traces.reporting.command import run_command
from traces.reporting.whole_file import errors_named

_GENERATE = '''"""Decodes by the policy of this folder: needs the package recycled-attention."""

from recycler.decode.custom_generate import folder_generate

generate = folder_generate()
'''


class Weights(StrEnum):
    """How files of the model come into the folder."""

    LINK = "link"
    COPY = "copy"


def main(
    policy: Annotated[Path, typer.Option(help="Policy file.")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    model: Annotated[
        str | None, typer.Option(help="Local folder of the model, or a Hugging Face id; default: that of the policy.")
    ] = None,
    weights: Annotated[Weights, typer.Option(help="Link to the model's files, or copy them.")] = Weights.LINK,
) -> dict[str, Any]:
    """Write a folder with which `from_pretrained(folder, trust_remote_code=True).generate(...)` recycles."""
    file = PolicyFile.read(policy)
    name = model or file.model.id
    source = _local_folder(name)
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(source)
        shape = model_shape(AutoModelForCausalLM.from_config(config), name)  # type: ignore[no-untyped-call]
    file.check_model(shape)
    if out.exists():
        raise ValueError(f"{out} is there already: choose another --out, or remove it.")
    out.parent.mkdir(parents=True, exist_ok=True)
    # A sibling, because a rename is atomic only inside one file system.
    with errors_named(out), tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.") as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        for path in sorted(source.iterdir()):
            if path.is_file() and path.name != POLICY_NAME:
                if weights is Weights.LINK:
                    (folder / path.name).symlink_to(path.resolve())
                else:
                    shutil.copyfile(path, folder / path.name)
        file.write(folder / POLICY_NAME)
        code = folder / "custom_generate"
        code.mkdir()
        (code / "generate.py").write_text(_GENERATE, encoding="utf-8")
        (code / "requirements.txt").write_text("recycled-attention\n", encoding="utf-8")
        folder.rename(out)
    return {"folder": str(out), "model": name, "policy": str(policy), "weights": weights.value}


def _local_folder(name: str) -> Path:
    if name == DEFAULT_MODEL_ID:
        return default_model_folder()
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"the model {name!r} is neither a local folder nor a Hugging Face id within reach.") from error


if __name__ == "__main__":
    run_command(main, version=written_by())
