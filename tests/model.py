"""The naive model: sessions as a dict of lists, written from the words of the proto.

It is the oracle of the property tests: of the rules, of every engine, and of whole daemons. It shares the
mutations' dataclasses with `sessionstored.rules`, so that both sides are asked the same, and nothing of
its logic.

`Model.check(mutation, outcome, ...)` says what must come of a mutation, compares, and makes the same
change. The revisions are the store's own: the model learns each and holds it against all that it saw
before under that key.
"""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from hypothesis import strategies as st
from sessionstored.rules import (
    Answer,
    Append,
    Create,
    Delete,
    Fork,
    Mutation,
    Outcome,
    Pop,
    Refusal,
    Replace,
    Update,
)

ERRORS_PROTO = Path(__file__).parent.parent / "proto/sessionstore/v1/errors.proto"

# Stand for revisions that are only known when the mutation is made.
CURRENT, STALE = -1, -2

KEYS = ("a", "a:b", "ключ/✓")


def documented_metadata() -> dict[str, set[str]]:
    """What the contract says about each reason: its metadata keys."""
    found = {}
    for reason, comment in re.findall(
        r"// ERROR_REASON_(\w+):((?:.*\n\s*//)*.*)\n", ERRORS_PROTO.read_text(encoding="utf-8")
    ):
        sentence = re.search(r"Metadata:([^.]*)\.", re.sub(r"\s*\n\s*//", " ", comment))
        text = re.sub(r"\([^)]*\)", "", sentence.group(1)) if sentence else ""
        found[reason] = {name.strip() for name in text.split(",") if name.strip()}
    return found


METADATA_KEYS = documented_metadata()


@dataclass
class Session:
    messages: list[bytes] = field(default_factory=list)
    metadata: bytes = b"{}"
    last_consolidated: int = 0
    create_time_us: int | None = None
    """None: the store's clock; it is learnt from the answer."""
    update_time_us: int = 0
    revision: int = 0


@dataclass
class No:
    reason: str
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass
class Yes:
    after: Session | None
    changed: bool = True
    first_index: int = 0
    message: bytes | None = None


def same(what: str, got: object, want: object) -> None:
    assert got == want, f"{what}: got {got!r}, want {want!r}"


def members(metadata: bytes) -> list[tuple[str, object]]:
    """The metadata's members in order, numbers as they are written."""
    return list(json.loads(metadata, parse_float=str, parse_int=str).items())


