"""Decoding with a policy, recording of traces, and what policies do to a model in closed loop."""

from recycler.closed_loop import ClosedLoop, run_closed_loop
from recycler.closed_loop_store import ClosedLoopStore
from recycler.model_shape import model_shape
from recycler.models import LoadedModel, load_model
from recycler.per_row import PerRow
from recycler.prompts import Prompt, default_prompts, prompts_from_files
from recycler.receipt import Receipt
from recycler.recorder import record_trace
from recycler.recording import record_prompts
from recycler.session import Session, recycled

__all__ = [
    "ClosedLoop",
    "ClosedLoopStore",
    "LoadedModel",
    "PerRow",
    "Prompt",
    "Receipt",
    "Session",
    "default_prompts",
    "load_model",
    "model_shape",
    "prompts_from_files",
    "record_prompts",
    "record_trace",
    "recycled",
    "run_closed_loop",
]
