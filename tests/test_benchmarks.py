"""The report of the benchmarks, by hand, and what its command line refuses."""

import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks import report

ROOT = Path(__file__).parent.parent


def test_a_table_has_medians_ratios_and_figures_of_each_round():
    costs = [(2.0, 1.0), (4.0, 8.0), (3.0, 0.0)]  # of ours and of Keras's in three rounds; 0: too short to measure
    rounds = [{"looplab": {"ms": ours}, "keras": {"ms": theirs}} for ours, theirs in costs]
    figures = {
        "difference": lambda ms: ms["keras"] - ms["looplab"],
        "looplab ÷ keras": lambda ms: ms["looplab"] / ms["keras"],
        "skipped": lambda ms: ms["torch"],
    }
    result = report.summary(rounds, figures)
    assert result["variants"]["keras"] == {"ms": [1, 8, 0], "÷ looplab": [0.5, 2, 0]}
    assert result["figures"] == {"difference": [-1, 4, -3], "looplab ÷ keras": [2, 0.5, 0]}
    assert report.table(result).splitlines()[2:] == [
        "| looplab | 3.00 (2.00 to 4.00) | 1.00 |",
        "| keras | 1.00 (– to 8.00) | 0.500 (– to 2.00) |",
        "",
        "- difference: – (– to 4.00)",
        "- looplab ÷ keras: 0.500 (– to 2.00)",
    ]
    assert [report.number(n) for n in (-1, 0.25, 12.34, 9876.5)] == ["–", "0.250", "12.3", "9,876"]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("--rounds 0", "argument --rounds: must be a whole number of at least 1; got '0'"),
        ("--steps -1", "argument --steps: must be a number above 0; got '-1'"),
        ("--steps 0", "argument --steps: must be a number above 0; got '0'"),
        ("--cases nope", "argument --cases: invalid choice: 'nope'"),
        ("--out pyproject.toml", "argument --out: "),
    ],
)
def test_wrong_arguments_are_errors_before_anything_is_imported(words, error):
    command = [sys.executable, "-X", "importtime", "-m", "tests.benchmarks", *words.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"python -m tests.benchmarks: error: {error}" in done.stderr
    assert "tensorflow" not in done.stderr
