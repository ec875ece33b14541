"""A failed flush ends the daemon: it says so to everybody, and the next one does not believe what it sees."""

from pathlib import Path

from crash.failing_calls import EXIT_STORAGE_FAILED, watched_health
from crash.load import Load, judge, settle_unknown, stored_in
from crash.odd_daemon import odd_daemon
from crash.tally import Tally
from grpc_health.v1 import health_pb2

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
KEYS = ("a", "b")


def test_a_failed_flush_of_the_journal_stops_the_daemon(make_daemon, tmp_path: Path) -> None:
    fails = tmp_path / "fails"
    daemon = make_daemon(store="jsonl", launcher=odd_daemon("--fail-sync", str(fails))).start()
    with watched_health(daemon) as states, Load(daemon.address, KEYS, 1, writers=8) as load:
        load.wait_for("ACKNOWLEDGED", 50)
        fails.touch()
        assert daemon.wait(60) == EXIT_STORAGE_FAILED, daemon.stderr
    print(dict(load.account.reasons))
    assert states == [SERVING, NOT_SERVING]
    # Those whose commit failed; those behind them were certainly not applied; after that nobody answers.
    assert load.account.reasons["OUTCOME_UNKNOWN"] >= 1
    assert set(load.account.reasons) <= {"ACKNOWLEDGED", "OUTCOME_UNKNOWN", "SHUTTING_DOWN", ""}
    assert "CRITICAL" in daemon.stderr
    assert "injected: sync" in daemon.stderr

    fails.unlink()
    daemon.start()
    tally = Tally()
    judge(tally, load.account, stored_in(daemon, KEYS), "after the restart")
    settle_unknown(load.account, daemon)
    judge(tally, load.account, stored_in(daemon, KEYS), "after every unknown call was sent again")
    assert tally.losses == 0, tally.details
    assert daemon.terminate() == 0, daemon.stderr


def test_a_journal_that_still_fails_is_named_at_the_start(make_daemon, tmp_path: Path) -> None:
    fails = tmp_path / "fails"
    daemon = make_daemon(store="jsonl", launcher=odd_daemon("--fail-sync", str(fails))).start()
    with Load(daemon.address, KEYS, 1) as load:
        load.wait_for("ACKNOWLEDGED", 10)
        fails.touch()
        assert daemon.wait(60) == EXIT_STORAGE_FAILED, daemon.stderr
    before = len(daemon.stderr)
    daemon.stdout.clear()
    try:
        daemon.start()
    except AssertionError:
        said = daemon.stderr[before:]
    else:
        raise AssertionError("it serves although its journal cannot be flushed")
    assert "journal.db cannot be used" in said
    assert "Traceback" not in said
