"""Sweeping: sessions whose time has come are removed, and leases that ran out end, by the committer.

Nobody sees an expired session, swept or not: this is for the room that it takes, and so that nothing of it is
left. The sweep only proposes: the committer decides, in order with all other changes, and a session that was
changed meanwhile, or for which a lease makes its end wait, stays. For the maintenance thread.
"""

import logging
import threading
from collections.abc import Sequence

from sessionstored.engine import Request
from sessionstored.engine.jsonl.committer import Committer, Job
from sessionstored.engine.jsonl.vault import Vault
from sessionstored.leases import AnyOutcome, Release
from sessionstored.rules import Answer, Expire

log = logging.getLogger(__name__)

_PER_GROUP = 50
_PER_SWEEP = 2000
_REQUEST_BYTES = 512
_LOOK_S = 1.0
_NO_TOKEN = 0
"""Releases no lease; but one that ran out is found to have done so."""


class Expiring:
    """The sweep, and how far it is."""

    def __init__(self, vault: Vault, committer: Committer) -> None:
        self._vault, self._committer = vault, committer
        self._after = (0, "")
        """(end, key) of the last session that the catalogue proposed."""

    def sweep(self) -> bool:
        """End leases and sessions, up to a number of each. Returns whether there may be more."""
        lapsed = self._committer.run(self._lapsed).result()
        found = 0
        for begin in range(0, len(lapsed), _PER_GROUP):
            group = [Request(Release(key, _NO_TOKEN)) for key in lapsed[begin : begin + _PER_GROUP]]
            found += len(self._submit(group))
        proposed = self._changed()
        rows = self._vault.reading(
            lambda reader: reader.expiring(self._vault.trusted.now_us(), self._after, _PER_SWEEP)
        )
        proposed += [key for _, key in rows]
        more = len(rows) == _PER_SWEEP
        self._after = rows[-1] if more else (0, "")
        more |= found == _PER_SWEEP
        ended = 0
        for begin in range(0, len(proposed), _PER_GROUP):
            ended += self._expire(proposed[begin : begin + _PER_GROUP])
        if ended:
            log.info("%d sessions expired", ended)
        return more

    def _lapsed(self) -> list[str]:
        """Sessions whose lease has run out. On the committer's thread."""
        return self._vault.leases.lapsed(self._vault.clock_s())[:_PER_SWEEP]

    def _changed(self) -> list[str]:
        """Sessions that changed since the catalogue had them, and have expired."""
        with self._vault.lock:
            heads = [state.head for state in self._vault.dirty.values() if state.head is not None]
        return [head.key for head in heads if self._vault.is_over(head)]

    def _expire(self, keys: Sequence[str]) -> int:
        """Have the committer remove what has expired. Returns how many did."""
        outcomes = self._submit([Request(Expire(key)) for key in keys])
        return sum(isinstance(each, Answer) and each.revision > each.previous_revision for each in outcomes)

    def _submit(self, requests: Sequence[Request]) -> list[AnyOutcome]:
        """Have the committer decide. Returns the outcomes; none if storage failed, or had no room."""
        decided = threading.Event()
        job = Job(requests, _REQUEST_BYTES * len(requests), lambda _: decided.set())
        self._committer.put(job)
        while not decided.wait(_LOOK_S):
            if self._committer.failure:
                return []
        return [reply.outcome for reply in job.replies] if job.error is None else []
