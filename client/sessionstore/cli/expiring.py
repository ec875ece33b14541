"""When a session is to end, as a person writes it. Pure.

An age from now (`90s`, `15m`, `36h`, `7d`, `2w`), an ISO 8601 time (one without offset is local), or `never`.
"""

import re
from datetime import datetime, timedelta

_AGE = re.compile(r"([0-9]{1,9})([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def parse(text: str) -> datetime | timedelta | None:
    """The end that a text says; None for `never`. Raises ValueError with what is wrong."""
    if text == "never":
        return None
    age = _AGE.fullmatch(text)
    try:
        if age is not None:
            return timedelta(**{_UNITS[age[2]]: int(age[1])})
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError, OSError):
        raise ValueError(f"{text!r} is neither an age such as 7d, nor an ISO time, nor never") from None
