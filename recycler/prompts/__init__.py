"""Prompts with a known continuation, to record traces on and to measure fidelity with."""

from recycler.prompts.default_set import KINDS, default_prompts
from recycler.prompts.prompt import Prompt, prompts_from_files
from recycler.prompts.turning_kinds import TURNING_KINDS

__all__ = ["KINDS", "TURNING_KINDS", "Prompt", "default_prompts", "prompts_from_files"]
