"""Loaders of class-balanced clips, compared: python bench/stream.py --peers-python PEERS/bin/python

One dataset, one decode, the same cores, one run. Every loader gives batches of 16 clips, of each clip 16 decoded frames
of the 48 that are stored (bench/stream_peers/work.py); it stores the bags in its own best way and runs with each of its
worker settings, of which the best is shown and those far from it are dropped after a round. Runs of all loaders take turns, so that what else the machine does hits all
alike; each number is the median of the rounds.

    local    steady clips/s from a local disk whose pages the kernel holds
    S3       one epoch of 44 batches from a SeaweedFS server on loopback, in a fresh process, with empty caches
    far      the same through a proxy that counts bytes, without and with 50 ms added to each request

The peers' environment:  python3.11 -m venv PEERS; PEERS/bin/pip install --no-deps -r bench/stream-requirements.txt
"""

from __future__ import annotations

import argparse
import datetime as dt
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
sys.path.insert(0, str(ROOT))

import stream_data
import stream_tables
from demo_steps import commit, machine

from pipeline.object_store import ObjectStore, ObjectStoreConfig
from tests.fault_proxy import FaultProxy

PARTS = ("local", "s3", "far", "resume")
_RUNNERS = Path(__file__).with_name("stream_peers")
_BUCKET = "bench"
_MOST_S = 180
_NEAR = 0.85
"""Share of the best setting's clips/s after which a worker setting is tried in further rounds."""
_FAR_S = 0.05


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
    Loader(name="ours", program="ours.py", workers=(1, 2, 3), house=True, resumes=True),
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
        """The worker setting with the highest median of clips/s, if any run was good."""
        rates = {w: self.median(part, loader.name, w) for w in loader.workers if (part, loader.name, w) in self.found}
        return max(rates, key=rates.__getitem__) if rates else None

    def median(self, part: str, name: str, workers: int, what: str = "clips_per_s") -> float:
        return statistics.median(result[what] for result in self.found[part, name, workers])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", default="", help="interpreter of the peers' environment; without it, ours alone")
    parser.add_argument("--folder", type=Path, help="where the data is built, and kept for the next run; else a temporary")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seconds", type=float, default=8, help="of a steady run")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        bench = Bench(folder=folder, peers_python=arguments.peers_python, seconds=arguments.seconds)
        loaders = [loader for loader in LOADERS if loader.house or arguments.peers_python]
        url = prepare(bench, loaders)
        before = os.getloadavg()
        if "local" in arguments.parts:
            for _ in range(arguments.rounds):
                local_round(bench, loaders, url)
        if {"s3", "far"} & set(arguments.parts):
            with ObjectStore(folder / "s3", ObjectStoreConfig(stop_s=0)) as server:
                s3_parts(bench, loaders, url, server, arguments)
        resumed = resume(bench, loaders, url) if "resume" in arguments.parts else {}
        print(f"`python bench/stream.py`, commit {commit()}, {machine()}, {dt.date.today().isoformat()}")  # noqa: DTZ011
        print(f"Load of the machine before: {before[0]:.1f}. Medians of {arguments.rounds} rounds.")
        stream_tables.show(bench, loaders, url, resumed)


def prepare(bench: Bench, loaders: list[Loader]) -> str:
    """The dataset and each loader's own form of it, made unless they are there."""
    house = bench.folder / "house"
    url = str(house) if (house / "versions").is_dir() else stream_data.build(house)
    tars = stream_data.shards_by_class(url)
    for loader in (*loaders, LIMIT):
        own = bench.folder / loader.name
        if not loader.tars and not loader.house:
            bench.data[loader.name] = {label: [str(own / label)] for label in tars}
            if not own.is_dir():
                own.mkdir(parents=True)
                bench.run(loader, "convert", {}, data=tars, cache=str(own))
        else:
            bench.data[loader.name] = tars
    return url


def local_round(bench: Bench, loaders: list[Loader], url: str) -> None:
    for loader in (LIMIT, *loaders):
        for workers in bench.going_on("local", loader) if loader is not LIMIT else loader.workers:
            bench.note("local", loader, workers, "steady", {}, data=bench.data[loader.name], root=url)


def s3_parts(
    bench: Bench, loaders: list[Loader], url: str, server: ObjectStore, arguments: argparse.Namespace
) -> None:
    """Copy everything into the server, then cold epochs straight from it and through the proxy."""
    server.make_bucket(_BUCKET)
    env = {**server.environment(), "S3_ENDPOINT_URL": server.endpoint}
    os.environ.update(env, NO_PROXY="127.0.0.1")
    root = f"s3://{_BUCKET}/house"
    for name in ("shards", "index", "versions", "quarantine"):
        stream_data.copy_tree(Path(url, name), f"{root}/{name}")
    data = {}
    for loader in loaders:
        own = bench.folder / loader.name
        if loader.tars or loader.house:
            data[loader.name] = stream_data.shards_by_class(root)
        else:
            stream_data.copy_tree(own, f"s3://{_BUCKET}/{loader.name}")
            data[loader.name] = {label: [f"s3://{_BUCKET}/{loader.name}/{label}"] for label in bench.data[loader.name]}
    for _ in range(arguments.rounds if "s3" in arguments.parts else 0):
        for loader in loaders:
            for workers in bench.going_on("s3", loader):
                bench.note("s3", loader, workers, "epoch", env, data=data[loader.name], root=root)
    if "far" in arguments.parts:
        with FaultProxy(int(server.endpoint.rpartition(":")[2])) as proxy:
            near = {**env, "AWS_ENDPOINT_URL": proxy.endpoint, "S3_ENDPOINT_URL": proxy.endpoint}
            for loader in loaders:
                for delay_s in (0.0, _FAR_S):
                    far_run(bench, loader, proxy, delay_s, near, data=data[loader.name], root=root)


def far_run(
    bench: Bench, loader: Loader, proxy: FaultProxy, delay_s: float, env: Mapping[str, str], **job: Any
) -> None:
    """One cold epoch through the proxy, with what went through it."""
    sizes: list[int] = []
    proxy.calm()
    proxy.delay_s = delay_s
    proxy.alter = lambda request, body: (sizes.append(len(body)) if request.method == "GET" else None, body)[1]
    workers = bench.best("s3", loader)
    workers = loader.workers[-1] if workers is None else workers
    part = "far" if delay_s else "near"
    bench.note(part, loader, workers, "epoch", env, **job)
    for result in bench.found.get((part, loader.name, workers), [])[-1:]:
        result |= {"read_bytes": sum(sizes), "requests": len(proxy.requests)}


def resume(bench: Bench, loaders: list[Loader], url: str) -> dict[str, str]:
    """Whether a new process goes on exactly where another was after 10 of 20 batches, by loader."""
    out = {}
    for loader in loaders:
        if not loader.resumes:
            out[loader.name] = "no: it has no state"
            continue
        workers = bench.best("local", loader)
        job = {"data": bench.data[loader.name], "root": url, "batches": 20, "workers": loader.workers[-1] if workers is None else workers}
        try:
            whole = bench.run(loader, "keys", {}, **job)
            rest = bench.run(loader, "resume", {}, **job, state=whole["state"])
        except RuntimeError as error:
            out[loader.name] = f"no: {error}"
            continue
        same = sum(a == b for a, b in zip(whole["keys"][10:], rest["keys"], strict=True))
        out[loader.name] = "yes, exactly" if same == 10 else f"not the same clips: {same} of 10 batches as without a stop"
    return out


if __name__ == "__main__":
    main()
