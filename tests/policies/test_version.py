from __future__ import annotations

from importlib import metadata

import pytest

from policies import project_version, written_by


def test_the_version_is_that_of_the_installed_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", {"recycled-attention": "1.2.3"}.__getitem__)
    assert project_version() == "1.2.3"
    assert written_by() == "recycled-attention 1.2.3"


def test_a_checkout_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert project_version() == "unknown (not installed)"
    assert written_by() == "recycled-attention unknown (not installed)"
