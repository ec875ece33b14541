"""How much of everything a run does: full, quick (under three minutes) or tiny (shows that it works)."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Sizes:
    """The sizes of one run. A measure that is 0 is not taken."""

    name: str
    rounds: int
    crowd_sessions: int
    """Sessions of each crowd; every caller has its own share."""
    crowd_callers: tuple[int, ...]
    crowd_s: float
    """How long each load lasts in a round, after a warm-up."""
    warm_s: float
    alone: int
    """Calls of one caller in a round, of which the median is taken."""
    slow: int
    """The same for calls that take tens of milliseconds."""
    turns: int
    listed: int
    """Sessions of the store that is listed."""
    cold: int
    """Cold reads in a round, each of another session."""
    lengths: tuple[int, ...]
    """Session lengths for the cost against length."""
    watchers: int
    starts: int
    steady_s: float
    scale: int
    """Sessions of the large store."""


FULL = Sizes(
    name="full",
    rounds=5,
    crowd_sessions=10_000,
    crowd_callers=(1, 4, 16, 64),
    crowd_s=3.0,
    warm_s=0.5,
    alone=500,
    slow=12,
    turns=60,
    listed=100_000,
    cold=8,
    lengths=(10, 100, 1000, 10_000, 100_000),
    watchers=100,
    starts=3,
    steady_s=60.0,
    scale=1_000_000,
)
QUICK = replace(
    FULL,
    name="quick",
    crowd_callers=(1, 64),
    crowd_s=0.4,
    warm_s=0.1,
    alone=60,
    slow=2,
    turns=6,
    cold=3,
    lengths=(10, 10_000, 100_000),
    watchers=20,
    starts=1,
    steady_s=0.0,
    scale=0,
)
TINY = replace(
    FULL,
    name="tiny",
    rounds=2,
    crowd_sessions=64,
    crowd_callers=(1, 64),
    crowd_s=0.2,
    warm_s=0.1,
    alone=5,
    slow=1,
    turns=2,
    listed=200,
    cold=1,
    lengths=(10, 100),
    watchers=3,
    starts=1,
    steady_s=0.5,
    scale=200,
)
SIZES = {sizes.name: sizes for sizes in (FULL, QUICK, TINY)}
