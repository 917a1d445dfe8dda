"""Replaces methods of Keras and TensorFlow while steps are traced or run."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Hooks:
    """`with hooks:` replaces methods of a class, in all threads, until the last block ends.

    Keras and TensorFlow have no public way to observe these calls.

    Args:
        base: The class, or a module with functions.
        wrappers: By method name, `wrapper(method, self, *args, **kwargs)`, which is called instead.
        subclasses: Whether to replace the methods of all subclasses as well.
    """

    def __init__(self, base: Any, wrappers: dict[str, Callable[..., Any]], subclasses: bool = False):
        self._base = base
        self._wrappers = wrappers
        self._subclasses = subclasses
        self._lock = threading.Lock()
        self._users = 0
        self._originals: dict[tuple[type, str], Any] = {}

    def __enter__(self) -> None:
        with self._lock:
            self._users += 1
            for owner in _with_subclasses(self._base) if self._subclasses else [self._base]:
                for name in self._wrappers.keys() & vars(owner).keys():
                    if (owner, name) not in self._originals:
                        original = self._originals[owner, name] = vars(owner)[name]
                        setattr(owner, name, _wrapped(self._wrappers[name], original))

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                for (owner, name), original in self._originals.items():
                    setattr(owner, name, original)
                self._originals.clear()


def _with_subclasses(base: type) -> Iterator[type]:
    yield base
    subclasses: list[type] = type.__subclasses__(base)
    for subclass in subclasses:
        yield from _with_subclasses(subclass)


def _wrapped(wrapper: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    return method
