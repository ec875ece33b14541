"""What the journal says that we wrote into session files, to tell our bytes from everybody else's. Pure."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from sessionstored.engine.jsonl.blocks import begins_with
from sessionstored.engine.jsonl.records import DeleteRecord
from sessionstored.engine.jsonl.text import header_line
from sessionstored.rules import Head


@dataclass(slots=True)
class Ours:
    """What the journal has for the files, beyond their catalogue rows."""

    lines: defaultdict[str, Counter[bytes]] = field(default_factory=lambda: defaultdict(Counter))
    """Key -> every line that the journal put into its file since its catalogue row, and how often."""
    heads: defaultdict[str, list[Head]] = field(default_factory=lambda: defaultdict(list))
    """Key -> every head that the journal gave it: what header lines may say."""
    tombstones: list[DeleteRecord] = field(default_factory=list)

    def wrote(self, key: str, name: str, data: bytes) -> bool:
        """Whether the journal has all that these bytes say, after what a deleted session's file had."""
        for record in self.tombstones:
            if record.file == name:
                data = data[known_length(record, data) :]
        written = self.lines.get(key, Counter())
        headers = {header_line(head)[:-1] for head in self.heads.get(key, ())}
        *lines, rest = data.split(b"\n")
        found = Counter(line for line in lines if line and line not in headers and b"\0" not in line)
        if any(times > written[line] for line, times in found.items()):
            return False
        if b"\0" not in data:
            return not rest or any(line.startswith(rest) for line in [*headers, *written])
        ours = b"\n".join([b"", *headers, *written, b""])
        holed = [line + b"\n" for line in lines if b"\0" in line]
        return all(_remains(line, ours) for line in [*holed, rest])


def known_length(record: DeleteRecord, data: bytes) -> int:
    """How much of a file's bytes are those that a tombstone speaks of."""
    return max((mark[0] for mark in record.marks if begins_with(data, mark)), default=0)


def _remains(line: bytes, lines: bytes) -> bool:
    """Whether a line can be one of these after a power cut: what was not flushed may be zeros, or missing.

    No line has a zero byte of its own. What somebody else wrote is found by its other parts.
    """
    return all(part in lines for part in (b"\n" + line).split(b"\0"))
