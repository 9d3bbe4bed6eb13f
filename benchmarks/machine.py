"""What a measurement ran on."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def machine_name() -> str:
    """Cores and processor, as far as the system tells."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        family = next(line.split(":")[1].strip() for line in lines if line.startswith("cpu family"))
        number = next(line.split(":")[1].strip() for line in lines if line.startswith("model\t"))
        name += f" (family {family}, model {number})"
    except (OSError, StopIteration):
        pass
    return f"{os.cpu_count()} x {name}"
