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
6. ``role``, ``content``, ``tool_calls``, ``tool_call_id`` and ``name`` of each message are given, and the
   fields that ``keep`` names, as copies.
7. If the entries count for more than ``max_tokens``, turns are left out from the front until they do not.
   The last turn is given in any case, whole. Without a user turn, each message of an assistant counts as
   the beginning of a turn.

Two dialects are known, also side by side. OpenAI: ``tool_calls`` of an assistant, answered by messages with
role ``tool`` and a ``tool_call_id``. Anthropic: ``tool_use`` blocks of an assistant, answered by
``tool_result`` blocks of a user; a user message that holds nothing but tool blocks is no user turn. A call
is answered in its own dialect.

Nearly every window is in order as it is stored, and agents ask for one per model call. So there are two ways
through rules 3 to 6: `_in_order` takes one look at each message and stops at the first that is unusual;
`_mended` takes the rest, and anything. What the first gives, the second would give too.

This module is pure: no I/O, no clock, no grpc, no bytes. It takes any list of JSON objects, whatever their
shapes, raises on bad arguments only, and changes nothing that it is given. It must not know of sessions.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Message = Mapping[str, object]
Entry = dict[str, object]
# What one entry of a window costs, in the caller's own measure.
CountTokens = Callable[[Entry], float]

# A call is known by its dialect and its id.
_Call = tuple[str, str]
_FUNCTION = "tool_calls"
_BLOCK = "tool_use"

# Where a tool block keeps the id of its call.
_ID_NAMES = {"tool_use": "id", "tool_result": "tool_use_id"}
# Blocks that say nothing once the call that they led to is gone; an assistant's message cannot end with them.
_THOUGHTS = ("thinking", "redacted_thinking")
# What the rules decide about, whatever `keep` says.
_RULED = ("role", "content", "tool_calls", "tool_call_id", "name")
_CONTAINERS = (dict, list, tuple)
_Container = dict[str, object] | list[object]


class ArgumentError(ValueError):
    """An argument that no list of messages can make right. ``field`` names it; ``detail`` says why."""

    def __init__(self, field: str, detail: str) -> None:
        super().__init__(f"{field} {detail}")
        self.field = field
        self.detail = detail


def history(
    messages: Sequence[Message],
    *,
    last_consolidated: int = 0,
    max_messages: int = 500,
    keep: Iterable[str] = (),
    max_tokens: int | None = None,
    count_tokens: CountTokens | None = None,
) -> list[Entry]:
    """Give the window that is legal to send to a model, by the rules of this module.

    ``last_consolidated`` is how many messages from the front are left out because they are summarised
    elsewhere; ``max_messages`` is how many messages the window has at the most, 0 for no limit; ``keep``
    names more fields to give, where a message has them. ``max_tokens`` is what the entries may count for
    together, and ``count_tokens`` tells what one entry counts for: it is called from the last entry on, and
    what it raises goes through. The entries are new and the caller's own: changing them changes no message.
    The window of a window is that window. Raises `ArgumentError`.
    """
    names = kept(keep)
    budget = _budget(max_tokens, count_tokens)
    start = window_start(messages, last_consolidated=last_consolidated, max_messages=max_messages)
    window = messages[start:]
    entries = _in_order(window, names)
    rest = window[len(entries) :]
    if rest:
        entries += _mended([message for message in rest if isinstance(message.get("role"), str)], names)
    return entries if budget is None else _within(entries, *budget)


def kept(keep: Iterable[str]) -> tuple[str, ...]:
    """Give the names of the fields that ``keep`` adds to an entry. Raises `ArgumentError`."""
    if isinstance(keep, str) or not isinstance(keep, Iterable):
        raise ArgumentError("keep", f"must be a list of names, not a {type(keep).__name__}")
    names = tuple(keep)
    if not all(isinstance(name, str) for name in names):
        raise ArgumentError("keep", "must hold names, and each is a string")
    if "function_call" in names:
        raise ArgumentError("keep", "cannot bring function_call, whose answer nobody sees to")
    return tuple(name for name in dict.fromkeys(names) if name not in _RULED)


def _budget(max_tokens: int | None, count_tokens: CountTokens | None) -> tuple[int, CountTokens] | None:
    if max_tokens is None and count_tokens is None:
        return None
    if max_tokens is None or count_tokens is None:
        raise ArgumentError("max_tokens", "and count_tokens go together: one says how much, one counts")
    if max_tokens < 1:
        raise ArgumentError("max_tokens", f"must be 1 or more, or None for no limit, not {max_tokens}")
    return max_tokens, count_tokens


def window_start(messages: Sequence[Message], *, last_consolidated: int = 0, max_messages: int = 500) -> int:
    """Give the index of the window's first message, by rules 1 and 2. Raises as ``history`` does."""
    if last_consolidated < 0:
        raise ArgumentError("last_consolidated", f"must be 0 or more, not {last_consolidated}")
    if max_messages < 0:
        raise ArgumentError("max_messages", f"must be 0 (no limit) or more, not {max_messages}")
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


