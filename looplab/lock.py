"""Whose a log folder is: which process may write to it, and whether the run in it is another trainer's."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shlex
import socket
import stat
import time
from io import FileIO
from pathlib import Path

from looplab import hparams
from looplab.warn import warn

FOLDERS = ("train", "validation")
"""The folders in a log folder that have looplab's event files."""
_CHECKPOINTS = "checkpoints/step-*"
_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_held: set[FolderLock] = set()


class InUseError(ValueError):
    """The log folder is locked or not writable."""


class FolderLock:
    """Within it, no other process can lock the folder, which is created if needed.

    The kernel unlocks it when the process ends, however it ends. A file system without locks gives a warning instead.

    Raises:
        InUseError: Another process holds the lock, or the folder is not writable.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._path = folder / ".lock"
        self._file: FileIO | None = None
        self._warned = False

    @property
    def held(self) -> bool:
        """Whether this process is within it."""
        return self._file is not None

    def __enter__(self) -> FolderLock:
        self._acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def renew(self) -> bool:
        """Locks the folder again if its lock file was deleted or replaced, and returns whether it was.

        Raises:
            InUseError: Another process has locked the folder since.
        """
        if self._file is None:
            return False
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path)):
                return False
        self.release()
        self._acquire()
        return True

    def release(self) -> None:
        """Unlocks the folder, unless a forked child still holds the lock too."""
        file, self._file = self._file, None
        _held.discard(self)
        if file is not None:
            file.close()

    def _acquire(self) -> None:
        file = self._file = self._opened()
        _held.add(self)  # before it is locked: a child forked from now on gives it up
        try:
            self._lock(file)
            self._sign(file)
        except BaseException:
            self.release()
            raise

    def _opened(self) -> FileIO:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
            file = FileIO(os.open(self._path, flags, 0o666), "r+")
        except OSError as error:
            raise InUseError(
                f"`log_dir` {self._folder} cannot be written to: {error.strerror}. Pass another folder."
            ) from error
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise InUseError(
                f"`log_dir` {self._folder} has a .lock that is not a file. Remove it, or pass another folder."
            )
        return file

    def _lock(self, file: FileIO) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InUseError(self._in_use(file.read(200).decode(errors="replace").strip())) from error
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise InUseError(
                    f"`log_dir` {self._folder} cannot be locked: {error.strerror}. Pass another folder."
                ) from error
            if not self._warned:
                self._warned = True
                warn(
                    f"`log_dir` {self._folder} cannot be locked ({error.strerror}): its file system does not support "
                    f"it. Nothing stops a second run from writing to it; let only one run use it at a time."
                )

    def _sign(self, file: FileIO) -> None:
        """Writes who holds the lock."""
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {_host()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
        except OSError as error:
            raise OSError(f"`log_dir` {self._folder} cannot be written to: {error.strerror}.") from error

    def _in_use(self, holder: str) -> str:
        process = re.match(r"process (\d{1,9}) on (\S+) since", holder)
        if process and process[2] == _host() and not _is_running(int(process[1])):
            return (
                f"`log_dir` {self._folder} is locked by {holder}, which has ended. A child process that it started, "
                f"such as a worker of a data loader, still holds the lock: find it with `lsof "
                f"{shlex.quote(str(self._path))}` and end it, or pass another folder."
            )
        holder = holder or "another process"
        return f"`log_dir` {self._folder} is in use by {holder}. Wait for it, end it, or pass another folder."


def _host() -> str:
    return socket.gethostname()


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    with contextlib.suppress(OSError):  # on Linux: an ended process stays a zombie until its parent asks for its status
        return b") Z " not in Path(f"/proc/{process}/stat").read_bytes()
    return True


def _release_inherited() -> None:
    """A forked child would hold its parent's locks for as long as it lives."""
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_release_inherited)


def no_other_run(log_dir: Path, resume: bool = False) -> None:
    """Checks that the log folder holds no run of another trainer, or with `resume`, nothing but one.

    Raises:
        ValueError: It does.
    """
    if log_dir.exists() and not log_dir.is_dir():
        raise ValueError(f"`log_dir` must be a folder; {log_dir} is a file. Pass another folder.")
    if resume and _has_points(log_dir) and not can_resume(log_dir):
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
    return ((log_dir / ".lock").exists() or any(log_dir.glob(_CHECKPOINTS))) and _holds_run(log_dir)


def _holds_run(log_dir: Path) -> bool:
    """Whether anything of a run is there; event files in other folders are the user's own."""
    return _has_points(log_dir) or any(log_dir.glob(_CHECKPOINTS)) or bool(hparams.files(log_dir))


def _has_points(log_dir: Path) -> bool:
    return any(any(log_dir.glob(f"{folder}/events.out.*")) for folder in FOLDERS)
