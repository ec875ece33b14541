"""Conflicts: what an edit sends, what a refused writer is told and keeps, and that others lose nothing."""

import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from clients import impatient
from daemons import Daemon, clean_environment
from proxies import Proxy
from scripted import Scripted, refuse
from sessionstore import SessionStore, Unseen
from sessionstore.errors import (
    ConflictError,
    InvalidArgumentError,
    NotFoundError,
    OutcomeUnknownError,
    StorageFullError,
)
from sessionstore.v1 import session_pb2
from sessionstore.v1 import session_store_pb2 as pb


def user(text: object) -> dict[str, Any]:
    return {"role": "user", "content": str(text)}


USERS = [user(n) for n in range(6)]


@pytest.fixture
def other(shared_daemon: Daemon) -> Iterator[SessionStore]:
    """Somebody else."""
    with SessionStore(shared_daemon.address, timeout=100) as made:
        yield made


# -------------------------------------------------------------------------------------- what an edit sends


def compacted(messages: list[Any]) -> list[Any]:
    return [user("summary"), *messages[4:]]


def trimmed(messages: list[Any]) -> list[Any]:
    return messages[-2:]


def reworded(messages: list[Any]) -> None:
    messages[2]["content"] = "two"
    messages[3]["content"] = "three"


def inserted(messages: list[Any]) -> None:
    messages.insert(3, user("new"))


def shortened(messages: list[Any]) -> None:
    del messages[4:]


def answered(messages: list[Any]) -> None:
    messages.append(user("answer"))


# What an edit of six messages sends: start, how many it removes, how many it puts there; whether the last
# message stays as it was.
EDITS: dict[Callable[[list[Any]], Any], tuple[int, int, int, bool]] = {
    compacted: (0, 4, 1, True),
    trimmed: (0, 4, 0, True),
    reworded: (2, 2, 2, True),
    inserted: (3, 0, 1, True),
    shortened: (4, 2, 0, False),
}


@pytest.mark.parametrize("block", [False, True], ids=["function", "block"])
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_an_edit_is_sent_as_the_smallest_replacement(
    open_store: Any, edit: Callable[[list[Any]], Any], block: bool
) -> None:
    scripted = Scripted()
    store = open_store(scripted.address)
    stored = session_pb2.Session(key="k", revision=9, message_count=6)
    lines = b"".join(b'{"role": "user", "content": "%d"}\n' % n for n in range(6))
    result = session_pb2.WriteResult(revision=10, previous_revision=9, message_count=3)
    scripted.script = [
        pb.GetSessionResponse(session=stored, messages=lines),
        pb.ReplaceMessagesResponse(result=result),
    ]
    if block:
        with store.session("k").edit() as messages:
            made = edit(messages)
            messages[:] = messages if made is None else made
    else:
        store.edit("k", edit)
    sent = scripted.requests[-1]
    start, removed, put, keeps_the_last = EDITS[edit]
    assert (sent.start, sent.delete_count, sent.messages.count(b"\n")) == (start, removed, put)
    assert (sent.expected_revision, sent.allow_appends) == (9, keeps_the_last and not block)
    scripted.close()


@pytest.mark.parametrize("edit", [*EDITS, answered], ids=lambda edit: edit.__name__)
def test_an_edit_by_a_function_keeps_what_others_append_meanwhile(
    store: Any, other: SessionStore, key: str, edit: Callable[[list[Any]], Any]
) -> None:
    """One that leaves the last message alone is stored at once; any other is made anew."""
    theirs = other.create(key, USERS)
    seen: list[list[Any]] = []

    def beside(messages: list[Any]) -> Any:
        seen.append([dict(message) for message in messages])
        if len(seen) == 1:
            theirs.append(user("theirs"))
        return edit(messages)

    handle = store.edit(key, beside)
    last = [dict(message) for message in seen[-1]]
    made = edit(last)
    expected = [*(last if made is None else made)]
    if edit in EDITS and EDITS[edit][3]:
        assert seen == [USERS]
        expected.append(user("theirs"))
    else:
        assert seen == [USERS, [*USERS, user("theirs")]]
    assert list(handle.messages) == list(store.session(key).messages) == expected


