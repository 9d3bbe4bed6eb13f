"""Decoding with a policy, recording of traces, and what policies do to a model in closed loop."""

from recycler.decode.custom_generate import custom_generate
from recycler.decode.explain import Explanation, explain
from recycler.decode.per_row import PerRow
from recycler.decode.receipt import Receipt
from recycler.decode.recycled import recycled
from recycler.decode.score import Scored, score, score_each
from recycler.decode.session import Session
from recycler.measure.closed_loop import ClosedLoop, ClosedLoopStore, run_closed_loop
from recycler.model.loading import LoadedModel, load_model
from recycler.model.shape import model_shape
from recycler.prompts import Prompt, default_prompts, prompts_from_files
from recycler.record.folder import record_prompts
from recycler.record.one_prompt import record_trace

__all__ = [
    "ClosedLoop",
    "ClosedLoopStore",
    "Explanation",
    "LoadedModel",
    "PerRow",
    "Prompt",
    "Receipt",
    "Scored",
    "Session",
    "custom_generate",
    "default_prompts",
    "explain",
    "load_model",
    "model_shape",
    "prompts_from_files",
    "record_prompts",
    "record_trace",
    "recycled",
    "run_closed_loop",
    "score",
    "score_each",
]

# For one version, paths of 0.1 such as recycler.engine are found in moved/, and warn.
__path__.append(f"{__path__[0]}/moved")
