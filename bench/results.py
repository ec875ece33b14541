"""What was measured: for each (workload, system, measure) one value per round, for ratios within a round.

Pure: no I/O, no clock.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

Key = tuple[str, str, str]
"""(workload, system, measure). A measure's name ends with its unit."""


@dataclass
class Results:
    """The values of a run, and what was not run and why."""

    values: dict[Key, dict[int, float]] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)
    """System or workload -> why."""
    notes: list[str] = field(default_factory=list)

    def add(self, key: Key, round_number: int, value: float) -> None:
        """Note a value of a round."""
        self.values.setdefault(key, {})[round_number] = value

    def series(self, key: Key) -> list[float]:
        """The values of all rounds."""
        return list(self.values.get(key, {}).values())

    def median(self, key: Key) -> float | None:
        """The median of the rounds; None if there is none."""
        found = self.series(key)
        return median(found) if found else None

    def ratios(self, above: Sequence[Key], below: Sequence[Key]) -> list[float]:
        """Per round: the sum of `above` over the sum of `below` (1 if there is none), where all are known."""
        everything = [*above, *below]
        if any(key not in self.values for key in everything):
            return []
        rounds = set.intersection(*(set(self.values[key]) for key in everything))
        total = {n: sum(self.values[key][n] for key in below) if below else 1.0 for n in rounds}
        return [sum(self.values[key][n] for key in above) / total[n] for n in sorted(rounds) if total[n]]