@pytest.mark.parametrize("edit", [*EDITS, answered], ids=lambda edit: edit.__name__)
def test_an_edit_by_a_function_is_made_anew_when_others_rewrote(
    store: Any, other: SessionStore, key: str, edit: Callable[[list[Any]], Any]
) -> None:
    theirs = other.create(key, USERS)
    seen = []

    def beside(messages: list[Any]) -> Any:
        seen.append(len(messages))
        if len(seen) == 1:
            theirs.replace(0, 1, [user("theirs"), user("more")])
        return edit(messages)

    handle = store.edit(key, beside)
    assert seen == [6, 7]
    assert user("0") not in handle.messages
    assert handle.messages == other.session(key).messages


def test_a_replacement_can_allow_appends(store: Any, other: SessionStore, key: str) -> None:
    handle = store.create(key, USERS)
    seen = handle.revision
    theirs = other.session(key)
    theirs.append(user("theirs"))
    theirs.update(metadata={"m": 1})
    told = handle.replace(0, 5, [user("summary")], expected_revision=seen, allow_appends=True)
    assert told.message_count == handle.message_count == 3
    assert list(handle.messages) == [user("summary"), user(5), user("theirs")]
    assert handle.metadata == {"m": 1}
    with pytest.raises(ConflictError) as refused:
        handle.replace(0, 1, [], expected_revision=seen, allow_appends=True)
    assert (refused.value.expected_revision, refused.value.revision) == (seen, handle.revision)
    for arguments in ({}, {"expected_revision": handle.revision, "delete_count": None}):
        with pytest.raises(InvalidArgumentError) as wrong:
            handle.replace(0, **{"delete_count": 1, **arguments}, messages=[], allow_appends=True)
        assert wrong.value.metadata["field"] == "allow_appends"


# ------------------------------------------------------------------- what a refused writer is told and keeps


def test_a_refused_block_keeps_its_list(store: Any, other: SessionStore, key: str) -> None:
    handle = store.create(key, USERS)
    theirs = other.session(key).append(user("theirs"))
    with pytest.raises(ConflictError) as told, handle.edit() as messages:
        messages[0] = user("typed with care")
    error = told.value
    assert error.edited is messages
    assert (error.revision, error.message_count) == (theirs.revision, 7)
    assert pickle.loads(pickle.dumps(error)).edited == [user("typed with care"), *USERS[1:]]
    unseen = error.fetch()
    assert unseen == Unseen(theirs.revision, 6, [user("theirs")])
    assert (unseen.rewritten, unseen.exists) == (False, True)
    with handle.refresh().edit() as again:
        again[:] = [*error.edited, *unseen.messages]
    assert list(store.session(key).messages) == [*messages, user("theirs")]


def test_what_is_fetched_is_fetched_then(store: Any, other: SessionStore, key: str) -> None:
    """Not with the error, and each time anew."""
    handle = store.create(key, USERS)
    theirs = other.session(key)
    theirs.append(user("theirs"))
    with pytest.raises(ConflictError) as told:
        handle.append(user("mine"), expected_revision=handle.revision)
    assert told.value.edited is None
    theirs.append(user("later"))
    assert told.value.fetch() == Unseen(theirs.revision, 6, [user("theirs"), user("later")])
    theirs.pop()
    theirs.pop()
    theirs.pop()
    assert told.value.fetch() == Unseen(theirs.revision, 0, USERS[:5], rewritten=True)
    theirs.delete()
    assert told.value.fetch() == Unseen(0, 0, [], rewritten=True)
    with pytest.raises(ConflictError) as bare:
        store.delete(key + "/new", expected_revision=other.create(key + "/new", USERS).revision + 1)
    assert bare.value.fetch() == Unseen(bare.value.revision, 0, USERS)


def test_what_a_block_has_not_seen_is_what_came_after_its_beginning(
    store: Any, other: SessionStore, key: str
) -> None:
    """Also if its handle went on meanwhile."""
    handle = store.create(key, USERS)
    block = handle.edit()
    block.__enter__().pop(0)
    handle.append(user("in the block"))
    with pytest.raises(ConflictError) as told:
        block.__exit__(None, None, None)
    assert told.value.fetch() == Unseen(handle.revision, 6, [user("in the block")])


