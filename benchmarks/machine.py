"""What a measurement ran on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def machine_name(device: torch.device | None = None) -> str:
    """The GPU of a device; else cores and processor, as far as the system tells."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_name(device)
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


def not_measured(device: str | None) -> dict[str, str | bool] | None:
    """All that a benchmark says where the GPU that it is asked to measure is not there; None if it is."""
    if device is None or not device.startswith("cuda") or torch.cuda.is_available():
        return None
    print(f"not measured: torch sees no GPU on this machine ({machine_name()}).")
    return {"device": device, "measured": False, "why": "torch sees no GPU on this machine"}
