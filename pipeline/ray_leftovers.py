"""What a private Ray may leave behind, and its removal: processes that outlive an interrupted start, folders of drivers
that were killed.

Every folder says whose it is (process id and start time), so one whose owner is gone can be told from one in use. Where
there is no /proc nothing is looked for.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

PREFIX = "micacl-ray-"
OWNER = "owner"
_PROC = Path("/proc")


def who(pid: int) -> str:
    """`<pid> <start time>`: process ids come again, this does not. Empty if there is no such process."""
    with contextlib.suppress(OSError):
        return f"{pid} {(_PROC / str(pid) / 'stat').read_text().rpartition(')')[2].split()[19]}"
    return ""


def sweep(parent: Path) -> None:
    """Remove folders of this user whose owner was killed, and end what still runs in them."""
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            owner = (folder / OWNER).read_text()
            if folder.stat().st_uid == os.getuid() and owner and who(int(owner.split()[0])) != owner:
                end_processes(folder)
                shutil.rmtree(folder, ignore_errors=True)


def end_processes(folder: Path) -> None:
    """Kill this user's processes whose command line names the folder; this process is none of them."""
    for pid in _processes(str(folder)):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _processes(text: str) -> Iterator[int]:
    for entry in _PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):
            names = text.encode() in (entry / "cmdline").read_bytes()
            if names and entry.stat().st_uid == os.getuid() and int(entry.name) != os.getpid():
                yield int(entry.name)
