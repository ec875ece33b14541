"""The pure heart: head + mutation + time -> change or refusal.

Rules of this module: no I/O, no clock, no randomness, no grpc, no storage. Everything a decision needs comes
in as an argument, so every engine decides alike and hypothesis can test it against a naive model. Messages
are lines of JSON that `sessionstore.codec` has checked; nothing here looks inside one.

Order of checks, for every mutation: the windows (was this call answered before?), existence, the expected
revision, ranges. Revisions come from the engine, which promises that each is higher than every earlier one of
the same key.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from sessionstored.retention import NEVER_US, NO_RULES, Retention

EMPTY_METADATA = b"{}"


@dataclass(frozen=True, slots=True)
class Head:
    """A session without its messages, at one revision. Times are microseconds since the epoch, UTC."""

    key: str
    revision: int
    rewrite_revision: int
    """The revision of the last change that was not an append: messages held since then are still right."""
    message_count: int
    last_consolidated: int
    metadata: bytes
    create_time_us: int
    update_time_us: int
    damage: str = ""
    """What could not be read when the file was adopted; empty if it was whole."""
    expire_time_us: int = 0
    """When it ends by itself; 0: as the rules of its key say; NEVER_US: never."""


@dataclass(frozen=True, slots=True)
class Create:
    """Make a session that must not exist."""

    key: str
    messages: Sequence[bytes] = ()
    metadata: bytes = EMPTY_METADATA
    last_consolidated: int = 0
    create_time_us: int | None = None
    expected_revision: int | None = None
    expire_time_us: int = 0
    """0: none of its own."""


@dataclass(frozen=True, slots=True)
class Append:
    """Add messages at the end; creates the session if there is none."""

    key: str
    messages: Sequence[bytes]
    expected_revision: int | None = None


@dataclass(frozen=True, slots=True)
class Replace:
    """Put `messages` in the place of `delete_count` messages (None: all) from index `start` on."""

    key: str
    start: int
    delete_count: int | None
    messages: Sequence[bytes]
    expected_revision: int | None = None
    allow_appends: bool = False
    """Whether a later revision will do, too, if messages were only added at the end since."""


@dataclass(frozen=True, slots=True)
class Pop:
    """Remove the last message."""

    key: str
    expected_revision: int | None = None


@dataclass(frozen=True, slots=True)
class Update:
    """Change the head: metadata as a whole, or some of its top-level members, and `last_consolidated`."""

    key: str
    metadata: bytes | None = None
    """The new metadata as a whole; None leaves it."""
    members: dict[str, bytes | None] = field(default_factory=dict)
    """Member name -> its new JSON text, or None to remove it. Applied after `metadata`."""
    last_consolidated: int | None = None
    expected_revision: int | None = None
    expire_time_us: int | None = None
    """None leaves it; NEVER_US: it never ends by itself, whatever the rules of its key say."""


@dataclass(frozen=True, slots=True)
class Fork:
    """Make a new session of the first `at` messages (None: all) of another; it has no expire_time.

    `expected_revision` is the source's.
    """

    key: str
    source_key: str
    at: int | None = None
    expected_revision: int | None = None


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove a session."""

    key: str
    expected_revision: int | None = None


@dataclass(frozen=True, slots=True)
class Expire:
    """Remove a session if its time has come; else leave it as it is. Only an engine asks for this."""

    key: str
    expected_revision: int | None = None


Mutation = Create | Append | Replace | Pop | Update | Fork | Delete | Expire


@dataclass(frozen=True, slots=True)
class Answer:
    """What an applied mutation answers; small, because windows keep it."""

    revision: int
    previous_revision: int
    message_count: int
    last_consolidated: int
    update_time_us: int
    first_index: int = 0
    """Index of the first message that the mutation put in."""
    message: bytes | None = None
    """The message that a Pop removed; the engine fills it in."""
    ends_us: int = 0
    """When the session ends by itself, its own expire_time or its key's; 0: never."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a mutation or a read was refused: an ErrorReason's name without prefix, a sentence, metadata."""

    reason: str
    message: str
    metadata: dict[str, str] = field(default_factory=dict)


Outcome = Answer | Refusal


