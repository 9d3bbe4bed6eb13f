"""Studies that several processes share."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage

from tuning.search.shared_storage import shared_storage


def test_a_journal_is_shared_by_its_path(tmp_path: Path) -> None:
    url = f"journal:///{str(tmp_path).lstrip('/')}/study.log"
    first, second = shared_storage(url), shared_storage(url)
    assert isinstance(first, JournalStorage)
    study = optuna.create_study(study_name="one", storage=first)
    study.tell(study.ask(), 1.0)
    assert [trial.value for trial in optuna.load_study(study_name="one", storage=second).trials] == [1.0]
    assert (tmp_path / "study.log").exists()


def test_what_cannot_be_opened_is_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"the storage sqlite:///no/such/folder/x\.db of the study cannot be opened"):
        shared_storage("sqlite:///no/such/folder/x.db")
