"""Which messages of a session go to a model: a window that a model API takes as it is.

The most important rule: **in a window, every tool call is answered and every tool result answers a call**,
and the results stand directly behind the call. Model APIs refuse anything else, and an agent that got such
a window could not go on at all.

The rules, in the order in which they are applied:

1. The window is the last ``max_messages`` messages after ``last_consolidated`` (0: all of them).
2. It begins at its first user turn. If it has none, it is extended back to the nearest user turn after
   ``last_consolidated``, and is then longer than ``max_messages``. If there is no user turn, it stays.
3. A message without a role cannot be sent and is left out.
4. A result belongs to the nearest call of its id before it, in the window, that has no result yet. A result
   without a call and a call without a result are left out: also a call at the very end, whose tool is still
   running, because a model refuses it unanswered. A message that holds nothing else is left out too.
5. A result that came late, because somebody else wrote in between, moves up to the results of its call.
6. ``role``, ``content``, ``tool_calls``, ``tool_call_id`` and ``name`` of each message are given, as copies.

Two dialects are known, also side by side. OpenAI: ``tool_calls`` of an assistant, answered by messages with
role ``tool`` and a ``tool_call_id``. Anthropic: ``tool_use`` blocks of an assistant, answered by
``tool_result`` blocks of a user; a user message that holds nothing but tool blocks is no user turn. A call
is answered in its own dialect.

This module is pure: no I/O, no clock, no grpc, no bytes. It takes any list of JSON objects, whatever their
shapes, raises on bad arguments only, and changes nothing that it is given. It must not know of sessions.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Message = Mapping[str, object]
Entry = dict[str, object]

# A call is known by its dialect and its id.
_Call = tuple[str, str]
_FUNCTION = "tool_calls"
_BLOCK = "tool_use"

# Where a tool block keeps the id of its call.
_ID_NAMES = {"tool_use": "id", "tool_result": "tool_use_id"}
# Blocks that say nothing once the call that they led to is gone; an assistant's message cannot end with them.
_THOUGHTS = ("thinking", "redacted_thinking")


def history(
    messages: Sequence[Message], *, last_consolidated: int = 0, max_messages: int = 500
) -> list[Entry]:
    """Give the window that is legal to send to a model, by the rules of this module.

    ``last_consolidated`` is how many messages from the front are left out because they are summarised
    elsewhere; ``max_messages`` is how many messages the window has at the most, 0 for no limit. The entries
    are new and the caller's own: changing them changes no message. The window of a window is that window.
    Raises ``ValueError`` if a number is negative.
    """
    start = window_start(messages, last_consolidated=last_consolidated, max_messages=max_messages)
    return _legal([message for message in messages[start:] if isinstance(message.get("role"), str)])


def window_start(messages: Sequence[Message], *, last_consolidated: int = 0, max_messages: int = 500) -> int:
    """Give the index of the window's first message, by rules 1 and 2. Raises as ``history`` does."""
    if last_consolidated < 0:
        raise ValueError(f"last_consolidated must be 0 or more, not {last_consolidated}")
    if max_messages < 0:
        raise ValueError(f"max_messages must be 0 (no limit) or more, not {max_messages}")
    first = max(last_consolidated, len(messages) - max_messages if max_messages else 0)
    ahead, back = range(first, len(messages)), range(first - 1, last_consolidated - 1, -1)
    turns = (index for indexes in (ahead, back) for index in indexes if is_user_turn(messages[index]))
    return next(turns, first)


def needs_more(tail: Sequence[Message]) -> bool:
    """Tell whether the last messages of a session do not suffice for its window: no user turn is among them.

    For who reads a session from its end: read the last ``max_messages`` after ``last_consolidated``, and
    while this says so and there is more, read further back. Each piece that is read may be asked about
    alone. Then ``history(tail, max_messages=max_messages)`` is the window of the whole session.
    """
    return not any(is_user_turn(message) for message in tail)


def is_user_turn(message: Message) -> bool:
    """Tell whether a message is a user's own words, and not only what tools said."""
    if message.get("role") != "user":
        return False
    blocks = _items(message.get("content"))
    return not blocks or not all(_tool_block_type(block) for block in blocks)


