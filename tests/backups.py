"""Backups in tests: an engine's, written as `sessionctl backup` does, and stores made of them again."""

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

from engines import lines
from sessionstore.cli import backing_up
from sessionstored.engine import Engine, Query, Refused
from sessionstored.engine.jsonl import restoring
from sessionstored.replies import BackupReplies
from sessionstored.rules import Head

State = dict[str, tuple[Head, list[bytes] | str]]


async def back_up(
    engine: Engine, directory: Path, meanwhile: Callable[[], Awaitable[None]] | None = None
) -> backing_up.Backup:
    """A backup of an engine; `meanwhile` is waited for after each block, also the one with the header."""
    made = BackupReplies()
    replies = []
    async with aclosing(engine.backup()) as blocks:
        async for block in blocks:
            replies.append(made.block(block))
            if meanwhile is not None:
                await meanwhile()
    backing_up.prepare(directory)
    return backing_up.receive([*replies, made.summary()], directory, lambda done, total: None)


def restore(backup: Path, data: Path) -> str:
    """Make a store of it; returns its id."""
    manifest = restoring.read_manifest(backup)
    restoring.verify(backup, manifest, lambda size: None)
    return restoring.restore(backup, data, manifest, lambda size: None)


async def state_of(engine: Engine) -> State:
    """Every session, whole: its head and its messages, or why it is not served."""
    found: State = {}
    page = await engine.list(Query(page_size=10_000))
    for head in page.heads:
        try:
            found[head.key] = head, list(await lines(engine, head.key))
        except Refused as refused:
            found[head.key] = head, refused.refusal.reason
    return found