@dataclass(frozen=True, slots=True)
class Change:
    """What an applied mutation does to a session: messages[start : start + delete_count] = messages."""

    head: Head | None
    """The head afterwards; None if the session is gone."""
    start: int
    delete_count: int
    messages: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class Decision:
    """An outcome, and the change that goes with it: None for refusals and for what changes nothing."""

    outcome: Outcome
    change: Change | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds that only a decision can check."""

    metadata_bytes_max: int = 256 * 1024
    window_calls_max: int = 1024
    window_bytes_max: int = 1024 * 1024
    """Bytes of removed messages that the remembered answers of one client may hold."""
    window_request_ids_max: int = 1000
    window_age_max_s: int = 24 * 3600
    leases_max: int = 100_000
    retention: Retention = NO_RULES
    expiry_jump_max_s: float = 60.0
    """How far the wall clock may step ahead and sessions still expire by it at once."""
    expiry_confirm_s: float = 3600.0
    """After how much service a larger step is believed."""


DEFAULT_LIMITS = Limits()


def decide(
    head: Head | None,
    mutation: Mutation,
    *,
    revision: int,
    now_us: int,
    trusted_us: int | None = None,
    source: Head | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Decision:
    """Decide one mutation of a session. One that has expired is to be given as None.

    Args:
        head: the session as it is, or None if it does not exist.
        mutation: what is asked for, its arguments already checked for form.
        revision: the revision that the change gets; higher than any that this key ever had.
        now_us: the daemon's clock, microseconds since the epoch. It may jump; update_time never goes back.
        trusted_us: the clock that sessions expire by, never ahead of `now_us`; None: the same.
        source: for Fork, the head of the source.
        limits: the bounds in force.

    Returns:
        The outcome, and the change to store if there is one. Nothing is modified.

    """
    refusal = _precondition(head, mutation, source)
    if refusal is None and isinstance(mutation, Create | Update):
        refusal = _expire_time(mutation.expire_time_us, now_us if trusted_us is None else trusted_us)
    if refusal is not None:
        return Decision(refusal)
    decision = _decide(head, mutation, revision, now_us, source, limits)
    after = head if decision.change is None else decision.change.head
    if after is None or not isinstance(decision.outcome, Answer) or not (ends_us := ends(after, limits)):
        return decision
    return Decision(replace(decision.outcome, ends_us=ends_us), decision.change)


def _decide(
    head: Head | None,
    mutation: Mutation,
    revision: int,
    now_us: int,
    source: Head | None,
    limits: Limits,
) -> Decision:
    match mutation:
        case Create():
            return _create(mutation, revision, now_us)
        case Append():
            return _append(head, mutation, revision, now_us)
        case Fork():
            assert source is not None
            return _fork(source, mutation, revision, now_us)
    assert head is not None
    match mutation:
        case Replace():
            return _replace(head, mutation, revision, now_us)
        case Pop():
            return _pop(head, revision, now_us)
        case Delete():
            return _delete(head, revision, now_us)
        case Expire():  # its time has not come
            return Decision(_answer(head, head.revision))
    return _update(head, mutation, revision, now_us, limits)


def ends(head: Head, limits: Limits) -> int:
    """When a session ends by itself, microseconds since the epoch; 0: never."""
    return limits.retention.ends_us(head.key, head.expire_time_us, head.update_time_us)


def expired(head: Head, trusted_us: int, limits: Limits) -> bool:
    """Whether a session's time has come. From then on it is as if it were deleted."""
    return 0 < ends(head, limits) <= trusted_us


def expire(head: Head, revision: int, now_us: int) -> Decision:
    """The end of a session whose time has come: as if somebody deleted it."""
    return _delete(head, revision, now_us)


def tail_start(head: Head, known_revision: int, known_message_count: int) -> int:
    """The index from which messages are news to one who holds the first `known_message_count` of a revision.

    0, that is everything, unless no message was rewritten since that revision.
    """
    held = _holds(head, known_revision)
    return known_message_count if held and known_message_count <= head.message_count else 0


def _holds(head: Head, revision: int) -> bool:
    """Whether the session still begins with all messages of that revision."""
    return head.rewrite_revision <= revision <= head.revision


