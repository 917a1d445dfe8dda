"""The processes that train together under a `tf.distribute` strategy, and what they agree on."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import tensorflow as tf

from looplab.warn import be_quiet, say

T = TypeVar("T")
_WORD = np.dtype(np.int64)
_DIFFER = re.compile("(?:Shape mismatch in|expected type).*")


class WorkerLost(SystemExit):
    """Another worker has ended. The exit status is 75, for which a launcher should start all workers again."""

    def __init__(self) -> None:
        super().__init__(os.EX_TEMPFAIL)


class Workers:
    """The processes that train together: one, unless the strategy has several workers.

    TensorFlow waits forever for a worker that does not take part in a reduction. So whatever depends on one worker
    alone (its clock, its signals, its callbacks, its disk) is agreed here before the graph depends on it. All workers
    call the same methods in the same order, between graph calls.

    Args:
        strategy: That of the trainer.
    """

    def __init__(self, strategy: tf.distribute.Strategy):
        resolver = strategy.cluster_resolver
        spec = tf.train.ClusterSpec({}) if resolver is None else resolver.cluster_spec()
        self.number = max(number_of_workers(spec), 1)
        """How many there are."""
        self.rank = rank_of(resolver) if self.number > 1 else 0
        """Which one this is; the first is the chief, which alone writes."""
        if not self.is_chief:
            be_quiet()

        @tf.function(input_signature=[tf.TensorSpec([None], tf.int64)], autograph=False)
        def total(vector: tf.Tensor) -> tf.Tensor:
            """The sum of the vectors of all workers; of the replicas of one, only the first counts."""

            def of_replica(vector: tf.Tensor) -> tf.Tensor:
                context = tf.distribute.get_replica_context()
                is_first = tf.equal(context.replica_id_in_sync_group % (context.num_replicas_in_sync // self.number), 0)
                return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.where(is_first, vector, 0))

            return strategy.experimental_local_results(strategy.run(of_replica, (vector,)))[0]

        self._total = total

    @contextlib.contextmanager
    def needed(self) -> Iterator[None]:
        """Inside it, `WorkerLost` is raised if another worker ends."""
        try:
            yield
        except tf.errors.OpError as error:
            if self.number == 1 or "Collective" not in str(error):
                raise
            if _DIFFER.search(str(error)):
                raise RuntimeError(
                    f"The {self.number} workers do not do the same: {_DIFFER.findall(str(error))[-1]}. Run the same "
                    f"program, with the same arguments, on all of them."
                ) from error
            if not isinstance(error, tf.errors.UnavailableError):
                raise
            say(
                f"looplab: worker {self.rank} of {self.number} stops, because another one has ended. Start all of them "
                f"again, to resume from the newest checkpoint.",
                sys.stderr,
            )
            raise WorkerLost from error

    @property
    def is_chief(self) -> bool:
        """Whether this worker writes the files of the run."""
        return self.rank == 0

    def each(self, *numbers: int) -> np.ndarray:
        """The numbers of all workers, of shape (workers, numbers)."""
        table = np.zeros((self.number, len(numbers)), _WORD)
        table[self.rank] = numbers
        return self._sum(table)

    def any(self, condition: Any) -> bool:
        """Whether it holds on a worker."""
        return bool(self.each(bool(condition)).any())

    def of_all(self, thing: T) -> list[T]:
        """The thing that each worker has, in their order."""
        if self.number == 1:
            return [thing]
        data = pickle.dumps(thing, pickle.HIGHEST_PROTOCOL)
        sizes = self.each(len(data))[:, 0]
        words = -(-sizes // _WORD.itemsize)
        vector = np.zeros(words.sum(), _WORD)
        start = words[: self.rank].sum()
        vector[start : start + words[self.rank]].view(np.uint8)[: len(data)] = np.frombuffer(data, np.uint8)
        parts = np.split(self._sum(vector).view(np.uint8), np.cumsum(words)[:-1] * _WORD.itemsize)
        return [pickle.loads(part[:size].tobytes()) for part, size in zip(parts, sizes, strict=True)]

    def of_chief(self, function: Callable[[], T]) -> T:
        """What the function returns on the chief, which alone calls it; all raise the exception that it raises."""
        if self.number == 1:
            return function()
        result, error = None, None
        if self.is_chief:
            try:
                result = function()
            except Exception as raised:
                error = raised
        results: Sequence[Any] = self.of_all((result, error))
        their_result, their_error = results[0]
        if error is not None or their_error is not None:
            raise error or their_error
        return result if self.is_chief else their_result  # type: ignore[return-value]

    def require_same(self, of: str, describe: Callable[[], dict[str, Any]]) -> None:
        """Raises `ValueError` on all workers if something that `describe` names is not the same on each."""
        found = [] if self.number == 1 else self.of_all(describe())
        for rank, theirs in enumerate(found):
            for name, thing in theirs.items():
                if thing != (first := found[0].get(name)):
                    raise ValueError(
                        f"{of}: {name} is {first!r} on the first worker, and {thing!r} on worker {rank}. Pass the same "
                        f"on all workers."
                    )

    def if_chief(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Calls a function on the chief alone."""
        if self.is_chief:
            function(*args, **kwargs)

    def _sum(self, table: np.ndarray) -> np.ndarray:
        if self.number == 1:
            return table
        return np.reshape(self._total(tf.constant(table.ravel())).numpy(), table.shape)


def number_of_workers(spec: tf.train.ClusterSpec) -> int:
    """How many processes of a cluster train."""
    return sum(spec.num_tasks(job) for job in ("chief", "worker") if job in spec.jobs)


def rank_of(resolver: tf.distribute.cluster_resolver.ClusterResolver) -> int:
    """Which of the workers this process is; a job "chief" comes first."""
    spec = resolver.cluster_spec()
    before = spec.num_tasks("chief") if "chief" in spec.jobs and resolver.task_type == "worker" else 0
    return int(resolver.task_id) + before
