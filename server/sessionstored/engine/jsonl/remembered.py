"""The exactly-once windows of one store: those in force, over those that the database has.

What a group publishes is in force at once; the database gets it with the next checkpoint, and until then the
journal has it. For the committer's thread only.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable

from sessionstored.engine.jsonl.answers import StoredRequest
from sessionstored.engine.jsonl.journal import Journal
from sessionstored.engine.jsonl.records import CallRecord, RequestRecord
from sessionstored.engine.jsonl.tables import WrongRow
from sessionstored.rules import Limits
from sessionstored.windows import Call, CallWindow

log = logging.getLogger(__name__)


class Windows:
    """What was answered, by client and by request_id."""

    def __init__(
        self, journal: Journal, limits: Limits, clock_s: Callable[[], float], in_memory_max: int
    ) -> None:
        self._journal, self._limits, self._clock_s = journal, limits, clock_s
        self._in_memory_max = in_memory_max
        self.dirty_clients: dict[str, CallWindow] = {}
        """In force, and not yet in the database."""
        self.dirty_requests: dict[tuple[str, str], StoredRequest] = {}
        self._clients: OrderedDict[str, CallWindow] = OrderedDict()
        self._numbers: dict[str, int] = {}

    def call_window(self, client_id: str) -> CallWindow:
        """A copy of a client's window; an empty one if it is unknown."""
        window = self.dirty_clients.get(client_id) or self._clients.get(client_id)
        if window is None:
            known = self._journal.answers.call_window(client_id)
            window = known or CallWindow(last_contact_s=self._clock_s())
            self._clients[client_id] = window
            while len(self._clients) > self._in_memory_max:
                self._clients.popitem(last=False)
        if window.expired(self._clock_s(), self._limits):
            return CallWindow(last_contact_s=self._clock_s())
        return CallWindow(window.floor, window.last_contact_s, dict(window.answers))

    def stored_request(self, key: str, request_id: str) -> StoredRequest | None:
        """What is kept under a request_id, unless it is over its limits."""
        stored = self.dirty_requests.get((key, request_id)) or self._journal.answers.request(key, request_id)
        if stored is None or self._clock_s() - stored.at_s > self._limits.window_age_max_s:
            return None
        newest = self.request_number(key)
        return stored if stored.n > newest - self._limits.window_request_ids_max else None

    def request_number(self, key: str) -> int:
        """The number of a session's newest request_id; 0 if there is none."""
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = self._journal.answers.last_request_number(key)
        return number

    def publish(self, clients: dict[str, CallWindow], requests: dict[tuple[str, str], StoredRequest]) -> None:
        """Make a group's windows the ones in force."""
        self.dirty_clients.update(clients)
        self._clients.update(clients)
        self.dirty_requests.update(requests)
        for (key, _), stored in requests.items():
            self._numbers[key] = max(stored.n, self._numbers.get(key, 0))

    def written(self, clients: dict[str, CallWindow], requests: dict[tuple[str, str], StoredRequest]) -> None:
        """These are in the database now."""
        for client_id, window in clients.items():
            if self.dirty_clients.get(client_id) is window:
                del self.dirty_clients[client_id]
        for name, stored in requests.items():
            if self.dirty_requests.get(name) is stored:
                del self.dirty_requests[name]
        if len(self._numbers) > self._in_memory_max and not self.dirty_requests:
            self._numbers.clear()  # the database knows the newest of each

    # Recovery.

    def replay_call(self, record: CallRecord, clock_s: float) -> None:
        """Take a journal record in; the database may have it already, and may have forgotten it since."""
        try:
            window = self.call_window(record.client_id)
        except WrongRow as wrong:  # stays so, and refuses this client's calls
            log.error("%s", wrong)
            return
        if record.sequence > window.floor and record.sequence not in window.answers:
            call = Call(record.client_id, record.sequence, record.answered_through)
            contact_s = max(clock_s, window.last_contact_s)
            window.record(call, record.remembered.digest, record.remembered.outcome, contact_s, self._limits)
            self.publish({record.client_id: window}, {})

    def replay_request(self, record: RequestRecord, clock_s: float) -> None:
        """Take a journal record in, unless the database has it already."""
        try:
            known = self._journal.answers.request(record.key, record.request_id)
        except WrongRow as wrong:  # stays so, and refuses what asks for it
            log.error("%s", wrong)
            return
        if known is None or known.remembered != record.remembered:
            stored = StoredRequest(self.request_number(record.key) + 1, clock_s, record.remembered)
            self.publish({}, {(record.key, record.request_id): stored})
