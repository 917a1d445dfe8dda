"""Data as batches, epoch after epoch, and how often a run has iterated over it."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from looplab.data.randomness import draws_at_start
from looplab.warn import warn


@dataclasses.dataclass
class _Iterations:
    """How often a dataset that shuffles in each iteration was iterated over; None if an iteration drew several orders.

    TensorFlow draws the orders of such a dataset one after another: a resumed run has to draw those before its own.
    """

    done: int | None = 0
    """In this process."""
    missing: int | None = 0
    """In the run that this process continues, in addition."""


_iterations: weakref.WeakKeyDictionary[tf.data.Dataset, _Iterations] = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True)
class Batches:
    """Data as batches, epoch after epoch."""

    name: str
    """What errors call it."""
    start: Callable[..., Any]
    """`start(epoch, batch=0)`: the batches of that epoch, from that batch; both count from 0. Can be iterated over."""
    steps: int | None
    """Batches in an epoch; None if only the end of the data shows it."""
    continues: bool
    """Whether one iterator runs through all epochs; otherwise each epoch has its own."""
    described: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What a resumed run must not change, as JSON holds it."""
    element_spec: Any = None
    """The signature of a batch."""
    arrays: Any = None
    """x, (x, y) or (x, y, sample_weight), if they were passed as arrays."""
    unseeded: str = ""
    """What differs in it from run to run; "" if nothing does. Of an evaluation by one worker, it is unknown."""
    dataset: tf.data.Dataset | None = None
    """The user's dataset, if it shuffles in each iteration."""
    draws_several: bool = False
    """Whether an iteration may draw several orders of `dataset`, or none; nobody counts them."""
    inexact: str = ""
    """Why a resumed run may see other batches, as the predicate of a sentence about the data; "" if it sees the same.
    """
    is_read_once: bool = False
    """Whether all iterations continue the first one."""
    failures: list[Exception] = dataclasses.field(default_factory=list)
    """What Python code that yields the batches has raised, in this process."""
    on_begin: Callable[[], None] = lambda: None
    """Called before each iteration."""
    on_end: Callable[[], None] = lambda: None
    """Called after each pass."""

    @property
    def starts(self) -> int | None:
        """How often the run has iterated over its dataset, if that shuffles in each iteration; None if unknown."""
        count = _Iterations() if self.dataset is None else _iterations.get(self.dataset, _Iterations())
        return None if count.done is None or count.missing is None else count.done + count.missing

    def iterate(self, epoch: int, batch: int = 0) -> Iterator:
        """An iterator over `start(epoch, batch)`, in the order that it has in this run; warns if that is unknown."""
        if self.dataset is not None:
            count = _iterations.setdefault(self.dataset, _Iterations())
            if count.missing is None:
                warn(
                    f"`{self.name}` shuffles in each iteration and is not read to its end, so a resumed run cannot "
                    f"restore its order: pass reshuffle_each_iteration=False to `shuffle`."
                )
            for _ in range(count.missing or 0):
                skipped = iter(self.dataset)
                if not draws_at_start(self.dataset):
                    collections.deque(skipped, maxlen=0)
            starts = self.starts
            count.done = None if starts is None or self.draws_several else starts + 1
            count.missing = 0
        data = self.start(epoch, batch)
        self.on_begin()
        return iter(data)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Encloses a pass; inside it, exceptions of the Python code that yields the batches are raised unchanged."""
        try:
            yield
        except tf.errors.OpError as error:
            if not self.failures:
                raise
            raise self.failures[0] from error
        finally:
            self.on_end()

    def resume(self, starts: int | None) -> None:
        """Lets the next iteration continue a run that has iterated over its dataset `starts` times.

        Raises:
            ValueError: This process has iterated over it more often.
        """
        if self.dataset is not None:
            count = _iterations.setdefault(self.dataset, _Iterations())
            if starts is None:
                count.missing = None
            elif count.done is None or count.done > starts:
                raise ValueError(
                    f"`{self.name}` is a dataset that shuffles in each iteration, and this process has already used "
                    f"the order that the resumed run needs. Create the dataset again, or pass "
                    f"reshuffle_each_iteration=False to `shuffle`."
                )
            else:
                count.missing = starts - count.done
