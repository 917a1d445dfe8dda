"""Signals, sent to this process."""

import signal
import threading
import time

import pytest
import tensorflow as tf

from looplab.loop.interrupts import Interrupted, Interrupts
from looplab.workers import Workers

ALONE = Workers(tf.distribute.get_strategy())


@pytest.fixture
def stop():
    return tf.Variable(False)


def until(condition):
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_the_graph_to_stop_and_ends_the_training(stop, number, capfd):
    before = signal.getsignal(number)
    with Interrupts(stop, True, ALONE) as interrupts:
        interrupts.check()
        signal.raise_signal(number)
        assert until(lambda: bool(stop))
        with pytest.raises(Interrupted) as caught:
            interrupts.check()
        assert (caught.value.code, caught.value.received) == (128 + number, number)
    assert not stop
    assert signal.getsignal(number) is before
    assert f"{signal.Signals(number).name}: stopping after this step" in capfd.readouterr().err


def test_if_nothing_is_saved_only_ctrl_c_waits(stop):
    before = signal.getsignal(signal.SIGTERM)
    with Interrupts(stop, False, ALONE) as interrupts:
        assert signal.getsignal(signal.SIGTERM) is before
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()


def test_ignored_signals_stay_ignored(stop):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with Interrupts(stop, True, ALONE) as interrupts:
            signal.raise_signal(signal.SIGTERM)
            interrupts.check()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_install_nothing(stop):
    found = []

    def train():
        with Interrupts(stop, True, ALONE):
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert found == [before]
