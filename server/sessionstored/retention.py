"""When a session ends by itself: at its own expire_time, or else as the configuration says for its key.

Pure. A rule is a prefix of keys and an age: a session whose key begins with the prefix, and that has no
expire_time of its own, ends that long after its last change. Of several rules that fit, the one with the
longest prefix counts, also if it says "never".

Knows no clock, no session and no storage.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

NEVER = "never"
NEVER_US = -1
"""As a session's own expire_time: it never ends, whatever the rules say."""
TIME_US_MAX = 253_402_300_799_999_999
"""The last microsecond of the year 9999, which a Timestamp on the wire can still hold."""
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_AGE = re.compile(r"([0-9]{1,9})([smhdw])")


@dataclass(frozen=True, slots=True)
class Retention:
    """The rules in force."""

    rules: tuple[tuple[str, int], ...] = ()
    """(prefix, age in seconds; 0: never), the longest prefix first."""

    @classmethod
    def of(cls, ages_s: Mapping[str, int]) -> "Retention":
        """Rules by prefix."""
        return cls(tuple(sorted(ages_s.items(), key=lambda rule: (-len(rule[0]), rule[0]))))

    def ends_us(self, key: str, expire_time_us: int, update_time_us: int) -> int:
        """When a session ends, microseconds since the epoch; 0 if it never does.

        Args:
            key: the session's.
            expire_time_us: its own; 0 if it has none, NEVER_US if it is not to end.
            update_time_us: its last change.

        """
        if expire_time_us:
            return max(expire_time_us, 0)
        for prefix, age_s in self.rules:
            if key.startswith(prefix):
                return min(update_time_us + age_s * 1_000_000, TIME_US_MAX) if age_s else 0
        return 0


NO_RULES = Retention()


def parse_rules(texts: Iterable[str]) -> Retention:
    """Rules as they are configured: PREFIX=AGE, such as "tmp:=7d", "cron:=36h" or "tmp:keep:=never".

    Raises:
        ValueError: a rule is malformed, or a prefix has two.

    """
    ages_s: dict[str, int] = {}
    for text in texts:
        prefix, equals, age = text.rpartition("=")
        if not equals:
            raise ValueError(f"{text!r} is no rule: it is PREFIX=AGE, such as tmp:=7d")
        if prefix in ages_s:
            raise ValueError(f"the prefix {prefix!r} has two rules")
        ages_s[prefix] = 0 if age == NEVER else _age_s(age)
    return Retention.of(ages_s)


def _age_s(text: str) -> int:
    found = _AGE.fullmatch(text)
    if found is None or not int(found[1]):
        raise ValueError(f"{text!r} is no age: it is a number of s, m, h, d or w, such as 7d, or {NEVER!r}")
    return int(found[1]) * _UNITS_S[found[2]]
