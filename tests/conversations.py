"""Conversations for tests of history windows: as they should be, damaged, and made of anything.

Messages are dicts as a session stores them. `seed_window` is what the in-process session manager gave,
written anew from its behaviour.
"""

import copy
from typing import Any

from hypothesis import strategies as st

Message = dict[str, Any]

# ------------------------------------------------------------------------------------------------ shorthand


def user(content: object = "hi") -> Message:
    return {"role": "user", "content": content}


def says(content: object = "ok") -> Message:
    return {"role": "assistant", "content": content}


def calls(*ids: str, content: object = None) -> Message:
    functions = [{"id": i, "type": "function", "function": {"name": "f", "arguments": "{}"}} for i in ids]
    return {"role": "assistant", "content": content, "tool_calls": functions}


def result(call_id: str) -> Message:
    return {"role": "tool", "content": f"r{call_id}", "tool_call_id": call_id, "name": "f"}


def words(text: str = "so") -> Message:
    return {"type": "text", "text": text}


def uses(*ids: str, before: tuple[Message, ...] = ()) -> Message:
    return says([*before, *({"type": "tool_use", "id": i, "name": "f", "input": {}} for i in ids)])


def answer(call_id: str) -> Message:
    return {"type": "tool_result", "tool_use_id": call_id, "content": [words(f"r{call_id}")]}


# -------------------------------------------------------------------------------------------- as it should be


def seed_window(messages: list[Message], last_consolidated: int, max_messages: int) -> list[Message]:
    """The last messages, from the first user's on, cut to the fields that models know."""
    tail = messages[last_consolidated:][-max_messages:]
    users = [index for index, message in enumerate(tail) if message["role"] == "user"]
    fields = ("role", "content", "tool_calls", "tool_call_id", "name")
    return [{name: m[name] for name in fields if name in m} for m in tail[min(users, default=0) :]]


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """A user's words, rounds of calls with all their results, an assistant's last word; ids may be reused.

    In one dialect, or each turn in its own; parallel results in any order, in one message or in several.
    """
    mixed, anthropic, reuse = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    messages: list[Message] = []
    number = 0
    for _ in range(draw(st.integers(0, 5))):
        anthropic = draw(st.booleans()) if mixed else anthropic
        messages.append(user(draw(st.sampled_from(["hi", "", [words()]]))))
        for count in draw(st.lists(st.integers(1, 3), max_size=3)):
            ids = [str(i if reuse else number + i) for i in range(count)]
            number += count
            order = draw(st.permutations(ids))
            if anthropic:
                thought = {"type": "thinking", "thinking": "hm", "signature": "s"}
                before = draw(st.sampled_from([(), (words(),), (thought, words())]))
                messages.append(uses(*ids, before=before))
                first = draw(st.sampled_from([0, 0, 1])) if count > 1 else 0
                messages += [user([answer(call_id)]) for call_id in order[:first]]
                more = draw(st.sampled_from([[], [words("go on")]]))
                messages.append(user([*(answer(call_id) for call_id in order[first:]), *more]))
            else:
                messages.append(calls(*ids, content=draw(st.sampled_from([None, "", "hm"]))))
                messages += [result(call_id) for call_id in order]
        messages.append(says(draw(st.sampled_from(["ok", ""]))))
    for index, message in enumerate(messages):
        message |= {"timestamp": f"2026-02-23T09:00:{index:02}", "reasoning_content": {"of": [index]}}
    return messages


# --------------------------------------------------------------------------------------- anything but that

ids = st.sampled_from(["1", "2", "3"])
odd: st.SearchStrategy[Any] = st.sampled_from(
    [None, 0, 1.5, True, "", "1", [], {}, [1], [None, "x"], {"id": "1"}, ["1"], [[]]]
)
call_lists = st.lists(st.fixed_dictionaries({"id": ids | odd}) | odd, max_size=3)
block_lists = st.lists(
    odd
    | st.fixed_dictionaries({"type": st.just("tool_use"), "id": ids | odd}, optional={"tool_use_id": ids})
    | st.fixed_dictionaries({"type": st.just("tool_result"), "tool_use_id": ids | odd}, optional={"id": ids})
    | st.fixed_dictionaries({"type": st.sampled_from(["text", "thinking"]) | odd}),
    max_size=4,
)
anything = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "user", "assistant", "assistant", "tool", "system"]) | odd,
        "content": st.just("text") | block_lists | odd | block_lists.map(tuple),
        "tool_calls": call_lists | odd | call_lists.map(tuple),
        "tool_call_id": ids | odd,
        "name": odd,
        "reasoning_content": odd,
    },
)
likely = st.sampled_from(
    [
        user(), says(), calls("1"), calls("1", "2"), calls("2", content="hm"), result("1"), result("2"),
        uses("1"), uses("1", "2"), uses("2", before=(words(),)), user([answer("1")]), user([answer("2")]),
        user([answer("1"), answer("2")]), user([words(), answer("2")]), user([answer("1"), words()]),
        {"role": "system", "content": "be kind"}, calls("1", "1"), uses("1", "1"), user([]),
    ]
)  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn) -> list[Message]:
    """A conversation as it should be, and then a few messages lost, doubled, moved, cut off or changed."""
    messages = draw(conversations())
    for _ in range(draw(st.integers(1, 4))):
        if not messages:
            break
        at = draw(st.integers(0, len(messages) - 1))
        what = draw(st.sampled_from(["lose", "repeat", "move", "cut", "intrude", "field", "field"]))
        if what == "cut":
            del messages[at + 1 :]
        elif what == "intrude":
            messages.insert(at, copy.deepcopy(draw(likely)))
        elif what == "repeat":
            messages.insert(draw(st.integers(0, len(messages))), copy.deepcopy(messages[at]))
        elif what == "field":
            field = draw(st.sampled_from(["role", "content", "tool_calls", "tool_call_id"]))
            messages[at][field] = copy.deepcopy(draw(odd | ids))
        else:
            message = messages.pop(at)
            if what == "move":
                messages.insert(draw(st.integers(0, len(messages))), message)
    return messages


sessions = (
    damaged()
    | st.lists(likely, max_size=14)
    | st.lists(anything, max_size=8)
    | st.lists(anything | likely, max_size=12)
)
