"""The rules that say when sessions end by themselves."""

import pytest
from sessionstored.retention import NEVER_US, NO_RULES, TIME_US_MAX, Retention, parse_rules

DAY_S = 86_400


def test_rules_are_read_as_they_are_written():
    assert parse_rules([]) == NO_RULES
    read = parse_rules(["tmp:=7d", "tmp:keep:=never", "=52w", "a=b:=90s", "c:=15m", "d:=36h"])
    assert dict(read.rules) == {
        "tmp:": 7 * DAY_S, "tmp:keep:": 0, "": 364 * DAY_S, "a=b:": 90, "c:": 900, "d:": 36 * 3600,
    }  # fmt: skip


@pytest.mark.parametrize(
    "text", ["tmp:", "tmp:=", "tmp:=7", "tmp:=d", "tmp:=0d", "tmp:=-1d", "tmp:=1.5d", "t=7 d"]
)
def test_what_is_no_rule_is_named(text: str):
    with pytest.raises(ValueError, match=r"is no rule|is no age"):
        parse_rules([text])


def test_a_prefix_has_one_rule():
    with pytest.raises(ValueError, match="has two rules"):
        parse_rules(["tmp:=7d", "tmp:=8d"])


def test_the_longest_prefix_counts_and_an_own_time_before_it():
    rules = Retention.of({"": 50, "tmp:": 10, "tmp:keep:": 0})
    assert rules.ends_us("tmp:1", 0, 1_000_000) == 11_000_000
    assert rules.ends_us("tmp:keep:1", 0, 1_000_000) == 0
    assert rules.ends_us("other", 0, 1_000_000) == 51_000_000
    assert rules.ends_us("tmp:1", 77, 1_000_000) == 77
    assert rules.ends_us("tmp:1", NEVER_US, 1_000_000) == 0
    assert NO_RULES.ends_us("tmp:1", 0, 1_000_000) == 0
    assert Retention.of({"x": 1}).ends_us("tmp:1", 0, 1_000_000) == 0


def test_an_end_is_a_time_that_the_wire_can_hold():
    assert Retention.of({"": 10}).ends_us("k", 0, TIME_US_MAX - 5) == TIME_US_MAX