def _precondition(head: Head | None, mutation: Mutation, source: Head | None) -> Refusal | None:
    """Existence and expected revision."""
    subject, key = head, mutation.key
    if isinstance(mutation, Create | Fork) and head is not None:
        return Refusal(
            "SESSION_EXISTS",
            f"session {key!r} exists already, at revision {head.revision}",
            {"key": key, "revision": str(head.revision), "message_count": str(head.message_count)},
        )
    if isinstance(mutation, Fork):
        subject, key = source, mutation.source_key
    if subject is None and not isinstance(mutation, Create | Append):
        return not_found(key)
    expected = mutation.expected_revision
    actual = subject.revision if subject else 0
    if expected is None or expected == actual:
        return None
    if isinstance(mutation, Replace) and mutation.allow_appends and subject and _holds(subject, expected):
        return None
    count = subject.message_count if subject else 0
    return Refusal(
        "REVISION_CONFLICT",
        f"session {key!r} is at revision {actual}, not {expected}: somebody else changed it; "
        "read it again, then decide",
        {
            "key": key,
            "expected_revision": str(expected),
            "revision": str(actual),
            "message_count": str(count),
        },
    )


def _expire_time(expire_time_us: int | None, trusted_us: int) -> Refusal | None:
    """An expire_time that is set lies in the future."""
    if expire_time_us in (None, 0, NEVER_US) or expire_time_us > trusted_us:
        return None
    return Refusal(
        "ARGUMENT_INVALID",
        "expire_time does not lie in the future",
        {"field": "expire_time", "detail": f"{trusted_us - expire_time_us} us ago"},
    )


def not_found(key: str) -> Refusal:
    """The refusal for a session that does not exist."""
    return Refusal(
        "SESSION_NOT_FOUND", f"no session has the key {key!r}; the first append creates one", {"key": key}
    )


def _create(mutation: Create, revision: int, now_us: int) -> Decision:
    count = len(mutation.messages)
    if not 0 <= mutation.last_consolidated <= count:
        return Decision(_consolidated_out_of_range(mutation.last_consolidated, count))
    created = now_us if mutation.create_time_us is None else mutation.create_time_us
    if created > now_us:
        return Decision(
            Refusal(
                "ARGUMENT_INVALID",
                "create_time lies in the future",
                {"field": "create_time", "detail": f"{created - now_us} us in the future"},
            )
        )
    head = Head(
        mutation.key,
        revision,
        revision,
        count,
        mutation.last_consolidated,
        mutation.metadata,
        created,
        now_us,
        expire_time_us=mutation.expire_time_us,
    )
    return Decision(_answer(head, 0), Change(head, 0, 0, mutation.messages))


def _append(head: Head | None, mutation: Append, revision: int, now_us: int) -> Decision:
    if head is None:
        head = Head(mutation.key, 0, revision, 0, 0, EMPTY_METADATA, now_us, now_us)
    first = head.message_count
    after = replace(
        head,
        revision=revision,
        message_count=first + len(mutation.messages),
        update_time_us=_later(head, now_us),
    )
    return Decision(_answer(after, head.revision, first), Change(after, first, 0, mutation.messages))


def _fork(source: Head, mutation: Fork, revision: int, now_us: int) -> Decision:
    at = source.message_count if mutation.at is None else mutation.at
    if not 0 <= at <= source.message_count:
        return Decision(_index_out_of_range("at", at, source.message_count))
    head = Head(
        mutation.key,
        revision,
        revision,
        at,
        min(source.last_consolidated, at),
        source.metadata,
        now_us,
        now_us,
    )
    return Decision(_answer(head, 0), Change(head, 0, 0, ()))


def _replace(head: Head, mutation: Replace, revision: int, now_us: int) -> Decision:
    start, count = mutation.start, head.message_count
    if not 0 <= start <= count:
        return Decision(_index_out_of_range("start", start, count))
    deleted = count - start if mutation.delete_count is None else mutation.delete_count
    if not 0 <= deleted <= count - start:
        return Decision(_index_out_of_range("delete_count", start + deleted, count))
    if not deleted and not mutation.messages:
        return Decision(_answer(head, head.revision, start))
    return _rewrite(head, start, deleted, mutation.messages, revision, now_us)


def _delete(head: Head, revision: int, now_us: int) -> Decision:
    answer = Answer(revision, head.revision, 0, 0, _later(head, now_us))
    return Decision(answer, Change(None, 0, head.message_count, ()))


def _pop(head: Head, revision: int, now_us: int) -> Decision:
    if head.message_count == 0:
        return Decision(_index_out_of_range("message", -1, 0))
    return _rewrite(head, head.message_count - 1, 1, (), revision, now_us)


def _rewrite(
    head: Head, start: int, deleted: int, messages: Sequence[bytes], revision: int, now_us: int
) -> Decision:
    """Replace a range. What only adds at the end is an append to readers: what they hold stays right."""
    count = head.message_count - deleted + len(messages)
    after = replace(
        head,
        revision=revision,
        rewrite_revision=head.rewrite_revision if start == head.message_count else revision,
        message_count=count,
        last_consolidated=min(head.last_consolidated, count),
        update_time_us=_later(head, now_us),
    )
    return Decision(_answer(after, head.revision, start), Change(after, start, deleted, messages))


