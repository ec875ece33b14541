"""A group in the making: requests settled one after the other against drafts, and the journal row of them.

Nothing here changes a state: until its row is committed, a group can be dropped as if it had never been.
What a decision needs is loaded before the decision, so that a damaged file refuses its own request only.
For the committer's thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

from sessionstored.engine import Refused, Reply, Request
from sessionstored.engine.events import Deleted, Event, changed, lease_told
from sessionstored.engine.jsonl.answers import StoredRequest
from sessionstored.engine.jsonl.catalogue import Entry
from sessionstored.engine.jsonl.files import CHANGED, FileChanged
from sessionstored.engine.jsonl.records import CallRecord, DeleteRecord, LeaseRecord, RequestRecord, Row
from sessionstored.engine.jsonl.state import Draft, State, data_loss, reading_journal
from sessionstored.engine.jsonl.vault import Vault
from sessionstored.engine.settle import settle
from sessionstored.leases import Lease, LeaseEvent, Release, Renew
from sessionstored.rules import Change, Fork, Head, Refusal, Replace
from sessionstored.windows import CallWindow, Remembered

# Of a session that changes, metadata up to this size is in each record: a watcher who comes later gets the
# head from there. One whose record lacks it gets the session whole.
METADATA_ALWAYS_BYTES_MAX = 1024
_LAPSES_PER_GROUP = 1000


@dataclass(frozen=True, slots=True)
class PreparedFork:
    """A fork's file, flushed under its temporary name: the first `entry.head.message_count` messages."""

    entry: Entry
    source_rewrite_revision: int


