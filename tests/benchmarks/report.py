"""The report: a table, the numbers as JSON, and a chart."""

import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from pathlib import Path

PACKAGES = "tensorflow", "keras", "numpy", "torch", "lightning", "tf-models-official"
NOTES = """\
Each number is the median of the rounds, with the least and the greatest in parentheses. `÷ looplab` is the median of
the ratios within each round, and not the ratio of the medians; it divides by the first variant of the case, or of the
section before the colon. `fixed ms` is what a call takes besides its steps, and `own µs per step` what a step takes
more than in the bare loop. A dash stands for a cost below what these rounds can measure, which came out negative."""


def peer(name):
    return name.rpartition(": ")[2].partition(",")[0]


def first(measures):
    return next(iter(measures.values()))


def summary(rounds, figures):
    """The measures of each variant, its ratio to the first one of its section, and the figures, as lists by round."""
    reference, variants, combined = {}, {}, {}
    for name, measures in rounds[0].items():
        ours = reference.setdefault(name.rpartition(": ")[0], name)
        variants[name] = {key: [values[name][key] for values in rounds] for key in measures}
        variants[name]["÷ looplab"] = [_ratio(first(values[name]), first(values[ours])) for values in rounds]
    for label, figure in figures.items():
        with contextlib.suppress(KeyError):  # a variant was skipped
            combined[label] = [_or_0(figure, {n: first(m) for n, m in values.items()}) for values in rounds]
    return {"variants": variants, "figures": combined}


def _ratio(one, other):
    return one / other if other else 0.0


def _or_0(figure, costs):
    try:
        return figure(costs)
    except ZeroDivisionError:  # by a step that was too short to measure
        return 0.0


def table(result):
    """The measures and the figures of one case, in Markdown."""
    columns = list(dict.fromkeys(key for row in result["variants"].values() for key in row))
    lines = [["", *columns], ["---", *("---:" for _ in columns)]]
    for name, row in result["variants"].items():
        lines.append([name, *(cell(row[key]) if key in row else "" for key in columns)])
    figures = [f"- {label}: {cell(values)}" for label, values in result["figures"].items()]
    return "\n".join([*(f"| {' | '.join(cells)} |" for cells in lines), "", *figures, ""])


def cell(values):
    """The median of the rounds, with the least and the greatest value."""
    median, *ends = map(number, (statistics.median(values), min(values), max(values)))
    return median if {*ends} == {median} else f"{median} ({' to '.join(ends)})"


def number(value):
    """With three digits, or all before the point; a dash unless it is positive."""
    if value <= 0:
        return "–"
    return f"{value:,.{max(0, 3 - len(str(int(value))) if value >= 1 else 3)}f}"


def write(folder, results, settings):
    """All cases so far, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = versions() | settings
    tables = "\n".join(f"## {name}\n\n{table(result)}" for name, result in results.items())
    heading = ", ".join(f"{name} {value}" for name, value in facts.items())
    (folder / "table.md").write_text(f"{heading}\n\n{tables}\n{NOTES}\n")
    (folder / "results.json").write_text(json.dumps(facts | {"cases": results}, indent=1, ensure_ascii=False))
    chart(folder / "chart.png", results)


def versions():
    """What the numbers depend on."""
    found = {"python": platform.python_version(), "cpus": os.cpu_count()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return found | {"commit": git.stdout.strip() or "unknown"}


def chart(path, results):
    """Draws the cost of a step of each variant, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path.name}: skipped, because matplotlib is not installed")
        return
    key = "ms per step"
    medians = {
        case: {name: statistics.median(row[key]) for name, row in result["variants"].items() if key in row}
        for case, result in results.items()
    }
    costs = {case: rows for case, rows in medians.items() if rows}
    if costs:
        heights = [len(rows) + 3 for rows in costs.values()]
        figure = Figure((9, 0.25 * sum(heights)), layout="constrained")
        axes = figure.subplots(len(costs), squeeze=False, height_ratios=heights)[:, 0]
        for axis, (case, rows) in zip(axes, costs.items(), strict=True):
            colours = ["tab:orange" if peer(name) == "looplab" else "tab:grey" for name in rows]
            bars = axis.barh(list(rows), list(rows.values()), color=colours)
            axis.bar_label(bars, [number(value) for value in rows.values()], padding=3)
            axis.invert_yaxis()
            axis.set(title=case, xlabel=key, xlim=(0, 1.15 * max(rows.values())))
        figure.savefig(path, dpi=120)
