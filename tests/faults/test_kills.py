"""SIGKILLs at random times and at all that a save does to the disk: no run is lost, nor one bit of it.

Six kills of each net by default, ten in a row of one. LOOPLAB_FAULTS=200 makes 200 (100 of each net), and ten in a row
of both.
"""

import itertools
import math
import os
import random
import signal

import keras
import pytest
from runs import EVERY, FAULTS, NETS, Child, Event, Outcome, check_same, checkpoints, steps_seen

NAMES = list(NETS)


@pytest.mark.parametrize("net", NAMES)
def test_a_killed_run_resumes_to_the_same_bits(net, uninterrupted, tmp_path):
    expected = uninterrupted(net)
    dice = random.Random(f"kills of {net}")
    places = itertools.cycle(in_turn(expected.events, dice, first=NAMES.index(net)))
    folders = (tmp_path / f"run-{number}" for number in itertools.count())
    log_dir, lost = next(folders), []
    for number in range(FAULTS // 2 or 6):
        event = next(places) if number % 2 else None
        # What is left of a run may end before its kill: then another begins, which does not.
        while not killed(net, log_dir, event, dice.uniform(0, expected.seconds)):
            check_same(log_dir, expected)
            log_dir = next(folders)
        lost.append(check_after_kill(log_dir))
    assert_resumes_to(expected, net, log_dir)
    print(f"{net}: {len(lost)} kills; steps lost at most {max(lost)}, {sum(lost) / len(lost):.1f} on average")


@pytest.mark.parametrize("net", NAMES if FAULTS else NAMES[1:])
def test_ten_kills_in_a_row_of_one_run(net, uninterrupted, tmp_path):
    expected = uninterrupted(net)
    dice = random.Random(f"ten kills of {net}")
    places = [event for event in expected.events if event.save == 0]
    for attempt in itertools.count():
        log_dir = tmp_path / f"run-{attempt}"
        kills = 0
        while kills < 10:
            event = dice.choice(places) if kills % 2 else None
            if not killed(net, log_dir, event, dice.uniform(0, 0.7 * expected.seconds)):
                break
            check_after_kill(log_dir)
            kills += 1
        assert_resumes_to(expected, net, log_dir)
        if kills == 10:  # else it ended before
            return


def two_fits(log_dir):
    """The second `fit` of a program, that keeps one checkpoint alone."""
    trainer, arguments = NETS["vae"](log_dir, every=1, keep=1)
    return trainer, {**arguments, "epochs": 2}


def first_fit(trainer, arguments):
    trainer.fit(**{**arguments, "epochs": 1}, resume=True, verbose=0)


def first_fit_then_a_signal(trainer, arguments):
    first_fit(trainer, arguments)
    arguments["callbacks"] = [*arguments["callbacks"], Terminates()]


class Terminates(keras.callbacks.Callback):
    """Sends SIGTERM before the first step."""

    stateless = True

    def on_epoch_begin(self, epoch, logs=None):
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("kind", ["write", "rename", "remove"] if FAULTS else ["write"])
def test_a_save_at_the_step_of_an_earlier_one_is_killed_and_that_one_is_not_lost(kind, tmp_path):
    whole = tmp_path / "whole"
    child = Child(two_fits, whole, before=first_fit)
    assert child.wait() == 0, child.stderr()

    # The first `fit` saves after each of its 7 steps and at its end; the second one after none.
    log_dir = tmp_path / "killed"
    child = Child(two_fits, log_dir, before=first_fit_then_a_signal, dies_at=Event(8, kind, 0))
    assert child.wait() in (-signal.SIGKILL, 128 + signal.SIGTERM), child.stderr()
    assert checkpoints(log_dir) == [(7, 1)]
    child = Child(two_fits, log_dir, before=first_fit)
    assert child.wait() == 0, child.stderr()
    check_same(log_dir, Outcome.of(whole))


def in_turn(events: list[Event], dice: random.Random, first: int = 0) -> list[Event]:
    """One event for each thing that a save does, of some save: a write, an fsync, a rename, a removal, and so on."""
    places: dict[str, dict[int, list[Event]]] = {}
    for event in events:
        places.setdefault(event.kind, {}).setdefault(event.index, []).append(event)
    order = sorted(places)
    order = [*order[first:], *order[:first]]
    chosen = [[dice.choice(same) for same in places[kind].values()] for kind in order]
    for same_kind in chosen:
        dice.shuffle(same_kind)
    return [event for row in itertools.zip_longest(*chosen) for event in row if event is not None]


def killed(net: str, log_dir, event: Event | None, seconds: float) -> bool:
    """Continues a run until it is killed, at an event or after so many seconds of `fit`; False if it ends before."""
    child = Child(NETS[net], log_dir, dies_at=event)
    if event is None and child.wait_for("fit", ends=True):
        child.kill_after(seconds)
    status = child.wait()
    assert status in (0, -signal.SIGKILL), child.stderr()
    assert "Warning" not in child.stderr()
    return status != 0


def check_after_kill(log_dir) -> int:
    """At most one interval is lost, and the steps that ran while one save was written; returns how many steps are."""
    seen = steps_seen(log_dir)
    newest = max([steps for steps, _ in checkpoints(log_dir)], default=0)
    started = EVERY * (math.ceil(seen / EVERY) - 1)  # the last save before the last step: it waited for the one before
    assert newest >= started - EVERY, f"{seen} steps were done, and {newest} are saved"
    return seen - newest


def assert_resumes_to(expected, net: str, log_dir) -> None:
    child = Child(NETS[net], log_dir)
    assert child.wait() == 0, child.stderr()
    assert "Warning" not in child.stderr()
    check_same(log_dir, expected)
