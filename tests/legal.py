"""What a strict model API takes: a judge of windows, written from the two APIs' own rules.

It must not know of `sessionstore.history`, whose windows it judges. Its rules:

* OpenAI: right behind an assistant's message with `tool_calls` stand messages of role `tool`, one for each
  id and nothing else, in any order. A message of role `tool` stands nowhere else.
* Anthropic: right behind an assistant's message with `tool_use` blocks stand `tool_result` blocks in
  messages of a user, one for each id, before any other block. (Successive messages of one role are one turn
  to that API.) A `tool_result` block stands nowhere else.
* Ids are strings, and those of one message differ. Nothing is unanswered at the end.
"""

from typing import Any

Message = dict[str, Any]
FIELDS = {"role", "content", "tool_calls", "tool_call_id", "name"}


def complaint(window: list[Message], more_fields: tuple[str, ...] = ()) -> str | None:
    """Say what a strict model API would refuse in a window; None if nothing."""
    waiting: list[tuple[str, object]] = []
    for index, message in enumerate(window):
        told = _shape(message, more_fields) or _answers(message, waiting) or _asks(message, waiting)
        if told:
            return f"message {index} {told}"
    return f"at the end, {waiting} wait" if waiting else None


def _shape(message: Message, more_fields: tuple[str, ...]) -> str | None:
    if not isinstance(message.get("role"), str) or "content" not in message:
        return "has no role or no content"
    if not set(message) <= FIELDS | set(more_fields):
        return f"has the fields {sorted(set(message) - FIELDS)}"
    calls = message.get("tool_calls", [None])
    if not isinstance(calls, (list, tuple)) or not calls:
        return "has tool_calls that are no list, or an empty one"
    if "tool_calls" in message and message["role"] != "assistant":
        return "has tool_calls that are not an assistant's"
    if ("tool_call_id" in message) != (message["role"] == "tool"):
        return "has a tool_call_id without the role tool, or the other way round"
    return None


def _answers(message: Message, waiting: list[tuple[str, object]]) -> str | None:
    """Take the results of a message from what waits; a complaint if one answers nothing, or is late."""
    kinds = [block.get("type") for block in _blocks(message)]
    answers = [("tool_use", block.get("tool_use_id")) for block in _blocks(message, "tool_result")]
    if answers and message["role"] != "user":
        return "holds results in a message that is not a user's"
    if kinds[: len(answers)] != ["tool_result"] * len(answers):
        return "holds words before results"
    if message["role"] == "tool":
        answers.append(("tool_calls", message["tool_call_id"]))
    for answer in answers:
        if answer not in waiting:
            return f"holds the result {answer}, which nothing waits for"
        waiting.remove(answer)
    everything = message["content"] if isinstance(message["content"], (list, tuple)) else ["words"]
    silent = message["role"] == "tool" or (len(answers) == len(everything) > 0)
    if waiting and not silent:
        return f"stands where {waiting} wait for results"
    return None


def _asks(message: Message, waiting: list[tuple[str, object]]) -> str | None:
    """Add the calls of a message to what waits."""
    calls = [("tool_use", block.get("id")) for block in _blocks(message, "tool_use")]
    if calls and message["role"] != "assistant":
        return "holds calls that are not an assistant's"
    for call in message.get("tool_calls", []):
        calls.append(("tool_calls", call.get("id") if isinstance(call, dict) else None))
    for call in calls:
        if not isinstance(call[1], str) or call in waiting:
            return f"holds the call {call}, whose id is no string, or is there twice"
        waiting.append(call)
    return None


def _blocks(message: Message, kind: str | None = None) -> list[Message]:
    content = message["content"] if isinstance(message["content"], (list, tuple)) else []
    blocks = [block if isinstance(block, dict) else {} for block in content]
    return [block for block in blocks if kind is None or block.get("type") == kind]
