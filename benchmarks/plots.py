"""Draw a report of `run.py`: `uv run --group benchmarks benchmarks/plots.py report.json docs/images`."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

LATENCY = "cheap, 10 ms"


def medians(rows: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, float]]:
    """Return the median of each subject, by operation."""
    return {
        operation: {name: statistics.median(values) for name, values in by_name.items()}
        for operation, by_name in rows.items()
    }


def plot_ratios(rows: Mapping[str, Mapping[str, float]], label: str, path: Path) -> None:
    """Draw the time of the most objects, as ratios to raw aiobotocore."""
    most = max(int(operation.rpartition(" ")[2]) for operation in rows)
    shown = {name: row for name, row in rows.items() if name.endswith(f" {most}")}
    subjects = [name for name in next(iter(shown.values())) if name != "aiobotocore"]
    figure, axes = plt.subplots(figsize=(10, 4.5), layout="constrained")
    width = 0.8 / len(subjects)
    for number, subject in enumerate(subjects):
        places = [place + number * width for place in range(len(shown))]
        ratios = [row[subject] / row["aiobotocore"] for row in shown.values()]
        axes.bar(places, ratios, width, label=subject)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_yscale("log")
    for which in ("major", "minor"):
        getattr(axes.yaxis, f"set_{which}_formatter")("{x:g}")
    axes.set_xticks([place + 0.4 for place in range(len(shown))], list(shown))
    axes.set_ylabel("time, raw aiobotocore = 1")
    axes.set_title(f"{most} objects at {label}")
    axes.legend(ncols=3, fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_growth(rows: Mapping[str, Mapping[str, float]], label: str, path: Path) -> None:
    """Draw how the time grows with the number of objects."""
    operations = list(dict.fromkeys(name.rpartition(" ")[0] for name in rows))
    figure, grid = plt.subplots(2, 3, figsize=(11, 6.5), layout="constrained", sharex=True)
    for axes, operation in zip(grid.flat, operations, strict=False):
        mine = {
            int(n.rpartition(" ")[2]): row for n, row in rows.items() if n.startswith(operation)
        }
        for subject in next(iter(mine.values())):
            times = [1000 * row[subject] for row in mine.values()]
            axes.loglog(list(mine), times, marker="o", markersize=3, label=subject)
        axes.set_title(operation)
    grid[1][0].set_xlabel("objects")
    grid[0][0].set_ylabel("ms")
    figure.suptitle(label)
    figure.legend(*grid[0][0].get_legend_handles_labels(), ncols=4, loc="outside lower center")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("directory", type=Path)
    options = parser.parse_args()
    mpl.use("Agg")
    measured: dict[str, Any] = json.loads(options.report.read_text())["seconds"]
    options.directory.mkdir(parents=True, exist_ok=True)
    rows = medians(measured[LATENCY])
    label = LATENCY.partition(", ")[2] + " of latency"
    plot_ratios(rows, label, options.directory / "benchmark-ratios.png")
    plot_growth(rows, label, options.directory / "benchmark-growth.png")


if __name__ == "__main__":
    main()
