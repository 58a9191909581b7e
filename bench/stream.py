"""Loaders of class-balanced clips, compared: python bench/stream.py --peers-python PEERS/bin/python

One dataset, one decode, the same cores, one run. Every loader gives batches of 16 clips, of each clip 16 decoded frames
of the 48 that are stored (bench/stream_peers/work.py). It stores the bags in its own best way and runs with each of its
worker settings: the best is shown, those far from it are dropped after a round. Runs of all loaders take turns, so that
what else the machine does hits all alike; each number is the median of the rounds.

    local    steady clips/s from a local disk whose files were read just before, so that the kernel holds them
    s3       one epoch of 44 batches from a SeaweedFS server on loopback, in a fresh process, with empty caches
    far      the same through a proxy that counts bytes, without and with 50 ms added to each request
    resume   whether a new process goes on exactly where another stopped in the middle of an epoch

The peers' environment:  python3.11 -m venv PEERS; PEERS/bin/pip install --no-deps -r bench/stream-requirements.txt
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import stream_data
import stream_tables
from demo_steps import commit, machine
from stream_runs import LIMIT, LOADERS, ROOT, Bench, Loader

from pipeline.object_store import ObjectStore, ObjectStoreConfig

sys.path.insert(0, str(ROOT))
from tests.fault_proxy import FaultProxy

PARTS = ("local", "s3", "far", "resume")
_BUCKET = "bench"
_FAR_S = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", default="", help="of their environment; without it, ours alone")
    parser.add_argument("--folder", type=Path, help="where the data is built and kept")
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
        load = f"{before[0]:.1f} before and {os.getloadavg()[0]:.1f} after"
        print(f"Load average of the machine {load}. Medians of {arguments.rounds} rounds in turns.")
        stream_tables.show(bench, loaders, stream_data.jpeg_bytes(url), resumed)


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
            read_all(bench.data[loader.name])
            bench.note("local", loader, workers, "steady", {}, data=bench.data[loader.name], root=url)


def read_all(shards: Mapping[str, list[str]]) -> None:
    """Once, so that no loader is measured with a slow disk: some machines give idle pages back within seconds."""
    for path in (Path(path) for of_class in shards.values() for path in of_class):
        for file in [path] if path.is_file() else path.iterdir():
            file.read_bytes()


def s3_parts(bench: Bench, loaders: list[Loader], url: str, server: ObjectStore, arguments: argparse.Namespace) -> None:
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
        workers = bench.best("local", loader)
        workers = loader.workers[-1] if workers is None else workers
        job = {"data": bench.data[loader.name], "root": url, "batches": 20, "workers": workers}
        try:
            out[loader.name] = _resumed(bench, loader, job) if loader.resumes else "no: it has no state"
        except RuntimeError as error:
            out[loader.name] = f"no: {error}"
    return out


def _resumed(bench: Bench, loader: Loader, job: dict[str, Any]) -> str:
    whole = bench.run(loader, "keys", {}, **job)
    rest = bench.run(loader, "resume", {}, **job, state=whole["state"])["keys"]
    before, after = whole["keys"][:10], whole["keys"][10:]
    if rest == after:
        return "yes, exactly"
    clips, wanted, seen = (Counter(key for batch in part for key in batch) for part in (rest, after, before))
    batches = sum(a == b for a, b in zip(after, rest, strict=True))
    return (
        f"not exactly: {batches} of 10 batches and {(clips & wanted).total()} of {wanted.total()} clips are those of a "
        f"run without a stop, {(clips & (seen - wanted)).total()} are clips from before it"
    )


if __name__ == "__main__":
    main()
