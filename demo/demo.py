"""Four agents hold conversations over shared sessions while their daemon is killed with -9, again and again.

What `make demo` runs. Nothing outside of a temporary directory is touched, and it ends by itself within half
a minute: with 0 if of everything that was acknowledged nothing is lost, nothing is there twice and no batch
is torn, else with 1.

Each agent is a process of its own. After every acknowledgement it notes in a file, outside of the store, what
it was told is safe. At the end those notes are held against what the daemon serves.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from sessionstore import OutcomeUnknownError, SessionStore, UnavailableError

AGENTS = ("ada", "grace", "linus", "margaret")
SESSIONS = ("telegram:ana", "slack:C04/deploys", "email:ben@example.org")
TURNS = 60  # per agent, on a machine that does them within
TURNS_S = 14.0
KILLS_AT = (0.25, 0.5, 0.75)  # parts of the way
START_S = 10.0
AGENTS_END_S = 24.0  # agents that are busy so long after the beginning are ended, and the demo has failed
CALL_S = 8.0
BAR = 30
# How many times as long as usual everything may take; --patience, for machines that are slow.
PATIENCE = 1.0


# ---------------------------------------------------------------------------------------------- an agent


def agent(name: str, target: str, notes: Path, seed: int) -> None:
    """Hold conversations, and note what is acknowledged."""
    dice = random.Random(f"{seed} {name}")
    begun = time.monotonic()
    with (
        SessionStore(target, timeout=CALL_S * PATIENCE) as store,
        notes.open("a", encoding="utf-8") as acknowledged,
    ):
        for turn in range(TURNS):
            if time.monotonic() - begun > TURNS_S * PATIENCE:
                break
            key = dice.choice(SESSIONS)
            session = store.session(key)
            question = {"role": "user", "content": f"{name} asks: how is deploy {dice.randrange(100)}?"}
            for part, messages in enumerate(converse(question, dice)):
                batch = f"{name}-{turn}-{part}"
                for place, message in enumerate(messages):
                    message["batch"] = {"id": batch, "place": place, "size": len(messages)}
                append(session, messages)
                acknowledged.write(json.dumps({"session": key, "batch": batch, "size": len(messages)}) + "\n")
                acknowledged.flush()
                time.sleep(dice.uniform(0.002, 0.02))  # a model thinks
            acknowledged.write("\n")  # a turn is over
            acknowledged.flush()


def converse(question: dict, dice: random.Random) -> Iterator[list[dict]]:
    """One turn with a pretend model: question, perhaps a tool call and its result in one batch, answer."""
    yield [question]
    if dice.random() < 0.6:
        call = f"call_{dice.getrandbits(32):08x}"
        function = {"name": "deploy_state", "arguments": json.dumps({"n": dice.randrange(100)})}
        result = "green " * dice.randrange(1, 40)
        yield [
            {"role": "assistant", "content": None,
             "tool_calls": [{"id": call, "type": "function", "function": function}]},
            {"role": "tool", "tool_call_id": call, "name": "deploy_state", "content": result},
        ]
    yield [{"role": "assistant", "content": "It is green."}]


def append(session, messages: list[dict]) -> None:
    """Append until it is known to be stored. What it costs to be sure: two ways to go on, both safe."""
    again = None
    while True:
        try:
            if again is None:
                session.append(*messages)
            else:
                again()
            return
        except OutcomeUnknownError as error:
            again = error.retry  # the very same call: it is applied once, however often it is sent
        except UnavailableError:
            again = None  # nothing was stored: a new call is right


# ---------------------------------------------------------------------------------------------- the daemon


class Daemon:
    """A daemon that can be killed and started again on the same address and directory."""

    def __init__(self, home: Path) -> None:
        self.target = f"unix:{home}/sock"
        self.command = [sys.executable, "-m", "sessionstored", "serve",
                        "--data", str(home / "data"), "--listen", self.target]
        self.log = home / "daemon.log"

    def start(self) -> float:
        """Start it; seconds until it served."""
        begun = time.monotonic()
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command, stdout=subprocess.PIPE, stderr=log, text=True, env=clean_environment()
            )
        watchdog = threading.Timer(START_S * PATIENCE, self.process.kill)
        watchdog.start()
        line = self.process.stdout.readline()
        watchdog.cancel()
        if not line.startswith("listening on "):
            raise SystemExit(f"the daemon did not start:\n{self.log.read_text()}")
        return time.monotonic() - begun

    def kill(self) -> None:
        """Kill -9."""
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def stop(self) -> int:
        """End it, cleanly if it can; the exit code."""
        self.process.terminate()
        try:
            code = self.process.wait(12)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.process.stdout.close()
        return code


def clean_environment() -> dict[str, str]:
    """The environment without settings that would lead to another store."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SESSIONSTORE")}


