"""The loaders of bench/stream.py, and one run of one of them: a process of its own that prints a JSON object."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_RUNNERS = Path(__file__).with_name("stream_peers")
_MOST_S = 180
_NEAR = 0.85
"""Share of the best setting's clips/s after which a worker setting is tried in further rounds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loader:
    """A loader and how it may run."""

    name: str
    program: str
    workers: tuple[int, ...]
    tars: bool = False
    """Reads the house's tars as they are."""
    house: bool = False
    """Runs in the house's interpreter."""
    resumes: bool = False
    """Has a state to resume from, it says."""


LOADERS = (
    Loader(name="ours", program="ours_processes.py", workers=(1, 2), house=True, resumes=True),
    Loader(name="ours by threads", program="ours.py", workers=(1, 2), house=True, resumes=True),
    Loader(name="ours by Ray Data", program="ours_ray.py", workers=(1, 2), house=True, resumes=True),
    Loader(name="webdataset", program="of_webdataset.py", workers=(0, 1, 2), tars=True),
    Loader(name="mosaicml", program="of_mosaicml.py", workers=(0, 1, 2), resumes=True),
    Loader(name="litdata", program="of_litdata.py", workers=(0, 1, 2), resumes=True),
    Loader(name="ray", program="of_ray.py", workers=(2,), tars=True),
)
LIMIT = Loader(name="limit", program="limit.py", workers=(1, 2), tars=True, house=True)


@dataclass(kw_only=True, slots=True)
class Bench:
    """Where things lie, and what was found: results by (part, loader, workers)."""

    folder: Path
    peers_python: str
    seconds: float
    batches: int = 44
    data: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    """Shards by class by loader, local."""
    found: dict[tuple[str, str, int], list[dict[str, Any]]] = field(default_factory=dict)
    why_not: dict[tuple[str, str, int], str] = field(default_factory=dict)

    def run(self, loader: Loader, mode: str, env: Mapping[str, str], **job: Any) -> dict[str, Any]:
        """One run of a loader in a process and a cache folder of its own. Raises RuntimeError with what it said."""
        with tempfile.TemporaryDirectory(dir=self.folder) as cache:
            said = {"mode": mode, "cache": cache, "seconds": self.seconds, "batches": self.batches, **job}
            python = sys.executable if loader.house else self.peers_python
            command = [python, str(_RUNNERS / loader.program), json.dumps(said)]
            full = {**os.environ, "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1", **env}
            try:
                done = subprocess.run(command, capture_output=True, text=True, env=full, timeout=_MOST_S, check=False)
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"took more than {_MOST_S} s") from None
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1][:300] if done.stderr.strip() else "no message")
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))

    def note(self, part: str, loader: Loader, workers: int, mode: str, env: Mapping[str, str], **job: Any) -> None:
        """Run and keep what was found, or why nothing was."""
        place = (part, loader.name, workers)
        if place in self.why_not:
            return
        try:
            result = self.run(loader, mode, env, workers=workers, **job)
        except RuntimeError as error:
            self.why_not[place] = str(error)
            print(f"{place}: {error}", file=sys.stderr)
            return
        self.found.setdefault(place, []).append(result)
        print(f"{place}: {result.get('clips_per_s', 0):.0f} clips/s", file=sys.stderr, flush=True)

    def going_on(self, part: str, loader: Loader) -> list[int]:
        """Worker settings for the next round: all at first, then those near the best."""
        best = self.best(part, loader)
        if best is None:
            return list(loader.workers)
        least = _NEAR * self.median(part, loader.name, best)
        tried = [w for w in loader.workers if (part, loader.name, w) in self.found]
        return [w for w in tried if self.median(part, loader.name, w) >= least]

    def best(self, part: str, loader: Loader) -> int | None:
        """The worker setting with the highest median of clips/s, of those that ran most often."""
        runs = {w: len(self.found.get((part, loader.name, w), ())) for w in loader.workers}
        most = max(*runs.values(), 1)  # the one run of a dropped setting may just have been lucky
        rates = {w: self.median(part, loader.name, w) for w, n in runs.items() if n == most}
        return max(rates, key=rates.__getitem__) if rates else None

    def median(self, part: str, name: str, workers: int, what: str = "clips_per_s") -> float:
        return statistics.median(result[what] for result in self.found[part, name, workers])
