"""What becomes of a session whose file is not what it was: adopted anew if no change waited, else condemned.

A condemned session answers DATA_LOSS until its file is edited again or it is deleted. Nothing of it is thrown
away: the file stays as it is, and what the journal has beyond it goes to quarantine. For the committer.
"""

import json
import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from sessionstored.engine import Refused
from sessionstored.engine.jsonl.adoption import Unadoptable, adopt
from sessionstored.engine.jsonl.catalogue import Entry
from sessionstored.engine.jsonl.files import FileChanged
from sessionstored.engine.jsonl.records import SessionRecord, read_row
from sessionstored.engine.jsonl.state import State, data_loss
from sessionstored.engine.jsonl.tables import WrongRow
from sessionstored.rules import Refusal

if TYPE_CHECKING:
    from sessionstored.engine.jsonl.vault import Vault

log = logging.getLogger(__name__)

_ATTEMPTS = 20


def adopt_again(vault: "Vault", entry: Entry) -> Entry:
    """Adopt a clean file that somebody else changed. For the committer's thread."""
    for _ in range(_ATTEMPTS):
        try:
            head = entry.head
            adopted, notes = adopt(
                vault.files, entry.file, vault.next_revision(), head.key, head.expire_time_us
            )
        except FileNotFoundError:
            return entry  # gone meanwhile: whoever loads it says so
        except Unadoptable as unreadable:
            raise Refused(data_loss(entry.head.key, entry.file, 0, str(unreadable))) from unreadable
        except FileChanged:
            continue
        adopted.generation = entry.generation
        succeed(adopted, entry)
        _mark_shortened(adopted, entry)
        log.warning(
            "sessions/%s was changed by somebody else: adopted anew, %d messages %s",
            entry.file,
            adopted.head.message_count,
            "; ".join(notes),
        )
        vault.files.flush_names()  # perhaps the edit gave the name to another file
        vault.take_anew([(adopted, entry.head.revision)])
        return adopted
    raise Refused(data_loss(entry.head.key, entry.file, 0, "somebody else keeps changing the file"))


def succeed(adopted: Entry, entry: Entry) -> None:
    """Let a session that is adopted anew not be older than it was: its header need not tell of appends."""
    update_time_us = max(adopted.head.update_time_us, entry.head.update_time_us)
    adopted.head = replace(adopted.head, update_time_us=update_time_us)


def _mark_shortened(adopted: Entry, entry: Entry) -> None:
    """A file that lost messages is marked as damaged; one that lost everything is not served.

    So is one that lost anything at all while its time stayed as it was: nobody edited that.
    """
    before, after = entry.head.message_count, adopted.head.message_count
    if entry.bad_line:
        return
    if after < before:
        detail = f"somebody else shortened the file from {before} to {after} messages"
    elif adopted.size < entry.size and adopted.mtime_ns == entry.mtime_ns:
        detail = f"the file lost its last {entry.size - adopted.size} bytes, and was not edited"
    else:
        return
    adopted.head = replace(adopted.head, damage=adopted.head.damage or detail)
    if adopted.size == 0:
        adopted.bad_line = -1


def confirm(vault: "Vault", key: str, generation: int, block: int) -> bool:
    """Look again at a block that a reader found wrong, and condemn its session if it is.

    For the committer's thread. Returns False if it was an edit, a rewrite, or is as it should be after all.
    """
    state = vault.state(key)  # somebody's edit of a clean file is adopted here
    file = state.file
    if state.head is None or state.refusal or file.generation != generation or block >= len(file.blocks.crcs):
        return False
    detail = vault.files.wrong_block(file.name, file.blocks, block)
    return bool(detail) and condemn(vault, state, data_loss(key, file.name, 0, detail))


def condemn(vault: "Vault", state: State, refusal: Refusal) -> bool:
    """Serve a damaged session no longer. What the journal has for it goes to quarantine.

    Returns False if the disk is too full for that: the session stays as it is, to be tried again.
    """
    assert state.head is not None
    name = state.file.name
    pending = _journalled(vault, state)
    try:
        if pending:
            vault.files.set_aside(name, pending, "pending")
        stat = os.stat(vault.files.sessions / name)
        fingerprint = stat.st_size, stat.st_ino, stat.st_mtime_ns
    except FileNotFoundError:
        fingerprint = 0, 0, 0
    except OSError as error:
        if not vault.is_full(error):
            raise
        return False
    log.error("%s", refusal.message)
    entry = state.entry()
    entry.head = replace(entry.head, damage=refusal.metadata["detail"])
    entry.bad_line = -1
    entry.size, entry.inode, entry.mtime_ns = fingerprint  # edited after this, it is adopted anew
    vault.journal.put_entries([entry])
    vault.files.forget(name)
    with vault.lock:
        state.bad, state.head = refusal, entry.head
        state.file.size, state.file.inode, state.file.mtime_ns = fingerprint
        vault.clean(state)
    return True


def _journalled(vault: "Vault", state: State) -> bytes:
    """The messages that the journal has for a session beyond its catalogue row, as JSONL."""
    try:
        known = vault.journal.catalogue.entry(state.key)
    except WrongRow:
        known = None
    floor = known.head.revision if known and known.file == state.file.name else 0
    lines: list[bytes] = []
    named = json.dumps(state.key, ensure_ascii=False).encode()  # as a record spells it
    for _, _, body, whole in vault.journal.rows(vault.checkpoint_row):
        for record in read_row(body) if whole and named in body else ():
            if isinstance(record, SessionRecord) and record.head.key == state.key:
                lines += record.lines if record.head.revision > floor else ()
    return b"".join(line + b"\n" for line in lines)
