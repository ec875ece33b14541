"""How a user of plain files reads a session: the reading half of the format that this store keeps.

Line by line, blank ones skipped; a header may stand anywhere, and the last one wins; whatever goes wrong
makes the session unreadable as a whole (None). That is what readers of this format did before there was a
daemon, so a file is only as good as what comes out here.
"""

import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path


@dataclass
class PlainSession:
    key: str | None = None
    messages: list[dict[str, object]] = field(default_factory=list)
    metadata: dict[str, object] = field(default_factory=dict)
    last_consolidated: int = 0
    created_at: datetime | None = None


def read_session(path: Path) -> PlainSession | None:
    """Read a whole file; None if anything in it cannot be read."""
    session = PlainSession()
    try:
        with path.open(encoding="utf-8") as file:
            for text in file:
                if text.strip():
                    _take(session, json.loads(text))
    except Exception:  # any trouble at all makes the session unreadable: that is the behaviour in question
        return None
    return session


def _take(session: PlainSession, line: dict[str, object]) -> None:
    if line.get("_type") != "metadata":
        session.messages.append(line)
        return
    session.key = line.get("key")  # type: ignore[assignment]
    session.metadata = line.get("metadata", {})  # type: ignore[assignment]
    session.last_consolidated = line.get("last_consolidated", 0)  # type: ignore[assignment]
    created = line.get("created_at")
    session.created_at = datetime.fromisoformat(created) if created else None  # type: ignore[arg-type]
