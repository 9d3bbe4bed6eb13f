from __future__ import annotations

import pytest

from recycler.model.versions import versions


def test_the_project_is_named_first_by_its_one_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recycler.model.versions.project_version", lambda: "1.2.3")
    assert list(versions()) == ["recycled-attention", "torch", "transformers"]
    assert versions()["recycled-attention"] == "1.2.3"
    assert versions()["torch"][:1].isdigit()
