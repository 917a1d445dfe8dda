"""How fast looplab is, and its peers: Keras, Orbit, Lightning, PyTorch, and loops written by hand.

    python -m tests.benchmarks --data-dir .data               all cases, in about 40 minutes
    python -m tests.benchmarks --cases vae --peers keras bare --rounds 3

Peers that are not installed are skipped. To install all of them, in an environment of their own:

    pip install -e '.[report]' torch lightning && pip install --no-deps tf-models-official tf_keras

All variants of a case take turns in one process, on the same examples and from the same weights. Each round trains one
epoch and then five: the difference gives the cost of a step, and the rest is fixed per call. Ratios and other figures
compare variants within each round. All numbers are medians of the rounds, the first of which, with the traces, is left
out. `÷ looplab` divides by the first variant of the case, or of the section before the colon.
"""

import argparse
import gc
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras

from . import report
from .cases import CASES

SHORT, LONG = 1, 5  # epochs
PEERS = "keras", "orbit", "lightning", "torch", "tensorflow", "bare"


def measures_of(run, steps):
    """What one variant costs in one round."""
    gc.collect()
    if steps is None:
        return run()
    seconds = []
    for epochs in (SHORT, LONG):
        began = time.perf_counter()
        loss = run(epochs)
        seconds.append(time.perf_counter() - began)
    step = (seconds[1] - seconds[0]) / (LONG - SHORT) / steps
    measures = {"ms per step": 1e3 * step, "fixed ms": 1e3 * (seconds[0] - SHORT * steps * step)}
    return measures if loss is None else measures | {"loss": float(loss)}


def rounds_of(case, peers, count):
    """The measures of each round, by variant."""
    runs = {}
    for name, variant in case.variants.items():
        if peers and report.peer(name) not in ("looplab", *peers):
            continue
        keras.utils.set_random_seed(0)
        try:
            runs[name] = variant.set_up()
        except ImportError as error:
            print(f"{name}: skipped, because {error}")
    rounds = []
    for number in range(min(count + 1, case.rounds)):
        print(f"round {number}", file=sys.stderr)
        order = list(runs) if number % 2 else list(reversed(runs))  # neighbours influence each other
        values = {name: measures_of(runs[name], case.variants[name].steps) for name in order}
        rounds.append({name: values[name] for name in runs})
    return rounds[1:] or rounds


def main():
    parser = argparse.ArgumentParser("python -m tests.benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: all but growth")
    parser.add_argument("--peers", nargs="+", choices=PEERS, help="what to compare with (default: all)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=float, default=1, help="factor for the number of steps (default: 1)")
    parser.add_argument("--data-dir", help="folder of mnist.npz")
    parser.add_argument("--out", type=Path, default="logs/benchmarks", help="for table.md, results.json and chart.png")
    parser.add_argument("--long", action="store_true", help="also run growth, which takes minutes")
    parser.add_argument("--list", action="store_true", help="list the cases")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(f"{name:12}{create.__doc__}" for name, create in CASES.items()))
        return
    names = arguments.cases or [name for name in CASES if arguments.long or name != "growth"]
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = os.environ["TMPDIR"] = folder
        for name in names:
            print(f"{name}: {CASES[name].__doc__}", flush=True)
            case = CASES[name](lambda count: max(1, round(arguments.steps * count)), arguments.data_dir)
            results[name] = report.summary(rounds_of(case, arguments.peers, arguments.rounds), case.figures)
            print(report.table(results[name]), flush=True)
            report.write(arguments.out, results, {"rounds": arguments.rounds, "steps": arguments.steps})
            keras.utils.clear_session()


if __name__ == "__main__":
    main()
