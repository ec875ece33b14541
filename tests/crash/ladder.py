"""The fault ladder: every fault that the store is put through, from cheap to real.

`make torture` runs each at full size; `make test` runs a sample of each (test_ladder.py).
"""

from crash import (
    clock_jumps,
    every_byte,
    every_failure,
    ext4,
    failing_calls,
    floods,
    full_disks,
    hammer,
    kills,
    large_directory,
    lost_writes,
    one_slow_thing,
    power_cuts,
    zeroed_pages,
)
from crash.phases import AIMED_AT
from crash.tally import Rung

RUNGS = (
    Rung("kill -9 under four writing processes", kills.run, full=200, sample=4, phases_min=AIMED_AT),
    Rung("kill -9, durability os", kills.run_at_os, full=20, sample=2),
    Rung("kill -9 under sixteen processes with leases", hammer.run, full=8, sample=1),
    Rung(
        "power cut",
        power_cuts.run,
        full=200,
        sample=3,
        phases_min=AIMED_AT,
        unavailable=ext4.unavailable,
    ),
    Rung(
        "power cut after EIO, stop, restart",
        power_cuts.run_after_failure,
        full=40,
        sample=3,
        unavailable=ext4.unavailable,
    ),
    Rung(
        "power cut, flushes switched off",
        power_cuts.run_without_flushes,
        full=10,
        sample=10,
        times_min=1,
        must_lose=True,
        unavailable=ext4.unavailable,
    ),
    Rung("a disk that fills", full_disks.run, full=24, sample=4, unavailable=full_disks.unavailable),
    Rung("EIO of a system call", failing_calls.run, full=40, sample=4, unavailable=failing_calls.unavailable),
    Rung("clocks that jump", clock_jumps.run, full=20, sample=3, times_min=100),
    Rung("one slow thing", one_slow_thing.run, full=one_slow_thing.FILES_FULL, sample=50),
    Rung("recovery of a large directory", large_directory.run, full=100_000, sample=2_000),
    Rung("unflushed writes lost, torn, reordered", lost_writes.run, full=1000, sample=15),
    Rung("the same, flushes ignored", lost_writes.run_on_a_lying_disk, full=40, sample=8, must_lose=True),
    Rung("every n-th step fails", every_failure.run, full=1 << 20, sample=40, times_min=1200),
    Rung("every byte cut and flipped", every_byte.run, full=1 << 20, sample=44, times_min=130_000),
    Rung("the same, checksums off", every_byte.run_unchecked, full=400, sample=40, must_lose=True),
    Rung("every page zeroed", zeroed_pages.run, full=1 << 20, sample=40, times_min=180),
    Rung(
        "the same, row checksums off",
        zeroed_pages.run_unchecked,
        full=1 << 20,
        sample=1 << 20,
        times_min=1,
        must_lose=True,
    ),
    Rung("floods in limited memory", floods.run, full=40, sample=4),
)
