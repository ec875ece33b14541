"""The bars: which figures each one compares, and its limit. Pure: results in, one line per bar out.

A bar's figure is the median of the ratios of the rounds. A bar with several conditions has several figures;
it is met if all are, short if one that was measured is not, and not-run if none is short and one was not
measured.
"""

from dataclasses import dataclass
from statistics import median

from bench.results import Key, Results
from bench.sizes import Sizes

NEEDS: dict[str, tuple[tuple[str, float], ...]] = {
    "B12": (("listed", 100_000),),
    "B13": (("scale", 1_000_000),),
    "B14": (("steady_s", 60),),
} | dict.fromkeys(("B1", "B2", "B3", "B4"), (("crowd_sessions", 10_000),))
"""Bar -> the sizes below which a run does not judge it; and none judges with fewer rounds than ROUNDS."""
ROUNDS = 5
CROWD = ("crowd 64", "throughput_per_s")


@dataclass(frozen=True)
class Condition:
    """One comparison: above over below (or above itself), and its limit."""

    what: str
    above: tuple[Key, ...]
    below: tuple[Key, ...]
    limit: float
    at_least: bool
    unit: str = "x"
    strict: bool = False

    def figures(self, results: Results) -> list[float]:
        """Its value in each round."""
        return results.ratios(self.above, self.below)

    def holds(self, value: float) -> bool:
        """Whether a value is on the right side of the limit."""
        if value == self.limit:
            return not self.strict
        return value > self.limit if self.at_least else value < self.limit

    @property
    def limit_text(self) -> str:
        """As in a bar's line."""
        sign = (">" if self.at_least else "<") + ("" if self.strict else "=")
        return f"{sign}{self.limit:g}{self.unit}"


@dataclass(frozen=True)
class Bar:
    """A bar, and what it says in words."""

    name: str
    what: str
    conditions: tuple[Condition, ...]


@dataclass(frozen=True)
class Verdict:
    """A bar's outcome."""

    bar: Bar
    figures: tuple[list[float], ...]
    large_enough: bool

    @property
    def outcome(self) -> str:
        """met, short or not-run."""
        if not self.large_enough:
            return "not-run"
        pairs = list(zip(self.bar.conditions, self.figures, strict=True))
        if any(values and not condition.holds(median(values)) for condition, values in pairs):
            return "short"
        return "met" if all(values for _, values in pairs) else "not-run"

    @property
    def line(self) -> str:
        """`bar ID FIGURE LIMIT met|short|not-run`."""
        shown = [
            f"{median(values):.3g}{condition.unit}" if values else "-"
            for condition, values in zip(self.bar.conditions, self.figures, strict=True)
        ]
        limits = [condition.limit_text for condition in self.bar.conditions]
        return f"bar {self.bar.name} {','.join(shown)} {','.join(limits)} {self.outcome}"


def judge(results: Results, sizes: Sizes) -> list[Verdict]:
    """Every bar, in order."""
    return [
        Verdict(
            bar,
            tuple(condition.figures(results) for condition in bar.conditions),
            all(
                getattr(sizes, size) >= least
                for size, least in (*NEEDS.get(bar.name, ()), ("rounds", ROUNDS))
            ),
        )
        for bar in BARS
    ]


def _crowd(ours: str, theirs: str, limit: float, callers: str = "crowd 64") -> Condition:
    above, below = (CROWD[0], ours, CROWD[1]), (callers, theirs, CROWD[1])
    return Condition(f"{ours} / {theirs}", (above,), (below,), limit, at_least=True)


def _p50(workload: str, system: str) -> Key:
    return workload, system, "p50_ms"


def _slower(what: str, above: tuple[Key, ...], below: tuple[Key, ...], limit: float) -> Condition:
    return Condition(what, above, below, limit, at_least=False)


def _faster(workload: str, theirs: str, ours: str, limit: float, *, strict: bool = False) -> Condition:
    above, below = (_p50(workload, theirs),), (_p50(workload, ours),)
    return Condition(f"{theirs} / {ours}", above, below, limit, at_least=True, strict=strict)


_OURS, _THREADS = "ours async", "ours threads"
_FLOOR = (_p50("alone", "bare stream exchange"), _p50("alone", "sqlite commit"))
_UNARY = (_p50("listing", "bare unary"),)

