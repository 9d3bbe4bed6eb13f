"""A study that several processes share."""

from __future__ import annotations

import time
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, RDBStorage
from sqlalchemy.exc import SQLAlchemyError

from tuning.search.study_file import study_storage

_JOURNAL = "journal:///"

# Tables are made by whoever comes first; all others find them half made.
_TRIES = 20
_SECONDS_BETWEEN = 0.25
# Another process may be writing, or was killed while it was.
_SECONDS_LOCKED = 60


def shared_storage(url: str) -> BaseStorage:
    """Open the storage behind a URL, and make its tables if nobody else does.

    Args:
        url: As Optuna takes them, or `journal:///path` for a file of Optuna's journal, which may lie on a network file
            system.

    Raises:
        ValueError: If it cannot be opened.
    """
    if url.startswith(_JOURNAL):
        return study_storage(Path("/", url.removeprefix(_JOURNAL)))
    for tries_left in reversed(range(_TRIES)):
        try:
            if url.startswith("sqlite"):
                return RDBStorage(url, engine_kwargs={"connect_args": {"timeout": _SECONDS_LOCKED}})
            return optuna.storages.get_storage(url)
        except SQLAlchemyError as error:
            if not tries_left:
                first = str(error).splitlines()[0]
                raise ValueError(f"the storage {url} of the study cannot be opened: {first}.") from error
            time.sleep(_SECONDS_BETWEEN)
    raise AssertionError("unreachable")
