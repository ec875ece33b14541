"""When a session is to end: what callers say, as a moment. Only here the SDK reads the wall clock."""

from datetime import UTC, datetime, timedelta
from typing import overload

from sessionstore import _operations as ops
from sessionstore._types import KEEP, Expires, Keep


@overload
def moment(name: str, expires: Expires) -> datetime | None: ...


@overload
def moment(name: str, expires: Keep | Expires) -> datetime | Keep | None: ...


def moment(name: str, expires: Keep | Expires) -> datetime | Keep | None:
    """A moment, for an argument that may be one, or a time from now on. Raises InvalidArgumentError."""
    if not isinstance(expires, timedelta):
        return expires if expires is KEEP else _checked(name, expires)
    try:
        return datetime.now(UTC) + expires
    except OverflowError:
        raise ops.invalid(name, f"must be within the years 1 to 9999 of UTC, not {expires!r}") from None


def over(end: datetime | None) -> bool:
    """Whether a session of this `expire_time` is at its end, by the clock of this machine."""
    return end is not None and datetime.now(UTC) >= end


def _checked(name: str, expires: datetime | None) -> datetime | None:
    if expires is None or isinstance(expires, datetime):
        return expires
    raise ops.invalid(name, f"must be a datetime with a timezone, a timedelta or None, not {expires!r}")
