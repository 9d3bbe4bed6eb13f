"""One sort of attack."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar


class Row(ABC):
    """A row of the table: cases that are drawn from a seed, each of which finds something or nothing.

    A row lives in a process of its own, which may fork children.

    Args:
        folder: An empty folder for whatever the cases write.

    Attributes:
        name: What is attacked how.
        n: Cases of a whole run.
    """

    name: ClassVar[str]
    n: ClassVar[int]

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def case(self, rng: random.Random) -> str | None:
        """Attack once; what was found, in a sentence, or None."""
