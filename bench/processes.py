"""CPU time and memory of a process and all below it, read from outside while it runs. Linux only."""

from __future__ import annotations

import contextlib
import re
import resource
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

_GONE = (psutil.Error, OSError)
_PSS = re.compile(r"^Pss:\s+(\d+) kB", re.MULTILINE)


def cpu_s(pid: int) -> float:
    """CPU seconds of all threads of a process, those that ended too; not of its children. Raises OSError if it is gone.

    The clock of clock_getcpuclockid(3), which counts nanoseconds; /proc/PID/stat counts hundredths of a second.
    """
    return time.clock_gettime(~pid << 3 | 2)


def below(pid: int) -> list[psutil.Process]:
    """Every process below one, none if it is gone."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).children(recursive=True)
    return []


@dataclass(frozen=True, slots=True)
class Sample:
    """How things stand at one moment. Bytes; CPU seconds since the start."""

    at_s: float
    """time.monotonic()."""
    driver_rss: int
    tree_pss: int | None
    """Of all processes, shared pages divided by those who share them; None in most samples: it is dear to ask."""
    tree_cpu_s: float
    machine_cpu_s: float
    """All that the cores did, for whomever."""


class Watch:
    """Samples of processes and all below them, every `every_s` seconds, by a thread. The first one is the driver."""

    def __init__(self, pids: Sequence[int], every_s: float = 0.2, dear_every: int = 10) -> None:
        self.samples: list[Sample] = []
        self.own_cpu_s = 0.0
        """What the watching itself took."""
        self._roots, self._every_s, self._dear_every = pids, every_s, dear_every
        self._pids = list(pids)
        self._cpu_s: dict[int, float] = {}
        self._end = threading.Event()

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def between(self, start_s: float, stop_s: float) -> list[Sample]:
        """The samples of a stretch of time."""
        return [s for s in self.samples if start_s <= s.at_s <= stop_s]

    def _run(self) -> None:
        count = 0
        while not self._end.wait(self._every_s):
            with contextlib.suppress(*_GONE):
                self.samples.append(self._sample(dear=count % self._dear_every == 0))
            count += 1
            self.own_cpu_s = time.thread_time()

    def _sample(self, *, dear: bool) -> Sample:
        """Who is there and what they share is looked at in every `dear_every`-th sample: it takes 50 ms."""
        if dear:
            self._pids = [*self._roots, *(process.pid for pid in self._roots for process in below(pid))]
        tree_pss = 0
        for pid in self._pids:
            with contextlib.suppress(*_GONE):
                self._cpu_s[pid] = cpu_s(pid)
                tree_pss += _pss(pid) if dear else 0
        busy = psutil.cpu_times()
        return Sample(
            driver_rss=_rss(self._roots[0]),
            tree_pss=tree_pss if dear else None,
            tree_cpu_s=sum(self._cpu_s.values()),  # of those that are gone, the last that was seen
            machine_cpu_s=busy.user + busy.nice + busy.system + busy.irq + busy.softirq,
            at_s=time.monotonic(),
        )


def _rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def _pss(pid: int) -> int:
    found = _PSS.search(Path(f"/proc/{pid}/smaps_rollup").read_text())
    return int(found[1]) * 1024 if found else 0
