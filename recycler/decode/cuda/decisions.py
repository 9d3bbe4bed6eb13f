"""Who decides: the policy's program, inside a kernel, or the policy itself, on the host."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from policies import NotAProgram, PolicyProgram, StepPolicy, policy_program
from recycler.decode.cuda.program import DeviceProgram, kernel_code
from recycler.decode.host_decisions import HostDecisions
from recycler.decode.per_row import PerRow


@dataclass(frozen=True)
class RowPrograms:
    """Rows whose policies have one form.

    Attributes:
        program: One program for all of these rows, or one for each.
        rows: int32 `(n,)`: the rows.
        results: Instructions of which something is written down: the decision, then the reasons that are counted.
    """

    program: DeviceProgram
    rows: Tensor
    results: tuple[int, ...]


def row_programs(policy: StepPolicy, units: tuple[int, int], rows: int, device: torch.device) -> list[RowPrograms]:
    """The programs of all rows, by form: one for all, or one each under a `PerRow`.

    Reasons of rows with policies of their own have no common names, so they are not counted.

    Raises:
        NotAProgram: If there is a policy that has none.
    """
    if not isinstance(policy, PerRow):
        program = DeviceProgram([policy_program(policy)], units, device)
        all_rows = torch.arange(rows, dtype=torch.int32, device=device)
        return [RowPrograms(program, all_rows, (program.full, *program.reasons.values()))]
    forms: dict[object, list[tuple[int, PolicyProgram]]] = {}
    for row, one in enumerate(policy.rows):
        written = policy_program(one)
        forms.setdefault((kernel_code(written), written.full), []).append((row, written))
    found = []
    for same in forms.values():
        program = DeviceProgram([written for _, written in same], units, device)
        found.append(
            RowPrograms(
                program, torch.tensor([row for row, _ in same], dtype=torch.int32, device=device), (program.full,)
            )
        )
    return found


class DeviceHostDecisions:
    """A policy that no kernel can run: called on the host, layer by layer, which makes the GPU wait.

    If it reads nothing of the step's query, that happens before the step, which is then one launch as ever. If it does,
    it happens in the middle of every layer, and the step is no graph.

    Args:
        policy: The policy.
        why: What it does that kernels do not.

    Attributes:
        in_layers: Whether it reads the step's query.
        overruled: int64 `(layers, rows, kv_heads)` by reason: how often wrappers overruled it so far.
    """

    def __init__(self, policy: StepPolicy, why: NotAProgram) -> None:
        self._host = HostDecisions(policy)
        self.in_layers = self._host.in_layers
        self.overruled: dict[str, np.ndarray] = {}
        when = "in the middle of every layer" if self.in_layers else "between steps"
        warnings.warn(
            f"the policy {policy.kind} is called on the host {when}, and the GPU waits for it, because it is not made "
            f"of operators and comparisons on its signals alone ({why}).",
            stacklevel=2,
        )

    def decide(self, signals: Tensor, given: Tensor, layer: int | None = None) -> None:
        """Ask for a layer, or for all of them.

        Args:
            signals: float64 `(signals, layers, rows, kv_heads)`.
            given: int8 `(layers, rows, kv_heads)`: gets the decisions.
            layer: Its index; None for all.
        """
        layers = range(len(given)) if layer is None else range(layer, layer + 1)
        asked = slice(layers.start, layers.stop)
        on_host = signals[:, asked].cpu().numpy()
        full = np.zeros(given[asked].shape, dtype=np.int8)
        for i, index in enumerate(layers):
            full[i], reasons = self._host.decide(index, on_host[:, i])
            for reason, units in reasons.items():
                counts = self.overruled.setdefault(reason, np.zeros(given.shape, dtype=np.int64))
                counts[index] += units
        given[asked] = torch.from_numpy(full).to(given.device)
