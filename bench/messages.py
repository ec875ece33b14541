"""The messages that every system stores: JSON text of about 250 bytes, as an agent's turn has them."""

import json

_TEXT = (
    "The quarterly figures are in the shared folder; I compared them with last year's and found two rows "
    "that do not add up. Shall I write to accounting?"
)


def message(n: int) -> dict[str, object]:
    """Message number n of a session: user and assistant in turn."""
    role = "assistant" if n % 2 else "user"
    return {"role": role, "content": f"{n}: {_TEXT}", "timestamp": "2026-01-01T12:00:00.000000"}


def encoded(n: int) -> str:
    """The same as JSON text."""
    return json.dumps(message(n), ensure_ascii=False)


def turn(n: int) -> list[dict[str, object]]:
    """The four messages of a turn: question, tool call, result, answer."""
    call = {
        "id": f"call_{n}",
        "type": "function",
        "function": {"name": "search", "arguments": '{"query": "rows"}'},
    }
    return [
        message(2 * n),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": f"call_{n}", "content": _TEXT},
        message(2 * n + 1),
    ]
