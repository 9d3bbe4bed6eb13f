"""Commands on a disk that fills up."""

from __future__ import annotations

import random
import shutil
from functools import partial
from pathlib import Path
from typing import ClassVar

from benchmarks.attack.child import fork
from benchmarks.attack.full_disk import fail_writes_after, mount_small_disk, resize
from benchmarks.attack.guarded import MOST_CHARACTERS
from benchmarks.attack.row import Row
from benchmarks.attack.runs import COMMANDS, make_ready, pick, results, run, run_again, unfinished

_PAGE, _LARGE = 4096, 2**28


class DiskFull(Row):
    """A disk of a random size: a sentence that names a file, nothing half-written, and with space the same result."""

    name: ClassVar[str] = "disk full at a random write"
    n: ClassVar[int] = 100

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._model = make_ready(folder)
        self._whole, self._pages = {}, {}
        for command in COMMANDS:
            out = folder / command
            ended = fork(partial(run, command, self._model, out), folder / "log")
            if ended.code:
                raise RuntimeError(f"{command} ended with {ended.code}: {ended.last}")
            self._whole[command] = results(command, out)
            self._pages[command] = sum(-(-path.stat().st_size // _PAGE) for path in out.rglob("*") if path.is_file())

    def case(self, rng: random.Random) -> str | None:
        command, disk, log = pick(rng), self.folder / "disk", self.folder / "log"
        shutil.rmtree(disk, ignore_errors=True)
        disk.mkdir()
        # A folder takes a page too.
        pages = rng.randint(2, self._pages[command])
        ended = fork(partial(self._attack, command, disk, pages), log)
        return None if ended.code == 0 else f"{command} on a disk of {pages} pages: {ended.last}"

    def _attack(self, command: str, disk: Path, pages: int) -> None:
        """In a child, which sees the disk alone; raises what is found."""
        is_mounted = mount_small_disk(disk, pages * _PAGE)
        out, log = disk / "out", self.folder / "inner"

        def run_on_it() -> None:
            if not is_mounted:
                fail_writes_after(disk, pages * _PAGE)
            run(command, self._model, out)

        ended = fork(run_on_it, log)
        if ended.code not in (0, 2):
            raise RuntimeError(f"ended with {ended.code}: {ended.last}")
        told = len(ended.last) <= MOST_CHARACTERS and str(disk) in ended.last and " MB free)" in ended.last
        if ended.code == 2 and not told:
            raise RuntimeError(f"the refusal names no file or no space, or is long: {ended.last}")
        if wrong := unfinished(out):
            raise RuntimeError(f"{wrong[0]} is half a file")
        beside = [path.name for path in disk.iterdir() if path != out]
        if left := [path.name for path in out.rglob("*.partial")] + beside:
            raise RuntimeError(f"{left[0]} was left behind")
        if is_mounted:
            resize(disk, _LARGE)
        again = fork(partial(run_again, command, self._model, out), log)
        if again.code:
            raise RuntimeError(f"with space it ended with {again.code}: {again.last}")
        if results(command, out) != self._whole[command]:
            raise RuntimeError("with space it left something else than an uninterrupted run")