def _update(head: Head, mutation: Update, revision: int, now_us: int, limits: Limits) -> Decision:
    consolidated = head.last_consolidated
    if mutation.last_consolidated is not None:
        consolidated = mutation.last_consolidated
        if not 0 <= consolidated <= head.message_count:
            return Decision(_consolidated_out_of_range(consolidated, head.message_count))
    metadata = head.metadata if mutation.metadata is None else mutation.metadata
    if mutation.members:
        metadata = _with_members(metadata, mutation.members)
    # What is stored already may exceed the limit (adopted, or of a higher one): it blocks no other change.
    if metadata != head.metadata and len(metadata) > limits.metadata_bytes_max:
        return Decision(
            Refusal(
                "METADATA_TOO_LARGE",
                f"metadata would be {len(metadata)} bytes, more than {limits.metadata_bytes_max}",
                {"size_bytes": str(len(metadata)), "limit_bytes": str(limits.metadata_bytes_max)},
            )
        )
    ends_us = head.expire_time_us if mutation.expire_time_us is None else mutation.expire_time_us
    before = (head.metadata, head.last_consolidated, head.expire_time_us)
    if (metadata, consolidated, ends_us) == before:
        return Decision(_answer(head, head.revision))
    after = replace(
        head,
        revision=revision,
        metadata=metadata,
        last_consolidated=consolidated,
        expire_time_us=ends_us,
        update_time_us=_later(head, now_us),
    )
    return Decision(_answer(after, head.revision), Change(after, head.message_count, 0, ()))


def _with_members(metadata: bytes, members: dict[str, bytes | None]) -> bytes:
    """Set or remove top-level members; the others keep order and bytes. No change gives the same bytes."""
    before = split_members(metadata)
    after = dict(before)
    for name, value in members.items():
        if value is None:
            after.pop(name, None)
        else:
            after[name] = value
    if after == before:
        return metadata
    return b"{" + b", ".join(_name(name) + b": " + value for name, value in after.items()) + b"}"


def split_members(metadata: bytes) -> dict[str, bytes]:
    """The top-level members of a JSON object: name -> its value's text as it stands there, never typed anew.

    Of two members of one name the last counts, as for Python's json.
    """
    text = metadata.decode()
    members: dict[str, bytes] = {}
    at = _between(text, text.index("{") + 1)
    while text[at] != "}":
        name, end = _SCANNER.raw_decode(text, at)
        start = _between(text, end)
        _, end = _SCANNER.raw_decode(text, start)
        members[name] = text[start:end].encode()
        at = _between(text, end)
    return members


# Finds where a value ends. Numbers stay text: 5,000 digits or 1e999 are the caller's own business.
_SCANNER = json.JSONDecoder(parse_int=str, parse_float=str)
_SEPARATORS = re.compile(r"[ \t\r\n,:]*")


def _between(text: str, at: int) -> int:
    """The index of the next name, value or closing brace."""
    return _SEPARATORS.match(text, at).end()  # type: ignore[union-attr]


def _name(name: str) -> bytes:
    """A member's name as JSON. Half a surrogate pair, which adopted files may hold, becomes its escape."""
    return json.dumps(name, ensure_ascii=False).encode(errors="backslashreplace")


def _later(head: Head, now_us: int) -> int:
    """The time of a change: the clock's, but never before the session's last change."""
    return max(head.update_time_us, now_us)


def _answer(head: Head, previous_revision: int, first_index: int = 0) -> Answer:
    return Answer(
        head.revision,
        previous_revision,
        head.message_count,
        head.last_consolidated,
        head.update_time_us,
        first_index,
    )


def _index_out_of_range(name: str, index: int, count: int) -> Refusal:
    return Refusal(
        "INDEX_OUT_OF_RANGE",
        f"{name} {index} is out of range: the session has {count} messages",
        {"field": name, "index": str(index), "message_count": str(count)},
    )


def _consolidated_out_of_range(value: int, count: int) -> Refusal:
    return Refusal(
        "LAST_CONSOLIDATED_OUT_OF_RANGE",
        f"last_consolidated {value} is out of range: the session has {count} messages",
        {"index": str(value), "message_count": str(count)},
    )
