"""Erasure: after messages were removed, nothing of them stays in journal.db and its log.

Session files lose removed messages when they are removed or written anew. The journal's rows go with the
checkpoints, and SQLite overwrites with zeros what it deletes (secure_delete). What is then left is the
write-ahead log, which still holds the rows as they were: it is emptied as soon as no row is left that may
hold what was removed. Remembered answers hold popped messages; they go when they are too old, also while
nothing else happens.

For the maintenance thread, after a checkpoint.
"""

from sessionstored.engine import Refused
from sessionstored.engine.jsonl.committer import Committer
from sessionstored.engine.jsonl.vault import Vault
from sessionstored.windows import FORGET_SLACK_S

_TRIES = 3


def erase(vault: Vault, committer: Committer) -> None:
    """Take the next step towards nothing being left, if something has to be erased.

    What cannot be done now, because rows are still needed, a backup reads the log, or the disk is full, is
    done by a later call.
    """
    before_s = vault.clock_s() - vault.limits.window_age_max_s - FORGET_SLACK_S
    if _old_windows(vault, before_s):
        committer.run(lambda: _forget_windows(vault, before_s), fatal=True).result()
    if not committer.run(committer.log_fits, fatal=True).result():
        return
    for _ in range(_TRIES):  # somebody may just read: the log cannot be emptied under a reader
        if vault.erasing is None:
            return
        committer.run(lambda: _empty_log(vault), fatal=True).result()


def _old_windows(vault: Vault, before_s: float) -> bool:
    """Whether remembered answers are too old. Damaged ones stay, and refuse the calls that need them."""
    try:
        return vault.reading(lambda reader: reader.old_windows(before_s))
    except Refused:
        return False


def _forget_windows(vault: Vault, before_s: float) -> None:
    if vault.journal.trim_windows((), 0, before_s):
        vault.to_erase(0)


def _empty_log(vault: Vault) -> None:
    """Empty the log, if no row is left that holds what is to be erased. On the committer's thread."""
    first = vault.journal.first_row()
    if vault.erasing is None or (first is not None and first <= vault.erasing):
        return
    if vault.journal.wal_checkpoint(wait=False):
        vault.erasing = None