def test_a_session_removed_under_an_edit_is_a_conflict(store: Any, other: SessionStore, key: str) -> None:
    for edit in (trimmed, shortened, answered):
        handle = store.create(key, USERS)
        block = handle.edit()
        messages = block.__enter__()
        messages[:] = edit(messages) or messages
        other.delete(key)
        with pytest.raises(ConflictError) as told:
            block.__exit__(None, None, None)
        error = told.value
        assert (error.key, error.reason, error.edited) == (key, "REVISION_CONFLICT", messages)
        assert (error.expected_revision, error.revision, error.message_count) == (handle.revision, 0, 0)
        assert error.fetch() == Unseen(0, 0, [], rewritten=True)
        store.create(key, USERS)
        seen = []

        def removing(messages: list[Any], edit: Any = edit, seen: list[int] = seen) -> Any:
            seen.append(len(messages))
            if len(seen) == 1:
                other.delete(key)
            return edit(messages)

        store.edit(key, removing)
        assert seen == [6, 0]
        if store.get(key):
            store.delete(key)
    with pytest.raises(NotFoundError):  # no edit: nobody says what it was made of
        store.session(key).replace(0, 0, [user("x")])


def test_a_function_that_raises_leaves_everything_alone(store: Any, other: SessionStore, key: str) -> None:
    before = other.create(key, USERS)
    calls = []

    def fails(messages: list[Any]) -> list[Any]:
        calls.append(len(messages))
        messages[0]["content"] = "changed"
        if len(calls) == 1:
            before.append(user("theirs"))
            messages.append(user("mine"))
            return messages
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.edit(key, fails)
    assert calls == [6, 7]
    assert store.get(key) == before.head
    assert list(store.session(key).messages) == [*USERS, user("theirs")]
    handle = store.edit(key, lambda messages: messages[1:])
    assert list(handle.messages) == [*USERS[1:], user("theirs")]


def test_an_edit_that_gives_up_keeps_its_last_list(store: Any, other: SessionStore, key: str) -> None:
    theirs = other.create(key)

    def disturbed(messages: list[Any]) -> tuple[Any, ...]:
        theirs.append(user("theirs"))
        return (*messages, user("mine"))

    with pytest.raises(ConflictError) as told:
        store.edit(key, disturbed, attempts=3)
    assert told.value.edited == [user("theirs"), user("theirs"), user("mine")]
    assert told.value.fetch() == Unseen(theirs.revision, 2, [user("theirs")])
    assert list(store.session(key).messages) == [user("theirs")] * 3


def test_other_refusals_end_an_edit_at_once(open_store: Any) -> None:
    scripted = Scripted()
    stored = session_pb2.Session(key="k", revision=9, message_count=1)
    scripted.script = [
        pb.GetSessionResponse(session=stored, messages=b"{}\n"),
        refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "STORAGE_FULL"),
    ]
    with pytest.raises(StorageFullError):
        open_store(scripted.address).edit("k", lambda messages: [])
    assert len(scripted.requests) == 2
    scripted.close()


@pytest.mark.parametrize("rewritten", [False, True])
def test_the_retry_of_an_edit_goes_on_with_the_edit(
    store: Any, open_store: Any, shared_daemon: Daemon, key: str, rewritten: bool
) -> None:
    """Its change never came to the daemon, and meanwhile others append or rewrite."""
    proxy = Proxy(shared_daemon.address)
    through = open_store(proxy.address)
    theirs = store.create(key, USERS)
    seen = []

    def trim(messages: list[Any]) -> list[Any]:
        if not seen:
            proxy.swallow("from_client")
        seen.append(len(messages))
        return messages[-2:]

    through.session(key)  # connected
    with pytest.raises(OutcomeUnknownError) as told, impatient(through, 1.0):
        through.edit(key, trim)
    theirs.append(user("theirs"))
    if rewritten:
        theirs.replace(0, 1, [])
    proxy.heal()
    handle = told.value.retry()
    assert seen == ([6, 6] if rewritten else [6])
    kept = [user(5), user("theirs")] if rewritten else [user(4), user(5), user("theirs")]
    assert list(handle.messages) == list(store.session(key).messages) == kept
    proxy.close()


