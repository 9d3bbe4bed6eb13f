"""All rows of the table, in its order."""

from __future__ import annotations

from benchmarks.attack.disk_full_row import DiskFull
from benchmarks.attack.interrupts_row import Interrupts
from benchmarks.attack.kills_row import Kills
from benchmarks.attack.memory_row import Memory
from benchmarks.attack.not_numbers_row import NotNumbers
from benchmarks.attack.policies_row import Policies
from benchmarks.attack.row import Row
from benchmarks.attack.stores_row import Stores
from benchmarks.attack.threads_row import Threads
from benchmarks.attack.traces_row import Traces, TunedTraces
from benchmarks.attack.workers_row import Workers

ROWS: tuple[type[Row], ...] = (
    Policies,
    Traces,
    TunedTraces,
    Stores,
    Kills,
    DiskFull,
    Interrupts,
    Threads,
    NotNumbers,
    Memory,
    Workers,
)
