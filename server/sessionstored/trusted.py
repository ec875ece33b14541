"""The clock that sessions expire by: the wall clock, unless that jumped forward and nobody confirmed it yet.

A wall clock that is suddenly far ahead of the steady one is not believed: until it was ahead for an hour of
service, time goes on from the last trusted moment at the pace of the steady clock. So a wrong clock at a
start, or a wrong answer of a time server, does not end every session. A clock that goes back is followed at
once: what expires by it expires late, never early. Small steps forward are believed at once, but never add up
to more than the bound within the time of confirmation.

`TrustedClock.now_us` is never ahead of the wall clock. Over restarts on the same boot of the machine the
steady clock goes on; after another boot, or on another machine, nobody knows how long the daemon was away:
then trusted time goes on from the last moment that was stored.

It reads the clocks that it is given, and does nothing else but log when it begins and ends to disbelieve.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Ahead:
    """A wall clock that went ahead of the confirmed line: by how much it always was since then."""

    offset_us: int
    since_us: int
    """On the steady clock."""


@dataclass(frozen=True, slots=True)
class Disbelief:
    """The wall clock is not believed."""

    trusted_us: int
    """What sessions expire by instead, microseconds since the epoch."""
    ahead_us: int
    """How far the wall clock is ahead of that."""
    confirmed_in_us: int
    """After how much more service it is believed, if it stays."""


class TrustedClock:
    """A wall clock, less what it jumped ahead. Thread-safe.

    Offsets are wall time less steady time: they only change when one of the two jumps.
    """

    def __init__(
        self,
        wall_us: Callable[[], int],
        steady_us: Callable[[], int],
        *,
        jump_us_max: int,
        confirm_us: int,
        boot_id: str = "",
    ) -> None:
        """Begin with the wall clock as it is.

        Args:
            wall_us: microseconds since the epoch; it may jump.
            steady_us: microseconds of a clock that never jumps; it begins anew with each boot.
            jump_us_max: how far the wall clock may step ahead and be believed at once.
            confirm_us: after how much service a larger step is believed.
            boot_id: which boot of which machine the steady clock belongs to; "" if that is not known.

        """
        self._wall_us, self._steady_us = wall_us, steady_us
        self._jump_us_max, self._confirm_us = jump_us_max, confirm_us
        self._boot_id = boot_id
        self._lock = threading.Lock()
        self._line_us = wall_us() - steady_us()
        """The confirmed offset."""
        self._offset_us = self._line_us
        """The trusted offset: at the most `jump_us_max` above the confirmed one."""
        self._ahead: _Ahead | None = None
        self._told = False

    def now_us(self) -> int:
        """The time that sessions expire by, microseconds since the epoch."""
        with self._lock:
            return self._look()[0]

    def disbelief(self) -> Disbelief | None:
        """What is known of a wall clock that is not believed; None if it is."""
        with self._lock:
            trusted_us, wall_us, steady_us = self._look()
            if self._ahead is None or not self._told:
                return None
            left_us = self._ahead.since_us + self._confirm_us - steady_us
            return Disbelief(trusted_us, wall_us - trusted_us, max(0, left_us))

    def _look(self) -> tuple[int, int, int]:
        """(trusted, wall, steady) time, now. Hold the lock."""
        steady_us, wall_us = self._steady_us(), self._wall_us()
        offset_us = wall_us - steady_us
        if offset_us <= self._line_us:
            self._line_us, self._ahead = offset_us, None
        else:
            self._step_ahead(offset_us, steady_us)
        if offset_us - self._line_us <= self._jump_us_max:
            self._offset_us = offset_us
        self._tell(wall_us - steady_us - self._offset_us)
        return steady_us + self._offset_us, wall_us, steady_us

    def _step_ahead(self, offset_us: int, steady_us: int) -> None:
        ahead = self._ahead
        if ahead is None or offset_us > ahead.offset_us + self._jump_us_max:
            ahead = self._ahead = _Ahead(offset_us, steady_us)
        ahead.offset_us = min(ahead.offset_us, offset_us)
        if steady_us - ahead.since_us >= self._confirm_us:
            self._line_us, self._ahead = ahead.offset_us, None

    def _tell(self, ahead_us: int) -> None:
        if ahead_us and not self._told:
            log.warning(
                "the clock is %.0f s ahead of the time that went by: sessions expire as if it were not, "
                "until it stayed so for %.0f s of service",
                ahead_us / 1e6,
                self._confirm_us / 1e6,
            )
        elif self._told and not ahead_us:
            log.warning("the clock is believed again: sessions expire by it")
        self._told = bool(ahead_us)

    # Over restarts.

    def stored(self) -> list[object]:
        """What `resume` needs after a restart."""
        with self._lock:
            trusted_us, _, steady_us = self._look()
            ahead = self._ahead
            waited = [ahead.offset_us, steady_us - ahead.since_us] if ahead else []
            return [self._boot_id, steady_us, trusted_us, self._line_us, self._offset_us, waited]

    def resume(self, stored: list[object]) -> None:
        """Go on from what was stored."""
        match stored:
            case [
                str() as boot_id,
                int() as then_us,
                int() as trusted_us,
                int() as line_us,
                int() as offset_us,
                list() as waited,
            ]:
                with self._lock:
                    steady_us = self._steady_us()
                    if not boot_id or boot_id != self._boot_id or steady_us < then_us:
                        return self._go_on_from(trusted_us, steady_us)
                    self._line_us, self._offset_us = line_us, offset_us
                    if waited:
                        self._ahead = _Ahead(waited[0], steady_us - waited[1])
                return None
        raise ValueError(f"no state of a clock: {stored!r}")

    def begin_at(self, trusted_us: int) -> None:
        """Go on from a moment that has certainly passed."""
        with self._lock:
            self._go_on_from(trusted_us, self._steady_us())

    def _go_on_from(self, trusted_us: int, steady_us: int) -> None:
        self._line_us = self._offset_us = trusted_us - steady_us
        self._ahead = None
