"""How fast looplab is, and its peers: Keras, Orbit, Lightning, PyTorch, and loops written by hand.

    python -m tests.benchmarks --data-dir .data               all cases: about 40 minutes on two cores
    python -m tests.benchmarks --cases vae --peers keras bare --rounds 3

Peers that are not installed are skipped. To install all of them, in an environment of their own:

    pip install -e '.[report]' torch lightning && pip install --no-deps tf-models-official tf_keras

All variants of a case take turns in one process, on the same examples and from the same weights. Each round trains one
epoch and then five. The difference gives the cost of a step; `fixed ms` is what the call of one epoch takes besides
its steps. A round to warm up, with the traces, comes first and is left out, except where a case has one round.
"""

import argparse
import contextlib
import gc
import importlib.util
import math
import os
import sys
import tempfile
import time
from pathlib import Path

from . import report  # cases come later, because TensorFlow takes seconds to import

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

SHORT, LONG = 1, 5  # epochs
CASES = [
    "vae",
    "inception",
    "one-weight",
    "wide",
    "metrics",
    "gan",
    "on_batch",
    "start",
    "checkpoint",
    "memory",
    "growth",
]
PEERS = {
    "keras": "",
    "orbit": "--no-deps tf-models-official tf_keras",
    "lightning": "lightning",
    "torch": "torch",
    "tensorflow": "",
    "bare": "",
}
"""What to install for each, beside looplab."""


def measures_of(run, steps):
    """What one variant costs in one round; a step costs 0 if five epochs took less than one."""
    gc.collect()
    if steps is None:
        return run()
    seconds = []
    for epochs in (SHORT, LONG):
        began = time.perf_counter()
        loss = run(epochs)
        seconds.append(time.perf_counter() - began)
    step = max(0.0, seconds[1] - seconds[0]) / (LONG - SHORT) / steps
    measures = {"ms per step": 1e3 * step, "fixed ms": 1e3 * (seconds[0] - SHORT * steps * step)}
    return measures if loss is None else measures | {"loss": float(loss)}


def rounds_of(case, peers, count):
    """The measures of each round, by variant."""
    import keras

    runs = {}
    for name, variant in case.variants.items():
        if report.peer(name) not in ("looplab", *peers):
            continue
        keras.utils.set_random_seed(0)
        try:
            runs[name] = variant.set_up()
        except ImportError as error:
            print(f"{name}: skipped, because {error}")
    rounds = []
    for number in range(min(count + 1, case.rounds)):
        print(f"round {number}" if number or case.rounds == 1 else "round to warm up", file=sys.stderr)
        order = list(runs) if number % 2 else list(reversed(runs))  # neighbours influence each other
        values = {name: measures_of(runs[name], case.variants[name].steps) for name in order}
        rounds.append({name: values[name] for name in runs})
    return rounds[1:] or rounds


def main():
    parser, arguments = parsed()
    peers = arguments.peers or list(PEERS)
    missing = [peer for peer in peers if PEERS[peer] and importlib.util.find_spec(peer) is None]
    if len(missing) == len(peers):
        parser.error("not installed: " + ", ".join(f"{peer} (pip install {PEERS[peer]})" for peer in missing))
    if not arguments.list:
        try:
            arguments.out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=arguments.out).close()
        except OSError as error:
            parser.error(f"argument --out: {error}")
    import keras

    from . import cases

    functions = {name: getattr(cases, name.replace("-", "_")) for name in CASES}
    if arguments.list:
        print("\n".join(f"{name:12}{create.__doc__}" for name, create in functions.items()))
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = os.environ["TMPDIR"] = folder
        for name in arguments.cases or [name for name in CASES if arguments.long or name != "growth"]:
            print(f"{name}: {functions[name].__doc__}", flush=True)
            case = functions[name](lambda count: max(1, round(arguments.steps * count)), arguments.data_dir)
            there = {report.peer(variant) for variant in case.variants}
            for peer in peers:
                if peer in there and peer in missing:
                    print(f"{peer}: skipped, because it is not installed: pip install {PEERS[peer]}")
                elif peer not in there and arguments.peers:
                    print(f"{peer}: skipped, because {name} has no variant of it")
            if arguments.peers and not there & {*peers} - {*missing}:
                continue
            results[name] = report.summary(rounds_of(case, {*peers} - {*missing}, arguments.rounds), case.figures)
            print(report.table(results[name]), flush=True)
            report.write(arguments.out, results, {"rounds": arguments.rounds, "steps": arguments.steps})
            keras.utils.clear_session()
    print(report.NOTES if results else "Nothing was measured: no case has a variant of these peers.")


def parsed():
    """The parser, and the arguments of the command."""
    cases, peers = ", ".join(CASES), ", ".join(PEERS)
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tests.benchmarks", description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, metavar="CASE", help=f"some of {cases} (default: all but growth)")
    add("--peers", nargs="+", choices=PEERS, metavar="PEER", help=f"some of {peers} (default: all)")
    add("--rounds", type=at_least_one, default=5, help="rounds to measure, after one to warm up (default: 5)")
    add("--steps", type=positive, default=1, help="factor for the number of steps (default: 1)")
    add("--data-dir", help="folder of mnist.npz")
    files = "table.md, results.json and chart.png, which are overwritten"
    add("--out", type=Path, default="logs/benchmarks", help=f"folder for {files} (default: logs/benchmarks)")
    add("--long", action="store_true", help="also run growth, which takes minutes")
    add("--list", action="store_true", help="list the cases")
    return parser, parser.parse_args()


def at_least_one(word):
    with contextlib.suppress(ValueError):
        if int(word) >= 1:
            return int(word)
    raise argparse.ArgumentTypeError(f"must be a whole number of at least 1; got {word!r}")


def positive(word):
    with contextlib.suppress(ValueError):
        if 0 < float(word) < math.inf:
            return float(word)
    raise argparse.ArgumentTypeError(f"must be a number above 0; got {word!r}")


if __name__ == "__main__":
    main()
