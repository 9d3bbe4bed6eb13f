"""Versions of the packages that shape the numbers."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from policies.version import PROJECT, project_version


def versions() -> dict[str, str]:
    """Versions of the packages that shape the numbers."""

    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    return {PROJECT: project_version()} | {package: of(package) for package in ("torch", "transformers")}
