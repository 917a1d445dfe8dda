"""SIGTERM and Ctrl-C end a training after its running step, so that it can save what it has."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import tensorflow as tf

from looplab.warn import say

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(SystemExit):
    """The training was ended by a signal; as an exit status, 128 and the signal's number, as shells have it."""

    def __init__(self, received: signal.Signals):
        super().__init__(128 + received)
        self.received = received


class Interrupts:
    """Within it, the first signal asks the training to end, and a second one ends the process at once.

    Python runs a handler only when its main thread comes back from the graph. So a thread of our own reads the signals
    as they come: it tells the graph, whose running step becomes its last, and it ends the process at the second one.
    Outside of the main thread, where no handler can be installed, signals do what they did.

    Args:
        stop: A variable that the graph looks at after each step.
        saves: Whether the training saves what it has, and ends with `Interrupted`. If not, only Ctrl-C waits for the
            running step, so that counters and variables agree, and raises `KeyboardInterrupt`.
    """

    def __init__(self, stop: tf.Variable, saves: bool):
        self._stop = stop
        self._saves = saves
        self._signals = _SIGNALS if saves else (signal.SIGINT,)
        self._active = threading.current_thread() is threading.main_thread()
        self._received: signal.Signals | None = None
        self._at_once = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if self._active:
            self._stop.assign(False)
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)  # as `set_wakeup_fd` wants it
            self._thread = threading.Thread(target=self._watch, name="looplab-signals", daemon=True)
            self._thread.start()
            heeded = (
                number for number in self._signals if signal.getsignal(number) != signal.SIG_IGN
            )  # as with `nohup`
            self._before = {number: signal.signal(number, self._handle) for number in heeded}
            self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        if self._active:
            signal.set_wakeup_fd(self._wakeup_before)
            for number, handler in self._before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            os.write(self._write, b"\0")  # no signal has this number
            self._thread.join()
            os.close(self._write)
            os.close(self._read)
            self._stop.assign(False)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it a signal interrupts whatever runs: for what takes long and changes nothing, such as tracing."""
        self.check()
        self._at_once = True
        try:
            yield
        except Exception:
            self.check()  # in the middle of TensorFlow's own book-keeping, the signal may come out as another error
            raise
        finally:
            self._at_once = False
            if sys.gettrace() == self._interrupt:
                sys.settrace(None)

    def check(self) -> None:
        """Raises `Interrupted`, or `KeyboardInterrupt` where nothing is saved, if a signal came."""
        if self._received is not None:
            raise Interrupted(self._received) if self._saves else KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        _never_fail_to_print()
        self._received = self._received or signal.Signals(number)
        if self._at_once and frame is not None:
            self._at_once = False
            self._interrupt(frame)

    def _interrupt(self, frame: FrameType, event: str = "", arg: Any = None) -> Any:
        """Raises `Interrupted`; where that would be lost, as a trace function as soon as it would not."""
        heeding = _heeding(frame)
        if heeding is frame:
            self.check()
        heeding.f_trace = self._interrupt
        sys.settrace(self._interrupt)
        return self._interrupt

    def _watch(self) -> None:
        count = 0
        while (number := os.read(self._read, 1)) != b"\0":
            if number[0] in self._signals:
                count += 1
                if count > 1:
                    os._exit(128 + number[0])
                received = self._received = signal.Signals(number[0])
                self._stop.assign(True)
                say(f"\nlooplab: {received.name}: stopping after this step. Send it again to exit at once.", sys.stderr)


def _never_fail_to_print() -> None:
    """From now on, what standard output and error cannot write is dropped, whoever prints it.

    In `python ... | tee log`, Ctrl-C also ends `tee`. A `BrokenPipeError` of a callback's `print`, of a progress bar,
    or of Python itself at exit would then prevent the saving or change the exit status.
    """
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        buffer = getattr(stream, "buffer", None)
        raw = getattr(buffer, "raw", buffer)  # with `python -u` there is no buffer in between
        if isinstance(raw, io.FileIO):  # the innermost object: a progress bar may hold any of those around it
            raw.write = _forgiving(raw.write)  # type: ignore[method-assign]


def _forgiving(write: Callable[[Any], int | None]) -> Callable[[Any], int | None]:
    def write_or_drop(data: Any) -> int | None:
        try:
            return write(data)
        except OSError:
            return len(data)

    return write_or_drop


def _heeding(frame: FrameType) -> FrameType:
    """The innermost frame from this one on in which an exception is not lost.

    Python prints what a finalizer raises, and goes on. So does TensorFlow's C++, where it asks for a class or a module,
    which runs the standard library's code.
    """
    heeding = frame
    inner: FrameType | None = frame
    while inner is not None:
        if (inner.f_code.co_name == "__del__" or inner.f_globals.get("__name__") == "weakref") and inner.f_back:
            heeding = inner.f_back
        inner = inner.f_back
    while heeding.f_globals.get("__name__", "").partition(".")[0] in sys.stdlib_module_names and heeding.f_back:
        heeding = heeding.f_back
    return heeding