class Model:
    def __init__(self, metadata_bytes_max: int = 256 * 1024) -> None:
        self.sessions: dict[str, Session] = {}
        self.highest: dict[str, int] = {}
        self.metadata_bytes_max = metadata_bytes_max

    def resolve(self, mutation: Mutation) -> Mutation:
        """Put revisions in the place of CURRENT and STALE, and shorten texts to what the form allows."""
        expected = mutation.expected_revision
        if expected not in (CURRENT, STALE):
            return mutation
        subject = mutation.source_key if isinstance(mutation, Fork) else mutation.key
        session = self.sessions.get(subject)
        current = session.revision if session else 0
        return replace(mutation, expected_revision=current + (0 if expected == CURRENT else 1))

    def check(self, mutation: Mutation, outcome: Outcome, earliest_us: int, latest_us: int) -> None:
        """Hold an outcome against the model, and make the change. The two times enclose the store's clock."""
        want = self.expect(mutation, earliest_us)
        if isinstance(want, No):
            assert isinstance(outcome, Refusal), f"{mutation} got {outcome}, want {want}"
            same(f"{mutation}: reason", outcome.reason, want.reason)
            for name, value in want.metadata.items():
                same(f"{want.reason}: {name}", outcome.metadata[name], value)
            same(f"{want.reason}: keys", set(outcome.metadata), METADATA_KEYS[want.reason])
            return
        assert isinstance(outcome, Answer), f"{mutation} got {outcome}, want {want}"
        before = self.sessions.get(mutation.key)
        after = want.after or Session()
        previous = before.revision if before else 0
        same("previous_revision", outcome.previous_revision, previous)
        same("message_count", outcome.message_count, len(after.messages))
        same("last_consolidated", outcome.last_consolidated, after.last_consolidated)
        same("first_index", outcome.first_index, want.first_index)
        same("message", outcome.message, want.message)
        if not want.changed:
            assert before is not None
            same("revision of what changes nothing", outcome.revision, previous)
            same("update_time of what changes nothing", outcome.update_time_us, before.update_time_us)
            return
        highest = self.highest.get(mutation.key, 0)
        assert outcome.revision > highest, f"revision {outcome.revision} is not above {highest}"
        self.highest[mutation.key] = outcome.revision
        floor = before.update_time_us if before else 0
        earliest, latest = max(floor, earliest_us), max(floor, latest_us)
        assert earliest <= outcome.update_time_us <= latest, (
            f"update_time {outcome.update_time_us} is not within {earliest} to {latest}"
        )
        if want.after is None:
            del self.sessions[mutation.key]
            return
        want.after.revision = outcome.revision
        want.after.update_time_us = outcome.update_time_us
        if want.after.create_time_us is None:
            want.after.create_time_us = outcome.update_time_us
        self.sessions[mutation.key] = want.after

    def expect(self, mutation: Mutation, now_us: int) -> Yes | No:
        """What must come of a mutation."""
        session = copy.deepcopy(self.sessions.get(mutation.key))
        match mutation:
            case Create():
                return self._create(session, mutation, now_us)
            case Append():
                return self._append(session, mutation)
            case Replace():
                return self._changed(session, mutation, lambda found: self._replace(found, mutation))
            case Pop():
                return self._changed(session, mutation, self._pop)
            case Update():
                return self._changed(session, mutation, lambda found: self._update(found, mutation))
            case Fork():
                return self._fork(session, mutation)
            case Delete():
                return self._changed(session, mutation, lambda _: Yes(None))

    def _changed(
        self, session: Session | None, mutation: Mutation, change: Callable[[Session], Yes | No]
    ) -> Yes | No:
        if session is None:
            return No("SESSION_NOT_FOUND", {"key": mutation.key})
        return self._conflict(mutation.key, mutation) or change(session)

    def _conflict(self, key: str, mutation: Mutation) -> No | None:
        session = self.sessions.get(key)
        revision = session.revision if session else 0
        expected = mutation.expected_revision
        if expected is None or expected == revision:
            return None
        return No(
            "REVISION_CONFLICT",
            {
                "key": key,
                "expected_revision": str(expected),
                "revision": str(revision),
                "message_count": str(len(session.messages) if session else 0),
            },
        )

    def _exists(self, key: str, session: Session) -> No:
        where = {"key": key, "revision": str(session.revision)}
        return No("SESSION_EXISTS", where | {"message_count": str(len(session.messages))})

    def _create(self, session: Session | None, create: Create, now_us: int) -> Yes | No:
        if session is not None:
            return self._exists(create.key, session)
        conflict = self._conflict(create.key, create)
        if conflict is not None:
            return conflict
        count = len(create.messages)
        if create.last_consolidated < 0 or create.last_consolidated > count:
            where = {"index": str(create.last_consolidated), "message_count": str(count)}
            return No("LAST_CONSOLIDATED_OUT_OF_RANGE", where)
        if create.create_time_us is not None and create.create_time_us > now_us:
            return No("ARGUMENT_INVALID", {"field": "create_time"})
        return Yes(
            Session(list(create.messages), create.metadata, create.last_consolidated, create.create_time_us)
        )

    def _append(self, session: Session | None, append: Append) -> Yes | No:
        conflict = self._conflict(append.key, append)
        if conflict is not None:
            return conflict
        session = session or Session()
        first = len(session.messages)
        session.messages.extend(append.messages)
        return Yes(session, first_index=first)

    def _replace(self, session: Session, change: Replace) -> Yes | No:
        count = len(session.messages)
        if change.start < 0 or change.start > count:
            where = {"field": "start", "index": str(change.start), "message_count": str(count)}
            return No("INDEX_OUT_OF_RANGE", where)
        deleted = session.messages[change.start :]
        if change.delete_count is not None:
            if change.delete_count < 0 or change.start + change.delete_count > count:
                return No("INDEX_OUT_OF_RANGE", {"field": "delete_count", "message_count": str(count)})
            deleted = deleted[: change.delete_count]
        kept = session.messages[change.start + len(deleted) :]
        session.messages = session.messages[: change.start] + list(change.messages) + kept
        self._clamp(session)
        return Yes(session, changed=bool(deleted or change.messages), first_index=change.start)

    def _pop(self, session: Session) -> Yes | No:
        if not session.messages:
            return No("INDEX_OUT_OF_RANGE", {"message_count": "0"})
        message = session.messages.pop()
        self._clamp(session)
        return Yes(session, first_index=len(session.messages), message=message)

    def _clamp(self, session: Session) -> None:
        session.last_consolidated = min(session.last_consolidated, len(session.messages))

    def _update(self, session: Session, update: Update) -> Yes | No:
        before = copy.deepcopy(session)
        count = len(session.messages)
        if update.last_consolidated is not None:
            if update.last_consolidated < 0 or update.last_consolidated > count:
                where = {"index": str(update.last_consolidated), "message_count": str(count)}
                return No("LAST_CONSOLIDATED_OUT_OF_RANGE", where)
            session.last_consolidated = update.last_consolidated
        if update.metadata is not None:
            session.metadata = update.metadata
        members = json.loads(session.metadata)
        for name, value in update.members.items():
            if value is not None:
                members[name] = json.loads(value)
            elif name in members:
                del members[name]
        if update.members:
            session.metadata = json.dumps(members, ensure_ascii=False).encode()
        if session.metadata != before.metadata and len(session.metadata) > self.metadata_bytes_max:
            where = {"size_bytes": str(len(session.metadata)), "limit_bytes": str(self.metadata_bytes_max)}
            return No("METADATA_TOO_LARGE", where)
        return Yes(session, changed=session != before)

    def _fork(self, session: Session | None, fork: Fork) -> Yes | No:
        if session is not None:
            return self._exists(fork.key, session)
        source = self.sessions.get(fork.source_key)
        if source is None:
            return No("SESSION_NOT_FOUND", {"key": fork.source_key})
        conflict = self._conflict(fork.source_key, fork)
        if conflict is not None:
            return conflict
        count = len(source.messages)
        at = count if fork.at is None else fork.at
        if at < 0 or at > count:
            return No("INDEX_OUT_OF_RANGE", {"field": "at", "index": str(at), "message_count": str(count)})
        return Yes(Session(source.messages[:at], source.metadata, min(source.last_consolidated, at)))