@pytest.mark.parametrize("removed", [False, True])
def test_the_retry_of_a_block_that_is_refused_keeps_its_list(
    store: Any, open_store: Any, shared_daemon: Daemon, key: str, removed: bool
) -> None:
    proxy = Proxy(shared_daemon.address)
    through = open_store(proxy.address)
    store.create(key, USERS)
    block = through.session(key).edit()
    messages = block.__enter__()
    messages.pop(0)
    proxy.swallow("from_client")
    with pytest.raises(OutcomeUnknownError) as unknown, impatient(through, 1.0):
        block.__exit__(None, None, None)
    theirs = store.session(key)
    theirs.delete() if removed else theirs.append(user("theirs"))
    proxy.heal()
    with pytest.raises(ConflictError) as told:
        unknown.value.retry()
    assert told.value.edited is messages
    assert told.value.fetch().exists != removed
    proxy.close()


# ------------------------------------------------------------------------------------- nobody loses anything

APPENDER = """
import random, sys
from sessionstore import SessionStore
target, key, name, count, seed = sys.argv[1:]
rng = random.Random(seed)
with SessionStore(target, timeout=200) as store:
    n = 0
    shared = store.session(key)
    while n < int(count):
        batch = [{"by": name, "n": n + i} for i in range(min(rng.randint(1, 3), int(count) - n))]
        shared.append(*batch)
        n += len(batch)
"""
APPEND = (sys.executable, "-W", "error", "-c", APPENDER)
WRITERS, EACH = 3, 150


def with_a_summary(messages: list[Any]) -> list[Any]:
    """Put all but the last few into one summary, which names what it stands for."""
    old, kept = messages[:-3], messages[-3:]
    stands_for = [each for m in old for each in m.get("summary", [[m.get("by"), m.get("n")]])]
    return [{"summary": stands_for}, *kept] if len(old) > 1 else messages


def named(messages: Any) -> list[tuple[str, int]]:
    """The messages that a session holds or that its summary stands for, in order."""
    found = [each for m in messages for each in m.get("summary", [[m.get("by"), m.get("n")]])]
    return [(by, n) for by, n in found]


@pytest.mark.parametrize("way", ["function", "block", "trimming", "replace"])
def test_compaction_beside_appenders_in_other_processes_loses_nothing(
    make_daemon: Any, open_store: Any, way: str
) -> None:
    """Every acknowledged message is there once, in its writer's order, or was taken out by the editor."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    daemon = make_daemon(store="jsonl").start()
    store = open_store(daemon.address)
    names = [f"w{number}" for number in range(WRITERS)]
    writers = [
        subprocess.Popen(
            [*APPEND, daemon.address, "k", name, str(EACH), f"{seed}{name}"], env=clean_environment()
        )
        for name in names
    ]
    removed: list[Any] = []
    edits = conflicts = 0

    def edit() -> None:
        if way == "function":
            store.edit("k", with_a_summary)
        elif way == "trimming":
            taken: list[Any] = []

            def trim(messages: list[Any]) -> list[Any]:
                taken[:] = messages[:-3]
                return messages[-3:]

            store.edit("k", trim)
            removed.extend(taken)
        elif way == "block":
            with store.session("k").edit() as messages:
                messages[:] = with_a_summary(messages)
        else:
            handle = store.session("k")
            made = with_a_summary(list(handle.messages))
            if made != list(handle.messages):
                count = handle.message_count - 3
                handle.replace(0, count, made[:1], expected_revision=handle.revision, allow_appends=True)

    try:
        writing = True
        while writing:
            writing = any(writer.poll() is None for writer in writers)  # once more after their end
            try:
                edit()
                edits += 1
            except ConflictError:
                conflicts += 1
    finally:
        for writer in writers:
            if writer.poll() is None:  # something failed
                writer.kill()
            writer.wait(60)
    assert [writer.returncode for writer in writers] == [0] * WRITERS
    print(f"{way}: {edits} edits and {conflicts} conflicts beside {WRITERS * EACH} messages")
    assert conflicts == 0 or way == "block"
    stored = store.session("k").messages
    found = named([*removed, *stored])
    for name in names:
        assert [n for by, n in found if by == name] == list(range(EACH)), name
    assert len(found) == WRITERS * EACH
    assert len(stored) <= 4