# ----------------------------------------------------------------------------------------- nothing to mend


def _in_order(window: Sequence[Message], keep: Sequence[str]) -> list[Entry]:
    """Give the entries of the first messages, up to where something may have to be left out or moved.

    Behind them no result is missing, so what follows can be treated as a window of its own.
    """
    entries: list[Entry] = []
    shared: list[_Container] = []  # copies whose insides are not copied yet
    waiting: set[object] = set()  # a call's id; in the Anthropic dialect, beside the type of its block
    for message in window:
        role, content = message.get("role"), message.get("content", "")
        entry: Entry = {"role": role, "content": content}
        if role == "tool":
            call_id = message.get("tool_call_id")
            if type(call_id) is not str or call_id not in waiting:
                break
            waiting.remove(call_id)
            entry["tool_call_id"] = call_id
        elif role == "assistant":
            calls = message.get("tool_calls")
            if waiting or (calls and not _calls_in_order(calls, waiting, entry, shared)):
                break
        elif role != "user" and (waiting or type(role) is not str or "tool_calls" in message):
            break
        if type(content) is list:
            if not _blocks_in_order(content, waiting, entry, shared):
                break
        elif (type(content) is not str and content is not None) or (waiting and role == "user"):
            break
        if "name" in message:
            entry["name"] = name = message["name"]
            if type(name) is not str:
                break
        if keep:
            entry.update((name, message[name]) for name in keep if name in message)
        entries.append(entry)
    if waiting or len(entries) < len(window):
        # Nothing waited where an assistant spoke last.
        while entries and entries.pop()["role"] != "assistant":
            pass
    _make_own(entries if keep else shared)
    return entries


def _calls_in_order(calls: object, waiting: set[object], entry: Entry, shared: list[_Container]) -> bool:
    """Put calls into an entry and note that they wait, if each is a new one."""
    if type(calls) is not list:
        return False
    copies = []
    for call in calls:
        call_id = call.get("id") if type(call) is dict else None
        if type(call_id) is not str or call_id in waiting:
            return False
        waiting.add(call_id)
        copies.append(call.copy())
    entry["tool_calls"] = copies
    shared += copies
    return True


def _blocks_in_order(
    content: list[object], waiting: set[object], entry: Entry, shared: list[_Container]
) -> bool:
    """Put blocks into an entry and note which calls wait, and which no longer, if each block is in place."""
    role, words = entry["role"], False
    copies = []
    for block in content:
        if type(block) is not dict:
            return False
        kind = block.get("type")
        if kind == "tool_use":
            call = (_BLOCK, block.get("id"))
            if role != "assistant" or type(call[1]) is not str or call in waiting:
                return False
            waiting.add(call)
        elif kind == "tool_result":
            call = (_BLOCK, block.get("tool_use_id"))
            if role != "user" or words or type(call[1]) is not str or call not in waiting:
                return False
            waiting.remove(call)
        else:
            words = True
        copies.append(block.copy())
    entry["content"] = copies
    shared += copies
    # Words end the results of a call, and so does an empty message.
    return role != "user" or not waiting or (not words and content != [])


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
        if _is_plain(message):
            continue
        for call in _calls(message):
            waiting[call] = index
        for call in _results(message):
            caller = waiting.pop(call, None)
            if caller is not None:
                pairs.answered.setdefault(caller, set()).add(call)
                pairs.callers.setdefault(index, {})[call] = caller
    return pairs


def _is_plain(message: Message) -> bool:
    """Tell whether a message is text, and certainly has no calls and no results."""
    return (
        type(message.get("content", "")) is str
        and message["role"] != "tool"
        and not message.get("tool_calls")
    )


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


def _items(value: object) -> Sequence[object]:
    return value if isinstance(value, (list, tuple)) else ()


# ------------------------------------------------------------------------------------- what becomes of them


class _Part(NamedTuple):
    """What is given of a message, and at whose place: its own, or that of the message that it answers."""

    place: int
    message: Message
    content: object
    calls: Sequence[object] = ()

    def entry(self, keep: Sequence[str]) -> Entry:
        message = self.message
        entry: Entry = {"role": message["role"], "content": self.content}
        if self.calls:
            entry["tool_calls"] = self.calls
        if message["role"] == "tool":
            entry["tool_call_id"] = message["tool_call_id"]
        if "name" in message:
            entry["name"] = message["name"]
        if keep:
            entry.update((name, message[name]) for name in keep if name in message)
        return entry