class Group:
    """The view that a group is settled against, and what comes of it."""

    def __init__(self, vault: Vault, now_us: int, clock_s: float) -> None:
        self.vault = vault
        self.now_us, self.clock_s = now_us, clock_s
        self.trusted_us = vault.trusted.now_us()
        self.row = Row()
        self.drafts: dict[str, Draft] = {}
        self.windows: dict[str, CallWindow] = {}
        self.requests: dict[tuple[str, str], StoredRequest] = {}
        self.entries: list[Entry] = []
        self.leases: dict[str, Lease | None] = {}
        """What became of leases; None for those that have ended."""
        self._leases_more = 0
        """How many leases there are more than before this group."""
        self._lapses_noticed = False
        self.events: list[Event] = []
        self.recorded: set[str] = set()
        self._numbers: dict[str, int] = {}
        """Of each session the number of its newest request_id: a group that is dropped takes none."""
        self._request: Request | None = None
        self._fork: PreparedFork | None = None
        self._kept: Sequence[bytes] = ()
        """The messages of the state that the request under way keeps behind what it changes, or copies."""

    def settle(self, request: Request, fork: PreparedFork | None, obstacle: Refusal | None) -> Reply:
        """Settle one request.

        Args:
            request: what is asked for.
            fork: what was prepared, if it is a fork.
            obstacle: why nothing new can be decided now.

        """
        vault = self.vault
        self._request, self._fork, self._kept = request, fork, ()
        self._load(request)
        try:
            settled = settle(
                request,
                self,
                revision=vault.revision + 1,
                now_us=self.now_us,
                clock_s=self.clock_s,
                limits=vault.limits,
                obstacle=obstacle,
            )
        except Refused as damaged:  # nobody knows whether this call was answered before
            return Reply(damaged.refusal)
        if settled.expired:
            vault.revision += 1
            self._record_deletion(self._draft(request.mutation.key), expired=True)
        if settled.change is not None:
            vault.revision += 1
            self._record(request, settled.change)
        if settled.recorded and request.call is not None:
            call = request.call
            self.recorded.add(call.client_id)
            # Also an answer that the window has no room for: it raised the floor.
            remembered = Remembered(request.digest, settled.reply.outcome)
            self.row.call(CallRecord(call.client_id, call.sequence, call.answered_through, remembered))
        return settled.reply

    def _load(self, request: Request) -> None:
        """Load what a request speaks of before it gets a revision: a file that was edited takes one, too."""
        mutation = request.mutation
        if isinstance(mutation, Renew | Release):
            return  # that has nothing to do with what the session holds
        for key in (mutation.source_key, mutation.key) if isinstance(mutation, Fork) else (mutation.key,):
            try:
                self._draft(key)
            except Refused:
                return  # the decision comes upon it again, and says so

    # The view.

    def head(self, key: str, damaged: bool = False) -> Head | None:
        """The head as this group leaves it."""
        draft = self._draft(key)
        if draft.state.refusal is not None and not damaged and not draft.fresh:
            raise Refused(draft.state.refusal)
        mutation = self._request.mutation if self._request else None
        if isinstance(mutation, Replace) and draft.head is not None:
            deleted = draft.head.message_count if mutation.delete_count is None else mutation.delete_count
            end = mutation.start + deleted
            if 0 <= mutation.start < draft.keep and end < draft.keep:
                self._kept = self._lines(draft, end, draft.keep)
        elif isinstance(mutation, Fork) and key == mutation.source_key and self._fork is not None:
            at = draft.keep if mutation.at is None else min(mutation.at, draft.keep)
            self._kept = self._lines(draft, self._fork.entry.head.message_count, at)
        return draft.head

    def expired(self, head: Head) -> bool:
        """Whether a session has expired. A damaged one does not: it is to be repaired or deleted."""
        return self.kept_lease(head.key) is None and self._is_over(head)

    def _is_over(self, head: Head) -> bool:
        """Whether a session's time has come, whatever lease it has."""
        draft = self._draft(head.key)
        served = draft.fresh or draft.state.refusal is None
        return served and self.vault.is_over(head, self.trusted_us)

    def last_message(self, key: str) -> bytes:
        """The last message as this group leaves it."""
        draft = self._draft(key)
        return draft.added[-1] if draft.added else self._lines(draft, draft.keep - 1, draft.keep)[0]

    def call_window(self, client_id: str) -> CallWindow:
        """A copy of a client's window, published only after the commit."""
        window = self.windows.get(client_id)
        if window is None:
            with reading_journal():
                window = self.windows[client_id] = self.vault.windows.call_window(client_id)
        return window

    def remembered(self, key: str, request_id: str) -> Remembered | None:
        """What is kept under a request_id."""
        stored = self.requests.get((key, request_id))
        if stored is None:
            with reading_journal():
                stored = self.vault.windows.stored_request(key, request_id)
        return stored.remembered if stored else None

    def remember(self, key: str, request_id: str, remembered: Remembered) -> None:
        """Keep it."""
        if key not in self._numbers:
            with reading_journal():
                self._numbers[key] = self.vault.windows.request_number(key)
        number = self._numbers[key] = self._numbers[key] + 1
        self.requests[key, request_id] = StoredRequest(number, self.clock_s, remembered)
        self.row.request(RequestRecord(key, request_id, remembered))

    def kept_lease(self, key: str) -> Lease | None:
        """A session's lease as this group leaves it."""
        return self.leases[key] if key in self.leases else self.vault.leases.get(key)

    def change_lease(self, lease: Lease, event: LeaseEvent) -> None:
        """Keep what became of a lease. A renewal has no record: a start gives the full ttl anyway."""
        self._leases_more += event.in_force - (self.kept_lease(lease.key) is not None)
        self.leases[lease.key] = lease if event.in_force else None
        if event is LeaseEvent.ACQUIRED:
            self.vault.revision = lease.token
        if event is not LeaseEvent.RENEWED:
            self.row.lease(LeaseRecord(event, lease))
            self.events.append(lease_told(lease, event))

    def lease_count(self) -> int:
        """How many leases there are. At the bound, some of those that have run out end here."""
        limit, leases = self.vault.limits.leases_max, self.vault.leases
        if len(leases) + self._leases_more >= limit and not self._lapses_noticed:
            self._lapses_noticed = True
            for key in islice(leases.lapsed(self.clock_s), _LAPSES_PER_GROUP):
                lease = self.kept_lease(key)
                if lease is not None and not lease.in_force(self.clock_s):
                    self.change_lease(lease, LeaseEvent.LAPSED)
        return len(leases) + self._leases_more

    # Drafts.

    def _draft(self, key: str) -> Draft:
        """The draft of a session, begun from its state."""
        draft = self.drafts.get(key)
        if draft is None:
            state = self.vault.state(key)
            draft = self.drafts[key] = Draft(state, state.head, state.count)
        return draft

    def _lines(self, draft: Draft, start: int, stop: int) -> Sequence[bytes]:
        """Messages of a draft's state."""
        try:
            return self.vault.lines(draft.state, start, stop)
        except FileChanged:
            state: State = draft.state
            raise Refused(data_loss(state.key, state.file.name, 0, CHANGED)) from None

    def _record(self, request: Request, change: Change) -> None:
        """Put a change into the row and into its session's draft."""
        key = request.mutation.key
        draft = self._draft(key)
        if change.head is None:
            self._record_deletion(draft)
            return
        extra: dict[str, str | int] = {}
        head = change.head
        before, source_key = draft.head, ""
        if len(head.metadata) <= METADATA_ALWAYS_BYTES_MAX:
            extra["metadata"] = head.metadata.decode()
        if head.damage:
            extra["damage"] = head.damage
        if before is None:
            extra["metadata"] = head.metadata.decode()
            if isinstance(request.mutation, Fork):
                extra["source"] = source_key = request.mutation.source_key
                change = self._record_fork(request.mutation, change)
                draft.forked, draft.keep = self.entries[-1], change.start
            else:
                draft.file = draft.file or self.vault.file_for(draft.state)
                extra["file"] = draft.file
                draft.keep = 0
        elif head.metadata != before.metadata:
            extra["metadata"] = head.metadata.decode()
        previous = before.revision if before else 0
        suffix = self._kept if change.start + change.delete_count < draft.keep else ()
        self.row.change(head, previous, change.start, change.delete_count, list(change.messages), extra)
        self.events.append(changed(head, previous, change, source_key))
        draft.change(change, suffix)

    def _record_deletion(self, draft: Draft, *, expired: bool = False) -> None:
        """A tombstone for the session, and one for each file that goes with it."""
        state, revision = draft.state, self.vault.revision
        previous = draft.head.revision if draft.head else 0
        marks = (state.file.blocks.mark, state.file.durable)
        for name in self.vault.files_of(state) if not draft.fresh else ():
            aside = state.refusal is not None
            self.row.delete(DeleteRecord(state.key, revision, name, marks, aside, previous, expired))
        self.row.delete(DeleteRecord(state.key, revision, previous_revision=previous, expired=expired))
        self.events.append(Event(state.key, revision, previous, Deleted(expired)))
        draft.delete(revision)

    def fork_is_fresh(self, request: Request, prepared: PreparedFork | None) -> bool:
        """Whether what was prepared for a fork still fits; a fork that will be refused needs nothing."""
        fork = request.mutation
        if not isinstance(fork, Fork):
            return True
        try:
            source, target = self._draft(fork.source_key), self._draft(fork.key)
        except Refused:
            return True
        if source.head is None or source.state.refusal or target.state.refusal or self.expired(source.head):
            return True
        lease = self.kept_lease(fork.key)
        held = lease is not None and lease.in_force(self.clock_s)
        if target.head is not None and (held or not self._is_over(target.head)):
            return True
        at = source.head.message_count if fork.at is None else fork.at
        if not 0 <= at <= source.head.message_count:
            return True
        return (
            prepared is not None
            and prepared.source_rewrite_revision == source.head.rewrite_revision
            and prepared.entry.head.message_count <= at
        )

    def _record_fork(self, fork: Fork, change: Change) -> Change:
        """The catalogue row of the prepared file, and the change that adds what came after it."""
        assert self._fork is not None
        assert change.head is not None
        entry = self._fork.entry
        filed = entry.head.message_count
        source = self._draft(fork.source_key)
        at = change.head.message_count
        added = [*self._kept, *source.added[max(0, filed - source.keep) : max(0, at - source.keep)]]
        revision = change.head.revision - 1  # the row's change comes on top, in recovery too
        self.entries.append(
            replace(entry, head=replace(entry.head, revision=revision, rewrite_revision=revision))
        )
        return Change(change.head, filed, 0, added)
