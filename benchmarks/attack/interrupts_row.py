"""Ctrl-C anywhere: entering `with recycled(...)`, inside, and leaving it."""

from __future__ import annotations

import opcode
import random
import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import torch
from transformers import AttentionInterface, AttentionMaskInterface

import recycler
from benchmarks.attack.row import Row
from benchmarks.attack.tiny import tiny_model
from policies import FixedStride, Selection
from recycler.decode.recycled import recycled
from recycler.model.attention_hook import owner_here

_NOTHING = opcode.opmap["NOP"]
_OURS = str(Path(recycler.__file__).parent)
_CONTEXT = str(Path(sys.modules["contextlib"].__file__ or ""))


class Interrupt:
    """Raises KeyboardInterrupt at the n-th place where one may come; counts such places if n is 0.

    Args:
        n: Which place.
        ours: Whether places in this project and of `contextlib` alone count.
    """

    def __init__(self, n: int, ours: bool) -> None:
        self.n, self.ours, self.count, self.where = n, ours, 0, ""

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        """A trace function."""
        if event == "call":
            name = frame.f_code.co_filename
            if self.ours and not name.startswith(_OURS) and name != _CONTEXT:
                return None
        # Python looks for signals when a function begins and when one has ended. Before a line that does nothing, such
        # as `try:`, it never does, and no program could guard against it.
        if event in ("call", "return") or (event == "line" and frame.f_code.co_code[frame.f_lasti] != _NOTHING):
            self.count += 1
            if self.count == self.n:
                sys.settrace(None)
                self.where = (
                    f"the {event} of {frame.f_code.co_name}, {Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                )
                raise KeyboardInterrupt
        return self


class Interrupts(Row):
    """The model is as it was: its functions, its configuration, the tokens that it writes, recycled and not."""

    name: ClassVar[str] = "interrupts while entering, inside, leaving"
    n: ClassVar[int] = 5_000

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._model = tiny_model()
        self._prompt = torch.randint(1, 200, (1, 50), generator=torch.Generator().manual_seed(1))
        self._stock, self._recycled = self._generate(), {fast: self._run(fast) for fast in (True, False)}
        self._before = self._state()
        self._n_lines: dict[tuple[bool, bool], int] = {}

    def case(self, rng: random.Random) -> str | None:
        # Most lines are those of transformers, and most of what can go wrong is in ours.
        fast, ours = rng.random() < 0.5, rng.random() < 0.8
        if (fast, ours) not in self._n_lines:
            self._n_lines[fast, ours] = self._interrupted(Interrupt(0, ours), fast).count
        lines = self._n_lines[fast, ours]
        # A third near each end, where the model is changed.
        n = rng.choice(
            (rng.randint(1, lines), rng.randint(1, min(lines, 400)), rng.randint(max(1, lines - 150), lines))
        )
        interrupt = self._interrupted(Interrupt(n, ours), fast)
        wrong = self._wrong()
        if wrong:
            self._model = tiny_model()
            self._before = self._state()
        return wrong and f"{wrong} after an interrupt at {interrupt.where} ({n} of {lines}, fast={fast})"

    def _interrupted(self, interrupt: Interrupt, fast: bool) -> Interrupt:
        try:
            sys.settrace(interrupt)
            self._run(fast)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        return interrupt

    def _run(self, fast: bool) -> list[int]:
        with recycled(self._model, FixedStride(3), Selection(40), fast=fast):
            return self._generate()

    def _generate(self) -> list[int]:
        written: list[int] = self._model.generate(self._prompt, max_new_tokens=5, do_sample=False)[0].tolist()  # type: ignore[operator]
        return written

    def _state(self) -> dict[str, Any]:
        return {
            "its own attributes": sorted(name for name in vars(self._model) if name != "_hf_hook"),
            "its forward": vars(self._model).get("forward"),
            "its attention": self._model.config._attn_implementation,
            "registered attention": sorted(AttentionInterface._global_mapping),
            "registered masks": sorted(AttentionMaskInterface._global_mapping),
            "its owner": owner_here(self._model),
            "threads": torch.get_num_threads(),
        }

    def _wrong(self) -> str | None:
        found = self._state()
        for name, before in self._before.items():
            if found[name] != before:
                return f"{name} changed"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self._generate() != self._stock:
                return "other tokens than stock"
            for fast, tokens in self._recycled.items():
                try:
                    if self._run(fast) != tokens:
                        return f"other tokens recycled (fast={fast})"
                except (ValueError, RuntimeError) as error:
                    return f"{type(error).__name__} {error}"
        return None
