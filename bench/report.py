"""RESULTS.md: the bars, every figure with its spread, how it was made, and on what. The harness writes it.

What people have to say about a bar stands in notes.md, and is taken over as it is.
"""

from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from bench import place, plots
from bench.bars import Verdict
from bench.results import Results
from bench.servers import server_versions
from bench.sizes import Sizes

NOTES = Path(__file__).parent / "notes.md"


def write(
    out: Path, results: Results, verdicts: list[Verdict], sizes: Sizes, command: str, machine: list[str]
) -> None:
    """Write RESULTS.md and its plots."""
    out.mkdir(parents=True, exist_ok=True)
    drawn = plots.draw(out, results)
    what = f"A {sizes.name} run of {sizes.rounds} rounds."
    if sizes.name != "full":
        what += " **It shows directions only**: `make bench` gives the figures that count."
    parts = [
        "# Results\n",
        f"Written by `{command}` on {datetime.now(UTC):%Y-%m-%d}. {what} "
        "[README.md](README.md) says what each workload does.\n",
        "## Machine and versions\n",
        *(f"* {line}" for line in machine),
        f"* {', '.join(place.versions())}",
        *(f"* {line}" for line in server_versions()),
        "",
        "## Bars\n",
        *_bars(verdicts),
        "",
        *_not_run(results),
        "## Figures\n",
        "Medians of the rounds, with the least and the greatest round in brackets.\n",
        *_figures(results),
        *(f"* {note}" for note in results.notes),
        "",
        *_plots(drawn),
    ]
    if NOTES.exists():
        parts.append(NOTES.read_text())
    (out / "RESULTS.md").write_text("\n".join(parts).rstrip() + "\n")


def summary(results: Results) -> str:
    """All figures as plain text, for the terminal."""
    return "\n".join(_figures(results)) + "\n" + "\n".join(_not_run(results))


def _bars(verdicts: list[Verdict]) -> list[str]:
    lines = [
        "Ratios are of one round each; what counts is their median.\n",
        "| ID | what | compared | median | rounds | limit | |",
        "|---|---|---|---|---|---|---|",
    ]
    for verdict in verdicts:
        name, what = verdict.bar.name, verdict.bar.what
        outcome = verdict.outcome if verdict.outcome == "met" else f"**{verdict.outcome}**"
        for condition, values in zip(verdict.bar.conditions, verdict.figures, strict=True):
            figure = f"{median(values):.3g} {condition.unit}" if values else "–"
            spread = f"{min(values):.3g} … {max(values):.3g} ({len(values)})" if values else "–"
            cells = (name, what, condition.what, figure, spread, condition.limit_text, outcome)
            lines.append(f"| {' | '.join(cells)} |")
            name = what = outcome = ""
    return lines


def _not_run(results: Results) -> list[str]:
    if not results.not_run:
        return []
    return ["### Not run\n", *(f"* {name}: {why}" for name, why in results.not_run.items()), ""]


def _figures(results: Results) -> list[str]:
    """A table per workload: a row per system, a column per measure."""
    workloads: dict[str, dict[str, dict[str, str]]] = {}
    for (workload, system, measure), by_round in results.values.items():
        values = list(by_round.values())
        text = f"{median(values):,.3f}" if median(values) < 100 else f"{median(values):,.0f}"
        if len(values) > 1:
            text += (
                f" ({min(values):,.3f} … {max(values):,.3f})"
                if median(values) < 100
                else (f" ({min(values):,.0f} … {max(values):,.0f})")
            )
        workloads.setdefault(workload, {}).setdefault(system, {})[measure] = text
    lines = []
    for workload, systems in workloads.items():
        measures = list(dict.fromkeys(measure for row in systems.values() for measure in row))
        lines += [
            f"### {workload}\n",
            f"| system | {' | '.join(measures)} |",
            "|---" * (len(measures) + 1) + "|",
        ]
        for system, row in systems.items():
            lines.append(f"| {system} | {' | '.join(row.get(measure, '') for measure in measures)} |")
        lines.append("")
    return lines


def _plots(drawn: list[tuple[str, str]]) -> list[str]:
    if not drawn:
        return ["## Plots\n", "None: matplotlib is not installed.", ""]
    return ["## Plots\n", *(f"![{title}]({name})\n" for name, title in drawn)]