# ---------------------------------------------------------------------------------------------- the report


@dataclass
class Found:
    """What came of one session."""

    acknowledged: int = 0
    stored: int = 0
    lost: int = 0
    duplicated: int = 0
    torn: int = 0


@dataclass
class Note:
    """What the agents were told is safe."""

    batches: dict[str, tuple[str, int]] = field(default_factory=dict)
    turns: int = 0


def read_notes(path: Path) -> Note:
    note = Note()
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for line in text[: text.rfind("\n") + 1].splitlines():
        if line:
            entry = json.loads(line)
            note.batches[entry["batch"]] = (entry["session"], entry["size"])
        else:
            note.turns += 1
    return note


def hold_against(store: SessionStore, notes: list[Note]) -> dict[str, Found]:
    """Compare what was acknowledged with what is served."""
    acknowledged = {batch: entry for note in notes for batch, entry in note.batches.items()}
    report = {}
    for key in SESSIONS:
        messages = store.session(key).messages
        places = [(message["batch"]["id"], message["batch"]["place"]) for message in messages]
        sizes = {message["batch"]["id"]: message["batch"]["size"] for message in messages}
        expected = {(batch, place) for batch, (session, size) in acknowledged.items() if session == key
                    for place in range(size)}
        report[key] = Found(
            acknowledged=len(expected),
            stored=len(messages),
            lost=len(expected - set(places)),
            duplicated=sum(count - 1 for count in Counter(places).values()),
            torn=sum(not is_whole(places, batch, size) for batch, size in sizes.items()),
        )
    return report


def is_whole(places: list[tuple[str, int]], batch: str, size: int) -> bool:
    """Whether a batch is there from its first to its last message, with nothing in between."""
    if (batch, 0) not in places:
        return False
    start = places.index((batch, 0))
    return places[start : start + size] == [(batch, place) for place in range(size)]


def print_report(console: Console, report: dict[str, Found], kills: int) -> bool:
    """The table and the verdict."""
    columns = ("acknowledged", "stored", "lost", "duplicated", "torn")
    table = Table()
    table.add_column("messages in")
    for column in columns:
        table.add_column(column, justify="right")
    total = Found(*(sum(getattr(found, column) for found in report.values()) for column in columns))
    for key, found in [*report.items(), ("all", total)]:
        if key == "all":
            table.add_section()
        table.add_row(key, *(f"{getattr(found, column):,}" for column in columns))
    console.print(table)
    good = total.lost == total.duplicated == total.torn == 0 and total.acknowledged > 0
    verdict = (f"{total.lost} lost, {total.duplicated} duplicated, {total.torn} torn, "
               f"after {kills} times kill -9 under {len(AGENTS)} writing agents")
    console.print(Text(verdict, style="bold green" if good else "bold red"))
    return good


# ---------------------------------------------------------------------------------------------- the demo


