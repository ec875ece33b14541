"""The benchmark: its bars are judged right, its stores are whole, a run prints all bars. Nothing is timed."""

import asyncio
import re
import sys
from pathlib import Path

from meta.tools import BIN, ROOT, output_of
from sessionstored.engine.jsonl import open_jsonl
from sessionstored.engine.jsonl.store import read_store

from bench.bars import BARS, judge
from bench.generate import Wanted, generate
from bench.messages import encoded
from bench.results import Key, Results
from bench.sizes import FULL, QUICK, TINY

IDS = [f"B{n}" for n in range(1, 15)]
LINE = re.compile(r"bar (B\d+) (\S+) (\S+) (met|short|not-run)")


def outcomes(values: dict[Key, list[float]], sizes=FULL) -> dict[str, str]:
    results = Results()
    for key, rounds in values.items():
        for n, value in enumerate(rounds):
            results.add(key, n, value)
    lines = [LINE.fullmatch(verdict.line) for verdict in judge(results, sizes)]
    return {line[1]: line[4] for line in lines}


def test_without_any_figure_every_bar_is_not_run():
    assert outcomes({}) == dict.fromkeys(IDS, "not-run")


def test_a_bar_is_judged_by_the_median_of_the_ratios_of_its_rounds():
    def length(long: list[float]) -> dict[Key, list[float]]:
        short = [1.0, 2, 4, 8, 16]
        return {("length 100000", "ours", "p50_ms"): long, ("length 10", "ours", "p50_ms"): short}

    assert outcomes(length([1, 2, 4, 80, 160]))["B8"] == "met"
    assert outcomes(length([1, 2, 5, 10, 20]))["B8"] == "short"


def test_a_bar_is_short_if_one_condition_is_and_not_run_if_one_is_missing():
    names = ("whole-file save", "ours append", "ours save")
    ours, append, save = (("long", name, "p50_ms") for name in names)
    assert outcomes({ours: [100.0], append: [1.0]})["B7"] == "not-run"
    assert outcomes({ours: [100.0], append: [3.0]})["B7"] == "short"
    assert outcomes({ours: [100.0], append: [1.0], save: [10.0]})["B7"] == "met"


def test_faster_than_is_not_as_fast_as():
    names = ("RedisSession", "SQLAlchemySession", "DatabaseSessionService")
    turn = {("turn", name, "p50_ms"): [2.0] for name in names}
    assert outcomes(turn | {("turn", "ours async", "p50_ms"): [2.0]})["B6"] == "short"
    assert outcomes(turn | {("turn", "ours async", "p50_ms"): [1.9]})["B6"] == "met"


def test_a_run_that_is_too_small_judges_nothing():
    conditions = [condition for bar in BARS for condition in bar.conditions]
    every = {key: [1.0] for condition in conditions for key in (*condition.above, *condition.below)}
    assert "not-run" not in outcomes(every).values()
    assert set(outcomes(every, TINY).values()) == {"not-run"}
    quick = outcomes(every, QUICK)
    assert [name for name in quick if quick[name] == "not-run"] == ["B13", "B14"]


def test_a_generated_store_opens_clean_and_holds_what_was_asked_for(tmp_path: Path):
    data = tmp_path / "data"
    lengths = {f"agent:{n}": n % 7 for n in range(150)} | {"long": 3000}
    generate(data, (Wanted(key, length) for key, length in lengths.items()))
    assert read_store(data).clean
    checked = output_of(BIN / "sessionstored", "check", "--data", data)  # fails if anything is wrong

    async def read() -> dict[str, list[bytes]]:
        engine = await open_jsonl(data)
        try:
            assert await engine.count() == len(lengths)
            held = {}
            for key in lengths:
                found = await engine.read(key, lambda head: (0, head.message_count), 1 << 30)
                held[key] = list(found.lines)
            return held
        finally:
            await engine.close()

    wanted = {key: [encoded(n).encode() for n in range(length)] for key, length in lengths.items()}
    assert asyncio.run(read()) == wanted, checked


def test_a_run_ends_with_one_line_for_each_bar(tmp_path: Path):
    run = (sys.executable, "-m", "bench", "--size", "tiny", "--no-peers")
    printed = output_of(*run, "--dir", tmp_path, "--out", tmp_path / "out")
    lines = [LINE.fullmatch(line) for line in printed.splitlines() if line.startswith("bar ")]
    assert [line and line[1] for line in lines] == IDS
    assert printed.splitlines()[-14:] == [line[0] for line in lines]
    figures = {line[1]: line[2] for line in lines}
    assert "-" not in figures["B13"].split(",") + figures["B14"].split(",")  # the workloads ran
    assert "failed" not in printed
    assert "peers: left out by --no-peers" in (tmp_path / "out/RESULTS.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_bench_installs_what_its_constraints_pin():
    text = (ROOT / "bench/constraints.txt").read_text()
    pins = [line for line in text.splitlines() if not line.startswith("#")]
    assert [line for line in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)] == []
    main = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {line.partition("==")[0].lower() for line in pins} & main == set()
