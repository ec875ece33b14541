"""The plots of RESULTS.md: throughput and latency against callers, and cost against a session's length."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.results import Results

_SIZE = (8, 5)
Series = dict[str, list[tuple[float, float, float, float]]]
"""System -> (x, median, least, greatest)."""


def draw(out: Path, results: Results) -> list[tuple[str, str]]:
    """Write the plots that there are figures for; returns (file, title) of each. None without matplotlib."""
    if find_spec("matplotlib") is None:
        return []
    import matplotlib as mpl

    mpl.use("Agg")
    drawn = []
    for name, title, series, x, y in (
        ("throughput.png", "Appends per second against callers, in two processes",
         _series(results, "crowd ", "throughput_per_s"), "callers", "appends per second"),
        ("latency.png", "Latency of an append (p50) against callers, in two processes",
         _series(results, "crowd ", "p50_ms"), "callers", "ms"),
        ("length.png", "One more message (p50) against the session's length",
         _series(results, "length ", "p50_ms"), "messages in the session", "ms"),
    ):  # fmt: skip
        if any(len(points) > 1 for points in series.values()):
            _draw(out / name, title, series, x, y)
            drawn.append((name, title))
    return drawn


def _series(results: Results, prefix: str, measure: str) -> Series:
    series: Series = {}
    for (workload, system, kind), by_round in results.values.items():
        number = workload.removeprefix(prefix)
        if kind == measure and number != workload and number.isdigit():
            values = sorted(by_round.values())
            point = (float(number), values[len(values) // 2], values[0], values[-1])
            series.setdefault(system, []).append(point)
    return {system: sorted(points) for system, points in series.items()}


def _draw(path: Path, title: str, series: Series, x: str, y: str) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=_SIZE)
    for system, points in series.items():
        xs, medians, least, most = (list(each) for each in zip(*points, strict=True))
        ours: dict[str, Any] = (
            {"linewidth": 2.5} if system.startswith("ours") else {"linewidth": 1.2, "alpha": 0.8}
        )
        line = axes.plot(xs, medians, marker="o", label=system, **ours)[0]
        axes.fill_between(xs, least, most, color=line.get_color(), alpha=0.12)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sorted({point[0] for points in series.values() for point in points}))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.minorticks_off()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
