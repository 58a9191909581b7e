"""A folder of one user's processes on one machine that is gone with the last of them, also after SIGKILL.

    <tmp>/micacl-cache-<uid>/       mode 0700; if that name is not safely ours, a fresh one of mkdtemp
        users.lock                  each user holds it shared
        (files)                     whatever the users keep there

Who gets `users.lock` exclusively is alone: the last user, who deletes the folder, or an opener, who clears what
killed processes left. A process that ends by a signal, or a forked child that ends last, leaves the clearing to the
next opener.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pipeline import flocks

_LOG = logging.getLogger(__name__)
_USERS = "users.lock"


@dataclass(frozen=True, slots=True)
class PrivateFolder:
    """Held open by this process until `leave`."""

    path: Path
    users: int
    """Descriptor of the shared lock, of this process: a forked child has none."""


def enter(stem: str) -> PrivateFolder:
    """`<tmp>/<stem>-<uid>`, or a folder of its own if that name is taken. Raises OSError where nothing can be made."""
    usual = Path(tempfile.gettempdir()) / f"{stem}-{os.geteuid()}"
    for stray in usual.parent.glob(f"{usual.name}-*"):
        _clear_stray(stray)
    if (found := _join(usual)) is not None:
        return found
    _LOG.warning("%s is not a folder that only this user can open: it is not used.", usual)
    if (found := _join(Path(tempfile.mkdtemp(prefix=f"{usual.name}-")))) is None:
        raise PermissionError(f"no private folder can be made in {usual.parent}")
    return found


def leave(folder: PrivateFolder) -> None:
    """Deletes the folder if nobody else uses it. For the process that entered, not for a forked child of it."""
    with contextlib.suppress(OSError):  # of which BlockingIOError: there are other users
        fcntl.flock(folder.users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if flocks.named(folder.path / _USERS, folder.users):
            _delete(folder.path)
    flocks.drop(folder.users)


def _join(path: Path) -> PrivateFolder | None:
    """None if the folder is not safely ours."""
    while True:
        with contextlib.suppress(FileExistsError):
            path.mkdir(0o700)
        with contextlib.suppress(FileNotFoundError):  # its last user deleted it meanwhile
            if not _ours(path):
                return None
            with flocks.held(path / _USERS, fcntl.LOCK_EX | fcntl.LOCK_NB) as alone:
                if alone is not None:
                    _clear(path)
            users = flocks.take(path / _USERS, fcntl.LOCK_SH)
            assert users is not None
            return PrivateFolder(path, users)


def _ours(path: Path) -> bool:
    found = path.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not stat.S_IMODE(found.st_mode) & 0o077


def _clear_stray(path: Path) -> None:
    """A folder of mkdtemp whose users were killed."""
    with contextlib.suppress(OSError):
        if _ours(path):
            with flocks.held(path / _USERS, fcntl.LOCK_EX | fcntl.LOCK_NB) as alone:
                if alone is not None:
                    _delete(path)


def _clear(path: Path) -> None:
    for file in path.iterdir():
        if file.name != _USERS:
            with contextlib.suppress(OSError):
                file.unlink()


def _delete(path: Path) -> None:
    """Under the exclusive lock. From the moment `users.lock` is gone another may begin anew: only rmdir follows."""
    _clear(path)
    (path / _USERS).unlink()
    path.rmdir()
