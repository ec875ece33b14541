"""What an in-process manager does that keeps a session in a list and its file as a whole: the least it takes.

Nothing is flushed, and nothing is shared between processes. It is here to be compared with.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class WholeFile:
    """A session, and its file."""

    path: Path
    key: str
    messages: list[dict[str, object]] = field(default_factory=list)

    def save(self) -> None:
        """Write everything anew, in place."""
        header = {"_type": "metadata", "key": self.key, "metadata": {}, "last_consolidated": 0}
        with self.path.open("w", encoding="utf-8") as file:
            for line in (header, *self.messages):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def window(messages: list[dict[str, object]], count: int) -> list[dict[str, object]]:
    """The last messages from a user's on, with the fields that a model takes: a plain loop."""
    last = messages[-count:]
    begin = next((i for i, message in enumerate(last) if message.get("role") == "user"), 0)
    entries = []
    for message in last[begin:]:
        entry = {"role": message["role"], "content": message.get("content", "")}
        for name in ("tool_calls", "tool_call_id", "name"):
            if name in message:
                entry[name] = message[name]
        entries.append(entry)
    return entries
