"""Exactly-once windows: what makes a mutation safe to send again.

Pure like `rules`: no I/O, no clock, no grpc. A window remembers answers; an engine keeps it durable in the
same commit as the change itself, and asks it before it decides. Time is the store's own clock in seconds,
which counts only while the store is served and never jumps, so no wall clock can expire an answer early.

A call identity is (client_id, sequence). The client says up to where it has every answer; those are
forgotten. What is at or below the floor is too old to know, and is refused rather than applied a second time.
A request_id is the caller's own name for a change of one session; only applied changes are remembered under
it, since a refused one never happened.
"""

from dataclasses import dataclass, field

from sessionstored.leases import AnyOutcome
from sessionstored.rules import DEFAULT_LIMITS, Answer, Limits, Refusal

# A copy tells its age as of when it was sent. It is decided later, after its way and its wait, and must still
# find the window that knows it: so a window outlives the age up to which calls are taken.
FORGET_SLACK_S = 3600


@dataclass(frozen=True, slots=True)
class Call:
    """A call identity as it came in. `age_s`: how long ago the client first sent it, by its own clock."""

    client_id: str
    sequence: int
    answered_through: int = 0
    age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Remembered:
    """An outcome, and a digest of the content that it answered."""

    digest: bytes
    outcome: AnyOutcome


@dataclass(slots=True)
class CallWindow:
    """The answers of one client. `floor` is the highest sequence that is forgotten."""

    floor: int = 0
    last_contact_s: float = 0.0
    answers: dict[int, Remembered] = field(default_factory=dict)

    def find(self, call: Call, digest: bytes, limits: Limits = DEFAULT_LIMITS) -> AnyOutcome | None:
        """The first answer of this call; a refusal if that cannot be known; None if the call is new."""
        where = {"client_id": call.client_id, "sequence": str(call.sequence)}
        known = self.answers.get(call.sequence)
        if known is not None:
            if known.digest == digest:
                return known.outcome
            return Refusal(
                "CALL_REUSED",
                f"call {call.sequence} of client {call.client_id} was made before with other "
                "content; a new call needs a new sequence number",
                where,
            )
        if call.sequence <= self.floor or call.age_s >= limits.window_age_max_s:
            return Refusal(
                "CALL_EXPIRED",
                f"call {call.sequence} of client {call.client_id} is too old to tell whether "
                "it was applied; it was not applied now; read the session to find out",
                where,
            )
        return None

    def record(
        self, call: Call, digest: bytes, outcome: AnyOutcome, now_s: float, limits: Limits = DEFAULT_LIMITS
    ) -> None:
        """Remember a new call's outcome, and forget what the client has, or what does not fit."""
        self.last_contact_s = now_s
        self.answers[call.sequence] = Remembered(digest, outcome)
        if call.answered_through > self.floor:
            self.floor = call.answered_through
            self.answers = {
                sequence: kept for sequence, kept in self.answers.items() if sequence > self.floor
            }
        while len(self.answers) > limits.window_calls_max or self._holds_too_much(outcome, limits):
            self.floor = min(self.answers)
            del self.answers[self.floor]

    def _holds_too_much(self, newest: AnyOutcome, limits: Limits) -> bool:
        """Whether the messages that answers hold are over their bound; only a new one can do that."""
        if len(self.answers) < 2 or not isinstance(newest, Answer) or newest.message is None:
            return False
        outcomes = (kept.outcome for kept in self.answers.values())
        held = sum(len(each.message or b"") for each in outcomes if isinstance(each, Answer))
        return held > limits.window_bytes_max

    def expired(self, now_s: float, limits: Limits = DEFAULT_LIMITS) -> bool:
        """Whether the client has been silent for so long that no copy can come that this window must know."""
        return now_s - self.last_contact_s > limits.window_age_max_s + FORGET_SLACK_S


def find_request(known: Remembered | None, key: str, request_id: str, digest: bytes) -> AnyOutcome | None:
    """The first answer of this request_id; a refusal if it was used with other content; None if it is new."""
    if known is None:
        return None
    if known.digest == digest:
        return known.outcome
    return Refusal(
        "REQUEST_ID_REUSED",
        f"request_id {request_id!r} was used on session {key!r} before with other content",
        {"key": key, "request_id": request_id},
    )


def remembered_by_request_id(outcome: AnyOutcome) -> bool:
    """Whether an outcome is kept under its request_id: only changes that happened are."""
    return isinstance(outcome, Answer)
