"""A fork's file, written before its commit.

For a reader's thread: copying a large session must not hold up the committer.
"""

import time
from dataclasses import replace

from sessionstored.engine import Refused
from sessionstored.engine.jsonl.catalogue import Entry
from sessionstored.engine.jsonl.committer import Committer
from sessionstored.engine.jsonl.files import FileChanged
from sessionstored.engine.jsonl.group import PreparedFork
from sessionstored.engine.jsonl.vault import Vault
from sessionstored.rules import Fork

_ATTEMPTS = 20


def prepare(vault: Vault, committer: Committer, fork: Fork) -> PreparedFork | None:
    """Write a fork's file under its temporary name, and flush it.

    Returns None if there is nothing to copy, or no room: the committer then says why.

    Raises:
        Refused: STORAGE_FULL, or the source is damaged.

    """
    for _ in range(_ATTEMPTS):
        try:
            return _attempt(vault, committer, fork)
        except FileChanged:
            committer.look_again(fork.source_key).result()
    return None


def _attempt(vault: Vault, committer: Committer, fork: Fork) -> PreparedFork | None:
    state = vault.load(fork.source_key)
    with vault.lock:
        if state is None or state.head is None or state.refusal is not None or vault.expired(state.head):
            return None
        head, region, base, filed = state.head, vault.region(state), state.base, state.filed
        tail = state.lines[filed - base :]
    at = head.message_count if fork.at is None else fork.at
    if not 0 <= at <= head.message_count or committer.is_full(region.blocks.length):
        return None
    name = vault.reserve_name_as_reader(fork.key)
    now_us = time.time_ns() // 1000
    target = replace(
        head,
        key=fork.key,
        message_count=at,
        last_consolidated=min(head.last_consolidated, at),
        create_time_us=now_us,
        update_time_us=now_us,
        damage="",
        expire_time_us=0,
    )
    runs = vault.runs_cold(state, region, 0, min(at, filed))
    rest = tail[: max(0, at - filed)]
    try:
        file = vault.files.write_generation(target, name, 1, (run for part in (runs, [rest]) for run in part))
    except BaseException as error:
        vault.release_name(name)
        if isinstance(error, OSError) and vault.is_full(error):
            raise Refused(committer.full()) from error
        raise
    entry = Entry(target, name, 1, file.blocks, file.size, file.inode, file.mtime_ns, file.superseded_bytes)
    return PreparedFork(entry, head.rewrite_revision)