def _mended(window: Sequence[Message], keep: Sequence[str]) -> list[Entry]:
    """Apply rules 4 to 6 to messages that all have a role."""
    pairs = _pair(window)
    parts: list[_Part] = []
    caller = -1  # whose results the next message may hold without having come late
    for index, message in enumerate(window):
        if _is_plain(message):
            parts.append(_Part(index, message, message.get("content", "")))
            caller = -1 if message["role"] == "user" else index
            continue
        callers = pairs.callers.get(index, {})
        if message["role"] == "tool":
            parts += [_Part(place, message, _content(message, set())) for place in callers.values()]
        elif message["role"] == "user":
            spoken = _user(index, message, callers, caller)
            parts += spoken
            if any(part.place == index for part in spoken):
                caller = -1
        else:
            part = _speaker(index, message, pairs.answered.get(index, set()))
            if part is not None:
                parts.append(part)
                caller = index
    # The sort is stable: behind its call, results keep the order in which they came.
    parts.sort(key=lambda part: part.place)
    entries = [part.entry(keep) for part in parts]
    _make_own(entries)
    return entries


def _user(index: int, message: Message, callers: Mapping[_Call, int], at: int) -> list[_Part]:
    """Take a user's message apart: what does not answer the call ``at`` goes to its call; the rest stays."""
    content = message.get("content", "")
    blocks = _items(content)
    if not blocks:
        return [_Part(index, message, content)]
    words = [block for block in blocks if not _tool_block_type(block)]
    waiting = dict(callers)
    results: dict[int, list[object]] = {}
    for block in blocks:
        call = _block_call(block, "tool_result")
        if call is not None and call in waiting:
            results.setdefault(waiting.pop(call), []).append(block)
    parts: list[_Part] = []
    if words:
        parts.append(_Part(index, message, [*results.pop(at, []), *words]))
    return parts + [_Part(caller, message, answers) for caller, answers in results.items()]


def _speaker(index: int, message: Message, answered: Iterable[_Call]) -> _Part | None:
    """Take the calls without a result out of an assistant's message; None if nothing else was in it."""
    waiting = set(answered)
    functions = _items(message.get("tool_calls"))
    calls = [call for call in functions if _take(_function_call(call, "id"), waiting)]
    content = _content(message, waiting)
    something_lost = bool(message.get("tool_calls")) or content != message.get("content", "")
    if something_lost and not calls and _says_nothing(content):
        return None
    return _Part(index, message, content, calls)


def _content(message: Message, waiting: set[_Call]) -> object:
    """Give a message's content without tool blocks that nobody waits for; an empty text if none is left."""
    content = message.get("content", "")
    blocks = _items(content)
    kept = [
        block
        for block in blocks
        if not _tool_block_type(block) or _take(_block_call(block, "tool_use"), waiting)
    ]
    if len(kept) == len(blocks):
        return content
    return kept or ""


def _take(call: _Call | None, waiting: set[_Call]) -> bool:
    """Take a call out of those that wait: of two with one id, the first counts."""
    if call is None or call not in waiting:
        return False
    waiting.remove(call)
    return True


def _says_nothing(content: object) -> bool:
    if isinstance(content, (list, tuple)):
        return all(isinstance(block, dict) and block.get("type") in _THOUGHTS for block in content)
    return not content


# ---------------------------------------------------------------------------------------- copies and budget


def _make_own(nodes: Iterable[_Container]) -> None:
    """Copy what is inside these containers, to any depth, without recursion. Tuples become lists."""
    unfinished = list(nodes)
    for node in unfinished:  # it grows meanwhile
        for at, value in node.items() if type(node) is dict else enumerate(node):
            if type(value) is not str and isinstance(value, _CONTAINERS):
                copy: _Container = {**value} if isinstance(value, dict) else [*value]
                node[at] = copy  # type: ignore[index]
                unfinished.append(copy)


def _within(entries: list[Entry], max_tokens: int, count_tokens: CountTokens) -> list[Entry]:
    """Apply rule 7 to a window: take as many turns as fit, from its end, and at least one."""
    begins = is_user_turn if any(map(is_user_turn, entries)) else _is_no_result
    found: tuple[int, Entry] | None = None
    tokens: float = 0
    for index in range(len(entries) - 1, -1, -1):
        entry = first = entries[index]
        cost = _counted(entry, count_tokens)
        if begins(entry):
            first = _words_of(entry)
            alone = cost if first is entry else _counted(first, count_tokens)
            if found is not None and tokens + alone > max_tokens:
                break
            found = index, first
        tokens += cost
        if found is not None and tokens > max_tokens:
            break
    return [] if found is None else [found[1], *entries[found[0] + 1 :]]


def _is_no_result(entry: Entry) -> bool:
    return entry["role"] not in ("tool", "user")


def _words_of(entry: Entry) -> Entry:
    """Give an entry at which a window begins: results in it have lost their call."""
    blocks = _items(entry["content"]) if entry["role"] == "user" else ()
    words = [block for block in blocks if not _tool_block_type(block)]
    return entry if len(words) == len(blocks) else entry | {"content": words}


def _counted(entry: Entry, count_tokens: CountTokens) -> float:
    tokens = count_tokens(entry)
    if not tokens >= 0:
        raise ArgumentError("count_tokens", f"must give a number of 0 or more, and gave {tokens}")
    return tokens
