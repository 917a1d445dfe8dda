"""SIGTERM and Ctrl-C end a training after its running step, so that it can save what it has."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import tensorflow as tf

from looplab.warn import say
from looplab.workers import Workers


class Interrupted(SystemExit):
    """A signal has ended the training. The exit status is 128 plus the signal's number, as in shells."""

    def __init__(self, received: signal.Signals):
        super().__init__(128 + received)
        self.received = received


class Interrupts:
    """Inside it, the first signal ends the training after the running step, and a second one exits at once.

    Python calls a signal handler only when the main thread has returned from the graph. So another thread reads the
    signals as they arrive: at the first one it sets `stop`, and at the second one it ends the process. A signal that
    arrives while a step is traced ends the training after the trace.

    In other threads than the main thread, where Python cannot install handlers, signals do what they did before.

    Args:
        stop: A variable that the graph reads after each step, unless there are other workers.
        saves: Whether the training saves its state, and ends with `Interrupted`. If not, only Ctrl-C waits for the
            running step, so that counters and variables agree, and raises `KeyboardInterrupt`.
        workers: Those that train together: a signal that one of them receives ends the training of all.
    """

    def __init__(self, stop: tf.Variable, saves: bool, workers: Workers):
        self._stop = stop
        self._workers = workers
        self._saves = saves
        self._signals = (signal.SIGTERM, signal.SIGINT) if saves else (signal.SIGINT,)
        self._received: signal.Signals | None = None
        self._on_exit = contextlib.ExitStack()

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is not threading.main_thread():
            return self
        on_exit = self._on_exit
        self._stop.assign(False)
        on_exit.callback(self._stop.assign, False)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)  # `set_wakeup_fd` requires it
        thread = threading.Thread(target=self._watch, args=(reader,), name="looplab-signals", daemon=True)
        thread.start()
        on_exit.callback(os.close, reader)
        on_exit.callback(os.close, writer)
        on_exit.callback(thread.join)
        on_exit.callback(os.write, writer, b"\0")  # ends the thread: no signal has this number
        for number in self._signals:
            if signal.getsignal(number) != signal.SIG_IGN:  # `nohup` ignores signals
                before = signal.signal(number, self._handle)
                on_exit.callback(signal.signal, number, before or signal.SIG_DFL)
        on_exit.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(writer, warn_on_full_buffer=False))
        return self

    def __exit__(self, *_: object) -> None:
        self._on_exit.close()

    def check(self) -> None:
        """Raises `Interrupted`, or `KeyboardInterrupt` if nothing is saved, once a signal has arrived at a worker."""
        if number := self._workers.each(self._received or 0).max():
            raise Interrupted(signal.Signals(number)) if self._saves else KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._received = self._received or signal.Signals(number)
        _drop_unwritable()

    def _watch(self, reader: int) -> None:
        received = False
        while number := os.read(reader, 1)[0]:
            if number in self._signals:
                if received:
                    os._exit(128 + number)
                received = True
                self._stop.assign(True)
                name = signal.Signals(number).name
                say(f"\nlooplab: {name}: stopping after this step. Send it again to exit at once.", sys.stderr)


def _drop_unwritable() -> None:
    """From now on, text that standard output and error cannot write is dropped, whoever prints it.

    In `python ... | tee log`, Ctrl-C also ends `tee`. A `BrokenPipeError` in a callback's `print`, a progress bar, or
    Python itself at exit would prevent saving or change the exit status.
    """
    for stream in (sys.__stdout__, sys.__stderr__):
        buffer = getattr(stream, "buffer", None)
        raw = getattr(buffer, "raw", buffer)  # `python -u` has no buffer
        if isinstance(raw, io.FileIO):  # all objects that print to the stream use this one
            raw.write = functools.partial(_write_or_drop, raw.write)  # type: ignore[method-assign]


def _write_or_drop(write: Callable[[Any], int | None], data: Any) -> int | None:
    try:
        return write(data)
    except OSError:
        return len(data)
