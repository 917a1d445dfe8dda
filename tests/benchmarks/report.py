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


def peer(name):
    return name.rpartition(": ")[2].partition(",")[0]


def first(measures):
    return next(iter(measures.values()))


def summary(rounds, figures):
    """The medians of all measures, of ratios to the first variant of each section, and of the figures."""
    reference, rows, combined = {}, {}, {}
    for name, measures in rounds[0].items():
        ours = reference.setdefault(name.rpartition(": ")[0], name)
        ratios = [first(values[name]) / first(values[ours]) for values in rounds]
        rows[name] = {key: statistics.median(values[name][key] for values in rounds) for key in measures}
        rows[name]["÷ looplab"] = statistics.median(ratios)
    for label, figure in figures.items():
        with contextlib.suppress(KeyError):  # a variant was skipped
            combined[label] = statistics.median(figure({n: first(m) for n, m in values.items()}) for values in rounds)
    return {"medians": rows, "figures": combined, "rounds": rounds}


def table(result):
    """The medians and the figures of one case, in Markdown."""
    columns = list(dict.fromkeys(key for row in result["medians"].values() for key in row))
    lines = [["", *columns], ["---", *("---:" for _ in columns)]]
    for name, row in result["medians"].items():
        lines.append([name, *(number(row[key]) if key in row else "" for key in columns)])
    figures = [f"- {label}: {number(value)}" for label, value in result["figures"].items()]
    return "\n".join([*(f"| {' | '.join(cells)} |" for cells in lines), "", *figures, ""])


def number(value):
    """With three digits, or all before the point."""
    return f"{value:,.{max(0, 2 - len(str(int(abs(value)))) + 1 if abs(value) >= 1 else 3)}f}"


def write(folder, results, settings):
    """All cases so far, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = versions() | settings
    tables = "\n".join(f"## {name}\n\n{table(result)}" for name, result in results.items())
    (folder / "table.md").write_text(f"{', '.join(f'{name} {value}' for name, value in facts.items())}\n\n{tables}")
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
    costs = {case: {n: row[key] for n, row in r["medians"].items() if key in row} for case, r in results.items()}
    costs = {case: rows for case, rows in costs.items() if rows}
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