# ----------------------------------------------------------------------------------------- who answers whom


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Which calls of a window are answered, and where. Indexes are those of the window."""

    answered: dict[int, set[_Call]]  # by the index of the message that calls
    callers: dict[int, dict[_Call, int]]  # by the index of the message that holds the results


def _pair(window: Sequence[Message]) -> _Pairs:
    """Match each result with the nearest call of its id before it that has no result yet."""
    waiting: dict[_Call, int] = {}
    pairs = _Pairs({}, {})
    for index, message in enumerate(window):
        for call in _calls(message):
            waiting[call] = index
        for call in _results(message):
            caller = waiting.pop(call, None)
            if caller is not None:
                pairs.answered.setdefault(caller, set()).add(call)
                pairs.callers.setdefault(index, {})[call] = caller
    return pairs


def _calls(message: Message) -> list[_Call]:
    if message["role"] != "assistant":
        return []
    functions = [_function_call(call, "id") for call in _items(message.get("tool_calls"))]
    blocks = [_block_call(block, "tool_use") for block in _items(message.get("content"))]
    return [call for call in functions + blocks if call is not None]


def _results(message: Message) -> list[_Call]:
    found: list[_Call | None] = []
    if message["role"] == "tool":
        found = [_function_call(dict(message), "tool_call_id")]
    elif message["role"] == "user":
        found = [_block_call(block, "tool_result") for block in _items(message.get("content"))]
    return [call for call in found if call is not None]


def _function_call(holder: object, name: str) -> _Call | None:
    call_id = holder.get(name) if isinstance(holder, dict) else None
    return (_FUNCTION, call_id) if isinstance(call_id, str) else None


def _block_call(block: object, block_type: str) -> _Call | None:
    if not isinstance(block, dict) or _tool_block_type(block) != block_type:
        return None
    call_id = block.get(_ID_NAMES[block_type])
    return (_BLOCK, call_id) if isinstance(call_id, str) else None


def _tool_block_type(block: object) -> str:
    """Give the type of a tool block; of any other block, and of what is no block, the empty string."""
    block_type = block.get("type") if isinstance(block, dict) else None
    return block_type if isinstance(block_type, str) and block_type in _ID_NAMES else ""


def _items(value: object) -> list[object]:
    return value if isinstance(value, list) else []


# ------------------------------------------------------------------------------------- what becomes of them


def _legal(window: Sequence[Message]) -> list[Entry]:
    """Apply rules 4 to 6 to messages that all have a role."""
    pairs = _pair(window)
    placed: list[tuple[int, Entry]] = []
    caller = -1  # whose results the next message may hold without having come late
    for index, message in enumerate(window):
        callers = pairs.callers.get(index, {})
        if message["role"] == "tool":
            placed += _tool(message, callers)
        elif message["role"] == "user":
            entries = _user(index, message, callers, caller)
            placed += entries
            if any(place == index for place, _ in entries):
                caller = -1
        else:
            entry = _speaker(message, pairs.answered.get(index, set()))
            if entry is not None:
                placed.append((index, entry))
                caller = index
    # The sort is stable: behind its call, results keep the order in which they came.
    placed.sort(key=lambda place_and_entry: place_and_entry[0])
    return [_copied(entry) for _, entry in placed]


def _tool(message: Message, callers: Mapping[_Call, int]) -> list[tuple[int, Entry]]:
    """Place a message of role tool, which is one result, behind its call; without a call, nowhere."""
    return [(caller, _entry(message, _content(message, set()))) for caller in callers.values()]


def _user(index: int, message: Message, callers: Mapping[_Call, int], at: int) -> list[tuple[int, Entry]]:
    """Take a user's message apart: what does not answer the call ``at`` goes to its call; the rest stays."""
    content = message.get("content", "")
    if not isinstance(content, list) or not content:
        return [(index, _entry(message, content))]
    words = [block for block in content if not _tool_block_type(block)]
    waiting = dict(callers)
    results: dict[int, list[object]] = {}
    for block in content:
        call = _block_call(block, "tool_result")
        if call is not None and call in waiting:
            results.setdefault(waiting.pop(call), []).append(block)
    placed: list[tuple[int, Entry]] = []
    if words:
        placed.append((index, _entry(message, [*results.pop(at, []), *words])))
    return placed + [(caller, _entry(message, blocks)) for caller, blocks in results.items()]


def _speaker(message: Message, answered: Iterable[_Call]) -> Entry | None:
    """Take the calls without a result out of an assistant's message; None if nothing else was in it."""
    waiting = set(answered)
    functions = _items(message.get("tool_calls"))
    calls = [call for call in functions if _take(_function_call(call, "id"), waiting)]
    content = _content(message, waiting)
    something_lost = bool(message.get("tool_calls")) or content != message.get("content", "")
    if something_lost and not calls and _says_nothing(content):
        return None
    return _entry(message, content, calls)


def _content(message: Message, waiting: set[_Call]) -> object:
    """Give a message's content without tool blocks that nobody waits for; an empty text if none is left."""
    content = message.get("content", "")
    if not isinstance(content, list):
        return content
    kept = [
        block
        for block in content
        if not _tool_block_type(block) or _take(_block_call(block, "tool_use"), waiting)
    ]
    return kept if kept or not content else ""


def _take(call: _Call | None, waiting: set[_Call]) -> bool:
    """Take a call out of those that wait: of two with one id, the first counts."""
    if call is None or call not in waiting:
        return False
    waiting.remove(call)
    return True


def _says_nothing(content: object) -> bool:
    if isinstance(content, list):
        return all(isinstance(block, dict) and block.get("type") in _THOUGHTS for block in content)
    return not content


def _entry(message: Message, content: object, calls: Sequence[object] = ()) -> Entry:
    entry: Entry = {"role": message["role"], "content": content}
    if calls:
        entry["tool_calls"] = calls
    if message["role"] == "tool":
        entry["tool_call_id"] = message["tool_call_id"]
    if "name" in message:
        entry["name"] = message["name"]
    return entry


def _copied(entry: Entry) -> Entry:
    """Copy to any depth, without recursion. Tuples become lists, as in JSON."""
    copy = dict(entry)
    unfinished: list[dict[str, object] | list[object]] = [copy]
    while unfinished:
        node = unfinished.pop()
        if isinstance(node, dict):
            for name, value in node.items():
                if isinstance(value, _CONTAINERS):
                    node[name] = _copied_once(value, unfinished)
        else:
            node[:] = [
                _copied_once(value, unfinished) if isinstance(value, _CONTAINERS) else value for value in node
            ]
    return copy


_Container = dict[str, object] | list[object] | tuple[object, ...]
_CONTAINERS = (dict, list, tuple)


def _copied_once(value: _Container, unfinished: list[dict[str, object] | list[object]]) -> object:
    """Copy a container by one level, and note that its inside is still shared."""
    copy = dict(value) if isinstance(value, dict) else list(value)
    unfinished.append(copy)
    return copy
