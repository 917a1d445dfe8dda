"""Whose a log folder is: of one process at a time, and of the trainer whose run it holds.

The lock of a process is freed by the kernel when it ends, in whatever way.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

_CHECKPOINTS = "checkpoints/step-*"


class InUseError(ValueError):
    """A folder is not to be had."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within it, `folder` (made if it is not there) is this process's own.

    Raises:
        InUseError: Another process holds it, or it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise InUseError(f"`log_dir` {folder} has a .lock that is no file. Remove it, or pass another folder.")
    except OSError as error:
        raise InUseError(f"`log_dir` {folder} cannot be written to: {error.strerror}. Pass another folder.") from error
    with open(descriptor, "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise InUseError(
                f"`log_dir` {folder} is in use by {holder}. Wait for it, end it, or pass another folder."
            ) from error
        file.truncate(0)
        holder = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
        try:
            os.write(descriptor, holder.encode())
        except OSError as error:
            raise OSError(f"`log_dir` {folder} cannot be written to: {error.strerror}.") from error
        yield


def no_other_run(log_dir: Path, go_on: bool = False) -> None:
    """The log folder holds no run of another trainer; or, to go on, nothing but one."""
    if log_dir.exists() and not log_dir.is_dir():
        raise ValueError(f"`log_dir` must be a folder; {log_dir} is a file. Pass another folder.")
    own = any(any(log_dir.glob(f"{folder}/events.out.*")) for folder in ("train", "validation"))
    if go_on and own and not may_go_on(log_dir):
        raise ValueError(
            f"`resume`: `log_dir` {log_dir} holds event files that looplab did not write, and no run to go on with. "
            f"Pass a new folder, or remove this one."
        )
    if _holds_run(log_dir) and not go_on:
        raise ValueError(
            f"`log_dir` {log_dir} holds the run of another trainer. Go on with it by `fit(..., resume=True)`, or by "
            f"--resume on a recipe's command line; else pass a new folder, or remove this one."
        )


def may_go_on(log_dir: Path) -> bool:
    """Whether the folder holds a run that was made to go on."""
    return ((log_dir / ".lock").exists() or any(log_dir.glob(_CHECKPOINTS))) and _holds_run(log_dir)


def _holds_run(log_dir: Path) -> bool:
    return any(any(log_dir.glob(names)) for names in ("events.out.*", "*/events.out.*", _CHECKPOINTS))