BARS = (
    Bar(
        "B1",
        "64 callers in 2 processes, async, against redis.asyncio with appendfsync always",
        (_crowd(_OURS, "redis.asyncio always", 1.8),),
    ),
    Bar("B2", "the same against psycopg 3, async", (_crowd(_OURS, "psycopg async", 2.5),)),
    Bar(
        "B3",
        "the same against sqlite3 WAL FULL with 8 callers in 2 processes",
        (_crowd(_OURS, "sqlite3", 4, "crowd 8"),),
    ),
    Bar(
        "B4",
        "64 callers in 2 processes, threads, against redis-py threads always and sqlite3",
        (_crowd(_THREADS, "redis-py always", 1.2), _crowd(_THREADS, "sqlite3", 1.7, "crowd 8")),
    ),
    Bar(
        "B5",
        "one caller, append p50, against a bare stream exchange with a SQLite commit, and psycopg 3",
        (
            _slower("ours / (bare stream exchange + sqlite commit)", (_p50("alone", "ours"),), _FLOOR, 1.3),
            _slower("ours / psycopg", (_p50("alone", "ours"),), (_p50("alone", "psycopg"),), 2),
        ),
    ),
    Bar(
        "B6",
        "a whole turn, one caller, against what a user would pick",
        tuple(
            _faster("turn", theirs, "ours async", 1, strict=True)
            for theirs in ("RedisSession", "SQLAlchemySession", "DatabaseSessionService")
        ),
    ),
    Bar(
        "B7",
        "10,000 messages, against a save of the whole file",
        (
            _faster("long", "whole-file save", "ours append", 50),
            _faster("long", "whole-file save", "ours save", 10),
        ),
    ),
    Bar(
        "B8",
        "append p50, a session of 100,000 messages against one of 10",
        (_slower("100,000 / 10", (_p50("length 100000", "ours"),), (_p50("length 10", "ours"),), 1.15),),
    ),
    Bar(
        "B9",
        "warm read of 500 messages, decoded, against a bare unary call and psycopg 3",
        (
            _slower(
                "ours / bare unary with as many bytes",
                (_p50("read 500", "ours"),),
                (_p50("read 500", "bare unary"),),
                1.5,
            ),
            _faster("read 500", "psycopg", "ours", 3),
        ),
    ),
    Bar(
        "B10",
        "near-cached get_or_create and messages; history(500) against the plain loop",
        (
            *(
                Condition(
                    f"{name}, messages", (("near", name, "mean_us"),), (), 20, at_least=False, unit="us"
                )
                for name in ("get_or_create", "catch_up")
            ),
            _slower(
                "history(500) / plain loop", (_p50("near", "history"),), (_p50("near", "plain loop"),), 1.5
            ),
        ),
    ),
    Bar(
        "B11",
        "the last 20 of a cold session of 10,000 messages against a warm read of 20",
        (_slower("cold / warm", (_p50("last 20", "cold"),), (_p50("last 20", "warm"),), 3),),
    ),
    Bar(
        "B12",
        "a page of 100 of 100,000 sessions by last update against a bare unary call",
        (_slower("page / bare unary", (_p50("listing", "ours"),), _UNARY, 3),),
    ),
    Bar(
        "B13",
        "1,000,000 sessions: start, memory, and list, open, append against 10,000 sessions",
        (
            Condition("start", (("scale", "large", "start_s"),), (), 5, at_least=False, unit="s"),
            Condition("resident", (("scale", "large", "resident_gib"),), (), 1, at_least=False, unit="GiB"),
            *(
                _slower(
                    f"{what}: large / small",
                    (_p50(f"scale {what}", "large"),),
                    (_p50(f"scale {what}", "small"),),
                    1.5,
                )
                for what in ("list", "open", "append")
            ),
        ),
    ),
    Bar(
        "B14",
        "steady state, 64 callers, checkpoints inside, against the short run of B1",
        (
            Condition(
                "steady / short",
                (("steady", "ours", CROWD[1]),),
                (("steady", "short run", CROWD[1]),),
                0.8,
                at_least=True,
            ),
            Condition(
                "longest stall beyond the disk's own flush",
                (("steady", "ours", "stall_ms"),),
                (),
                50,
                at_least=False,
                unit="ms",
            ),
        ),
    ),
)