@dataclass
class Show:
    """What is to be seen meanwhile: a bar per agent on a terminal, and a line per event."""

    console: Console
    begun: float = field(default_factory=time.monotonic)
    live: Live | None = None

    def event(self, text: str, style: str = "") -> None:
        self.console.print(Text(f"{time.monotonic() - self.begun:5.1f} s  {text}", style=style))

    def agents(self, notes: list[Note]) -> None:
        if self.live is None:
            return
        grid = Table.grid(padding=(0, 2))
        for name, note in zip(AGENTS, notes, strict=True):
            done = BAR * note.turns // TURNS
            bar = Text.assemble(("█" * done, "green"), ("·" * (BAR - done), "dim"))
            messages = sum(size for _, size in note.batches.values())
            grid.add_row(Text(name, style="bold"), bar, Text(f"{messages:4} messages acknowledged"))
        self.live.update(grid)


def demo(home: Path, seed: int, show: Show) -> bool:
    """Run it all; tells whether it went well."""
    daemon = Daemon(home)
    files = [home / f"{name}.acknowledged" for name in AGENTS]
    show.event(f"the daemon serves {home}/data after {daemon.start():.1f} s")
    agents: list[subprocess.Popen] = []
    try:
        for name, file in zip(AGENTS, files, strict=True):
            arguments = ["--agent", name, daemon.target, str(file), "--seed", str(seed),
                         "--patience", str(PATIENCE)]
            command = [sys.executable, __file__, *arguments]
            agents.append(subprocess.Popen(command, env=clean_environment()))
        show.event(f"{len(agents)} agents take up to {TURNS} turns each in {len(SESSIONS)} shared sessions")
        kills = watch(daemon, agents, files, show)
        codes = [each.wait(5 * PATIENCE) for each in agents]
        notes = [read_notes(file) for file in files]
        with SessionStore(daemon.target, timeout=CALL_S * PATIENCE) as store:
            report = hold_against(store, notes)
        good = print_report(show.console, report, kills)
        if any(codes) or kills < len(KILLS_AT):
            show.event(f"the agents ended with {codes} after {kills} kills", "bold red")
            return False
        return good
    finally:
        for each in agents:
            if each.poll() is None:
                each.kill()
                each.wait()
        daemon.stop()


def watch(daemon: Daemon, agents: list[subprocess.Popen], files: list[Path], show: Show) -> int:
    """Kill the daemon at the chosen moments until the agents are through; how often it was killed."""
    kills, begun = 0, time.monotonic()
    with Live(console=show.console, refresh_per_second=10, transient=True) as live:
        show.live = live if show.console.is_terminal else None
        while any(each.poll() is None for each in agents):
            notes = [read_notes(file) for file in files]
            show.agents(notes)
            turns = sum(note.turns for note in notes)
            way = max(turns / (TURNS * len(AGENTS)), (time.monotonic() - begun) / (TURNS_S * PATIENCE))
            if kills < len(KILLS_AT) and way >= KILLS_AT[kills]:
                kills += 1
                daemon.kill()
                show.event(f"kill -9 of the daemon, {turns} turns are done", "bold red")
                show.event(f"it serves again after {daemon.start():.1f} s", "green")
            if time.monotonic() - show.begun > AGENTS_END_S * PATIENCE:
                show.event("the agents take too long and are ended", "bold red")
                for each in agents:
                    each.kill()
            time.sleep(0.05)
        show.live = None
    return kills


def main() -> int:
    """Parse what was asked for, and run it."""
    global PATIENCE
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6),
                        help="what the agents do follows from it; the default is another one each time")
    parser.add_argument("--agent", nargs=3, metavar=("NAME", "TARGET", "NOTES"), help=argparse.SUPPRESS)
    parser.add_argument("--patience", type=float, default=PATIENCE, metavar="TIMES",
                        help="how many times as long as usual a slow machine may take; the default is 1")
    given = parser.parse_args()
    PATIENCE = given.patience
    if given.agent:
        name, target, notes = given.agent
        agent(name, target, Path(notes), given.seed)
        return 0
    show = Show(Console(highlight=False, markup=False))
    show.console.print(f"seed {given.seed}")
    with tempfile.TemporaryDirectory(prefix="sessionstore-demo-") as home:
        return 0 if demo(Path(home), given.seed, show) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
