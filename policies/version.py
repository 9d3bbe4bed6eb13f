"""Which version of this project runs: what it writes says so."""

from __future__ import annotations

from importlib import metadata

PROJECT = "recycled-attention"


def project_version() -> str:
    """The installed version, or "unknown (not installed)" where a checkout is on the path and nothing more."""
    try:
        return metadata.version(PROJECT)
    except metadata.PackageNotFoundError:
        return "unknown (not installed)"


def written_by() -> str:
    """The project and its version, for files, receipts and `--version`."""
    return f"{PROJECT} {project_version()}"