# What to ask. Metadata is written as Python's json writes it, so that equal values are equal bytes.

_keys = st.sampled_from(KEYS)
_expected = st.none() | st.none() | st.sampled_from((CURRENT, STALE, 0))
_texts = st.integers(0, 999).map(lambda n: b'{"role": "user", "content": "%d"}' % n)
_batches = st.lists(_texts, max_size=3)
_indexes = st.integers(-1, 6)
_names = st.sampled_from(("title", "имя", "a.b", ""))
_values = st.sampled_from((b"1", b'"x"', b"null", b'{"y": [2]}', b"9007199254740993", b'"%s"' % (b"z" * 60)))
_metadata = st.dictionaries(_names, _values, max_size=3).map(
    lambda found: json.dumps({name: json.loads(value) for name, value in found.items()}, ensure_ascii=False)
    .encode()
)


def mutations(create_times: st.SearchStrategy[int | None] | None = None) -> st.SearchStrategy[Mutation]:
    """Mutations of a few sessions, in and out of range. The model resolves their expected revisions."""
    times = st.none() if create_times is None else create_times
    return st.one_of(
        st.builds(Create, _keys, _batches, _metadata, _indexes, times, expected_revision=_expected),
        st.builds(Append, _keys, st.lists(_texts, min_size=1, max_size=3), expected_revision=_expected),
        st.builds(Append, _keys, st.lists(_texts, min_size=1, max_size=3)),
        st.builds(Replace, _keys, _indexes, st.none() | _indexes, _batches, expected_revision=_expected),
        st.builds(Pop, _keys, expected_revision=_expected),
        st.builds(
            Update,
            _keys,
            st.none() | _metadata,
            st.dictionaries(_names, st.none() | _values, max_size=2),
            st.none() | _indexes,
            expected_revision=_expected,
        ),
        st.builds(Fork, _keys, _keys, st.none() | _indexes, expected_revision=_expected),
        st.builds(Delete, _keys, expected_revision=_expected),
    )
