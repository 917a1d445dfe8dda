"""A lock on a folder, held by one process, and freed by the kernel when that process ends in whatever way."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path


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
