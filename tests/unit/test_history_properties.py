"""History windows over many generated conversations: legal, deterministic, and what they always were.

`make test` tries some hundreds of conversations, `make test-all` ten thousand.
"""

import copy
import json
from collections import Counter

import pytest
from conversations import Message, conversations, seed_window, sessions
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from legal import complaint
from sessionstore import history as module
from sessionstore.history import Entry, history, is_user_turn, window_start

SAMPLE = [300, pytest.param(10_000, marks=pytest.mark.slow)]
KEEPS = st.sampled_from([(), (), ("reasoning_content",), ("timestamp", "role", "reasoning_content")])
CONSOLIDATED = st.just(0) | st.integers(0, 3) | st.integers(0, 14)


def searched(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def length(entry: Entry) -> int:
    return len(json.dumps(entry))


def as_bytes(messages: list[Message]) -> bytes:
    return json.dumps(messages).encode()


@pytest.mark.parametrize("examples", SAMPLE)
def test_any_list_of_messages_gives_a_legal_window(examples: int) -> None:
    seen: Counter[str] = Counter()

    @searched(examples)
    @given(sessions, CONSOLIDATED, st.integers(0, 14), KEEPS, st.none() | st.integers(1, 600))
    def holds(messages: list[Message], consolidated: int, size: int, keep: tuple[str, ...],
              budget: int | None) -> None:  # fmt: skip
        count = None if budget is None else length
        stored = as_bytes(messages)
        window = history(messages, last_consolidated=consolidated, max_messages=size, keep=keep,
                         max_tokens=budget, count_tokens=count)  # fmt: skip
        assert complaint(window, keep) is None
        assert as_bytes(messages) == stored
        again = history(copy.deepcopy(messages), last_consolidated=consolidated, max_messages=size, keep=keep,
                        max_tokens=budget, count_tokens=count)  # fmt: skip
        assert as_bytes(again) == as_bytes(window)
        settled = history(window, max_messages=0, keep=keep, max_tokens=budget, count_tokens=count)
        assert as_bytes(settled) == as_bytes(window)
        turns = [entry for entry in window if is_user_turn(entry)]
        if any(is_user_turn(message) for message in messages[consolidated:]):
            assert window[0] is turns[0]
        if budget is not None and sum(map(length, window)) > budget:
            seen["over the budget"] += 1
            # Then it is the last turn; without any, one message of a speaker and the results of its calls.
            assert len(turns or [entry for entry in window if entry["role"] not in ("tool", "user")]) == 1
        seen["windows"] += 1
        seen["not empty"] += bool(window)
        seen["mended"] += len(module._in_order(messages, keep)) < len(messages)

    holds()
    print(dict(seen))
    assert seen["windows"] >= examples
    assert min(seen["not empty"], seen["mended"], seen["over the budget"]) > examples // 100


@pytest.mark.parametrize("examples", SAMPLE)
def test_both_ways_through_the_rules_lead_to_one_window(examples: int) -> None:
    seen: Counter[str] = Counter()

    @searched(examples)
    @given(sessions | conversations(), KEEPS)
    def holds(messages: list[Message], keep: tuple[str, ...]) -> None:
        names = module.kept(keep)
        quick = module._in_order(messages, names)
        seen["in order" if len(quick) == len(messages) else "partly" if quick else "not"] += 1
        begin = window_start(messages, max_messages=0)
        with_role = [message for message in messages[begin:] if isinstance(message.get("role"), str)]
        both = history(messages, max_messages=0, keep=keep)
        assert as_bytes(both) == as_bytes(module._mended(with_role, names))

    holds()
    print(dict(seen))
    assert min(seen["in order"], seen["partly"], seen["not"]) > examples // 50


@pytest.mark.parametrize("examples", SAMPLE)
def test_a_well_formed_session_gives_what_it_always_gave(
    examples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever that begins with a user's words; and it is found the quick way, without mending anything."""
    seen: Counter[str] = Counter()

    def mended(*_: object) -> list[Entry]:
        seen["mended"] += 1
        return []

    @searched(examples)
    @given(conversations(), st.data())
    def holds(messages: list[Message], data: st.DataObject) -> None:
        consolidated = data.draw(st.just(0) | st.integers(0, len(messages) + 1))
        size = data.draw(st.just(500) | st.integers(1, len(messages) + 1))
        expected = seed_window(messages, consolidated, size)
        cut = bool(expected) and not (is_user_turn(expected[0]) and complaint(expected) is None)
        seen["cut within a turn" if cut else "equal"] += 1
        assert not (cut and consolidated == 0 and size >= len(messages))
        if cut:
            window = history(messages, last_consolidated=consolidated, max_messages=size)
            assert complaint(window) is None
            return
        with monkeypatch.context() as patch:
            patch.setattr(module, "_mended", mended)
            window = history(messages, last_consolidated=consolidated, max_messages=size)
        assert as_bytes(window) == as_bytes(expected)

    holds()
    print(dict(seen))
    assert seen["mended"] == 0
    assert seen["equal"] > examples // 2
    assert seen["cut within a turn"] > examples // 50
