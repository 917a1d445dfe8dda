"""Which process may write to a log folder, and whether the run in it belongs to another trainer."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shlex
import socket
import time
from io import FileIO
from pathlib import Path

from looplab.warn import warn

FOLDERS = ("train", "validation", "time")
"""The folders in a log folder that have looplab's event files."""
HPARAMS = "events.out.tfevents.0000000000.hparams"
"""The event file in a log folder with the hyperparameters of the run. It sorts first: of several event files in a
folder, TensorBoard reads only the last one as it grows."""
_EVENTS = tuple(f"{folder}/events.out.*" for folder in FOLDERS)
_CHECKPOINTS = "checkpoints/step-*"
_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_held: set[FolderLock] = set()


class InUseError(ValueError):
    """The log folder is locked or not writable."""


class FolderLock:
    """Inside it, no other process can lock the folder, which is created if needed.

    The kernel unlocks the folder when the process ends, however it ends. On a file system without locks, it warns.

    Raises:
        InUseError: Another process holds the lock, or the folder is not writable.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._path = folder / ".lock"
        self._file: FileIO | None = None
        self._has_warned = False

    @property
    def held(self) -> bool:
        """Whether this process is inside it."""
        return self._file is not None

    def __enter__(self) -> FolderLock:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK  # it follows no link and waits for no pipe
            self._file = FileIO(os.open(self._path, flags, 0o666), "r+")
            _held.add(self)  # before it is locked: a child process that is forked from now on releases it
            self._lock(self._file)
            self._file.truncate(0)
            holder = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
            self._file.write(f"{holder}\n".encode())
        except BaseException as error:
            self.release()
            if not isinstance(error, OSError):
                raise
            raise InUseError(
                f"`log_dir` {self._folder} cannot be written to or locked by its file .lock: {error.strerror}. Pass "
                f"another folder."
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def renew(self) -> bool:
        """Locks the folder again if its lock file was deleted or replaced; returns whether it was.

        Raises:
            InUseError: Another process has locked the folder since.
        """
        if self._file is None:
            return False
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path)):
                return False
        self.release()
        self.__enter__()
        return True

    def release(self) -> None:
        """Unlocks the folder; a forked process only gives up its share of the lock."""
        file, self._file = self._file, None
        _held.discard(self)
        if file is not None:
            file.close()

    def _lock(self, file: FileIO) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = file.read(200).decode(errors="replace").strip() or "another process"
            raise InUseError(
                f"`log_dir` {self._folder} is in use by {holder}. Wait for it, end it, or pass another folder. If it "
                f"has ended, a child process that it started still holds the lock; "
                f"`lsof {shlex.quote(str(self._path))}` shows which."
            ) from error
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            if not self._has_warned:
                self._has_warned = True
                warn(
                    f"`log_dir` {self._folder} cannot be locked ({error.strerror}): its file system does not support "
                    f"it. Nothing stops a second run from writing to it; let only one run use it at a time."
                )


def _release_all() -> None:
    """Releases the locks of the parent process, which a forked process would hold for as long as it lives."""
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_release_all)


def no_other_run(log_dir: Path, resume: bool = False) -> None:
    """Checks that the log folder holds no run; with `resume`, that it holds nothing but a run of looplab.

    Raises:
        ValueError: It does not.
    """
    if log_dir.exists() and not log_dir.is_dir():
        raise ValueError(f"`log_dir` must be a folder; {log_dir} is a file. Pass another folder.")
    if resume and _holds(log_dir, *_EVENTS) and not can_resume(log_dir):
        raise ValueError(
            f"`resume`: `log_dir` {log_dir} holds event files that looplab did not write, and no run to resume. "
            f"Pass a new folder, or remove this one."
        )
    if not resume and _holds_run(log_dir):
        raise ValueError(
            f"`log_dir` {log_dir} holds the run of another trainer. Resume it with `fit(..., resume=True)`, or with "
            f"--resume on a recipe's command line; otherwise pass a new folder, or remove this one."
        )


def can_resume(log_dir: Path) -> bool:
    """Whether the folder holds a run of looplab."""
    return _holds_run(log_dir) and _holds(log_dir, ".lock", _CHECKPOINTS)


def _holds_run(log_dir: Path) -> bool:
    """Whether it holds any part of a run; event files elsewhere in it are the user's."""
    return _holds(log_dir, *_EVENTS, _CHECKPOINTS, HPARAMS)


def _holds(log_dir: Path, *patterns: str) -> bool:
    return any(any(log_dir.glob(pattern)) for pattern in patterns)
