"""What one rung of the fault ladder tried, and what came of it. A rung is a function that returns a Tally.

The loss columns are `lost`, `duplicated`, `torn` and `wrong`: each must be 0. Acknowledged and unknown count
single messages; what is unknown may be stored or not, and is never held against the store.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

LOSSES = ("lost", "duplicated", "torn", "wrong")
_DETAILS_MAX = 50


@dataclass
class Tally:
    """Counts of one rung."""

    times: int = 0
    """How often the fault was made to happen."""
    acknowledged: int = 0
    unknown: int = 0
    lost: int = 0
    """Acknowledged, and not there."""
    duplicated: int = 0
    """There twice."""
    torn: int = 0
    """Batches of which a part is there, or that are not in one piece."""
    wrong: int = 0
    """Served although it is not what was written: out of order, invented, stale, empty, another's."""
    phases: Counter[str] = field(default_factory=Counter)
    """What was hit, where the rung knows: commit, append, flush, rename, catalogue and so on."""
    notes: list[str] = field(default_factory=list)
    """Figures to print: times, bytes, what was damaged and named."""
    details: list[str] = field(default_factory=list)
    """The first losses, in words."""

    @property
    def losses(self) -> int:
        """The sum of the loss columns."""
        return sum(getattr(self, name) for name in LOSSES)

    def lose(self, column: str, detail: str, count: int = 1) -> None:
        """Count a loss, and remember its first instances."""
        assert column in LOSSES, column
        setattr(self, column, getattr(self, column) + count)
        if len(self.details) < _DETAILS_MAX:
            self.details.append(f"{column}: {detail}")

    def add(self, other: "Tally") -> None:
        """Take in what another part of the same rung counted."""
        for name in ("times", "acknowledged", "unknown", *LOSSES):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.phases += other.phases
        self.notes += other.notes
        self.details += other.details


@dataclass(frozen=True)
class Rung:
    """One fault of the ladder."""

    fault: str
    run: Callable[[Path, int, int], Tally]
    """Gets an empty directory, a seed, and how many times; returns what came of it."""
    full: int
    """How many times `make torture` asks for."""
    sample: int
    """How many times `make test` asks for."""
    times_min: int = 0
    """How many times a full run must have happened at the least; 0: as many as asked for."""
    phases_min: tuple[str, ...] = ()
    """Phases that a full run must have hit at least 10 times each."""
    must_lose: bool = False
    """A safeguard is switched off: a run that loses nothing shows that the rung cannot fail."""
    unavailable: Callable[[], str] = lambda: ""
    """Why this machine cannot run it; empty if it can."""
