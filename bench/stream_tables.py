"""What bench/stream.py found, as Markdown."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import stream_data

if TYPE_CHECKING:
    from stream import Bench, Loader

NOTES = {
    "webdataset": "per-class shards unchanged, RandomMix of one resampled dataset a class; no cache, S3 by a boto3 opener "
    "in the process instead of its `aws s3 cp` a shard",
    "mosaicml": "MDS, one stream a class, stratified; torchvision is a stub of ours, because its registry build does not "
    "load beside CPU torch and nothing of it is used; epoch_size gives it one long epoch in steady runs",
    "litdata": "one dataset a class, equal weights; the combined dataset ends with its first class, so classes are "
    "repeated (`subsample` above 1)",
    "ray": "read_webdataset with a decoder that picks, no pickle; no class balance; its first batch waits for whole blocks",
    "ours": "uniform plan, sha256 of each bag checked at each use, position kept for resuming; shards cached in memory",
}
ORDER = ("ours", "webdataset", "mosaicml", "litdata", "ray")


def show(bench: Bench, loaders: list[Loader], url: str, resumed: dict[str, str]) -> None:
    absent = [name for name in ORDER if name not in {loader.name for loader in loaders}]
    if absent:
        print(f"\nNot run, for want of --peers-python: {', '.join(absent)}.")
    if any(part == "local" for part, *_ in bench.found):
        _local(bench, loaders)
    if any(part == "s3" for part, *_ in bench.found):
        _s3(bench, loaders)
    if any(part == "far" for part, *_ in bench.found):
        _far(bench, loaders, stream_data.jpeg_bytes(url))
    _promises(bench, loaders, resumed)
    print()
    for loader in loaders:
        print(f"* {loader.name}: {NOTES[loader.name]}.")
    for (part, name, workers), why in bench.why_not.items():
        print(f"* {name}, {part}, {workers} workers: failed: {why}")


def _table(title: str, head: str, rows: list[list[str]]) -> None:
    names = head.split(" | ")
    print(f"\n{title}\n\n| {head} |\n|{' --- |' * 1}{' ---: |' * (len(names) - 1)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def _spread(results: list[dict[str, Any]]) -> str:
    rates = [result["clips_per_s"] for result in results]
    return f"{min(rates):.0f} to {max(rates):.0f}"


def _local(bench: Bench, loaders: list[Loader]) -> None:
    limits = {w: bench.median("local", "limit", w) for w in (1, 2)}
    rows = [
        [f"decode alone, {w} process{'es' * (w > 1)}", "", f"{limits[w]:.0f}", _spread(bench.found["local", "limit", w]),
         _ratio(limits[w], bench, "local", loaders), f"{limits[w] / limits[2]:.2f}", f"{bench.median('local', 'limit', w, 'cpu_ms'):.2f}"]
        for w in (1, 2)
    ]  # fmt: skip
    for loader in loaders:
        if (w := bench.best("local", loader)) is None:
            continue
        rate = bench.median("local", loader.name, w)
        others = ", ".join(
            f"{x}: {bench.median('local', loader.name, x):.0f}"
            for x in loader.workers
            if x != w and ("local", loader.name, x) in bench.found
        )
        rows.append(
            [loader.name, f"{w} ({others})" if others else str(w), f"{rate:.0f}",
             _spread(bench.found["local", loader.name, w]), _ratio(rate, bench, "local", loaders),
             f"{rate / limits[2]:.2f}", f"{bench.median('local', loader.name, w, 'cpu_ms'):.2f}"]
        )  # fmt: skip
    _table("Local disk, steady", "loader | workers (others, clips/s) | clips/s | least to most | of ours | of the limit | CPU ms a clip", rows)  # fmt: skip


def _ratio(rate: float, bench: Bench, part: str, loaders: list[Loader]) -> str:
    ours = next(loader for loader in loaders if loader.name == "ours")
    w = bench.best(part, ours)
    return "" if w is None else f"{rate / bench.median(part, 'ours', w):.2f}"


def _s3(bench: Bench, loaders: list[Loader]) -> None:
    rows = []
    for loader in loaders:
        if (w := bench.best("s3", loader)) is None:
            continue
        rate, results = bench.median("s3", loader.name, w), bench.found["s3", loader.name, w]
        first = {x: bench.median("s3", loader.name, x, "first_s") for x in loader.workers if ("s3", loader.name, x) in bench.found}
        quick = min(first, key=first.__getitem__)
        limit = f"{rate / bench.median('local', 'limit', 2):.2f}" if ("local", "limit", 2) in bench.found else ""
        rows.append(
            [loader.name, str(w), f"{rate:.0f}", _spread(results), _ratio(rate, bench, "s3", loaders), limit,
             f"{first[w]:.2f} ({first[quick]:.2f} with {quick})", f"{bench.median('s3', loader.name, w, 'since_start_s'):.1f}"]
        )  # fmt: skip
    _table(
        "S3 on loopback, one cold epoch of 44 batches in a fresh process",
        "loader | workers | clips/s | least to most | of ours | of the limit | first batch, s after opening | s after the process began",
        rows,
    )


def _far(bench: Bench, loaders: list[Loader], pictures: dict[str, int]) -> None:
    rows = []
    for loader in loaders:
        for part, name, w in [key for key in bench.found if key[:2] == ("near", loader.name)]:
            near = bench.found[part, name, w][-1]
            far = next(iter(bench.found.get(("far", name, w), [])), None)
            needed = sum(pictures[key] for key in near["keys"])
            rows.append(
                [name, str(w), f"{near['clips_per_s']:.0f}", f"{far['clips_per_s']:.0f}" if far else "failed",
                 f"{far['clips_per_s'] / near['clips_per_s']:.2f}" if far else "", f"{near['first_s']:.2f}",
                 f"{far['first_s']:.2f}" if far else "", f"{near['requests']}", f"{near['read_bytes'] / 1e6:.0f}", f"{len(near['keys'])}",
                 f"{near['read_bytes'] / needed:.2f}"]
            )  # fmt: skip
    _table(
        "The same through a proxy on this machine, which takes a share of the cores; one run each",
        "loader | workers | clips/s | with 50 ms | of it | first batch, s | with 50 ms | requests | MB read | distinct clips | bytes read over their JPEG bytes",
        rows,
    )


def _promises(bench: Bench, loaders: list[Loader], resumed: dict[str, str]) -> None:
    rows = []
    for loader in loaders:
        results = [r for (part, name, _), all_of in bench.found.items() if name == loader.name for r in all_of]
        epochs = [r for (part, name, _), all_of in bench.found.items() if name == loader.name and part != "local" for r in all_of]
        if not results:
            rows.append([loader.name, "", "", resumed.get(loader.name, "not tried")])
            continue
        worst = max(r["off_most"] for r in results)
        low, high = (statistics.median(r[k] for r in epochs or results) for k in ("share_least", "share_most"))
        rows.append([loader.name, f"{worst:.1f}", f"{low:.3f} to {high:.3f}", resumed.get(loader.name, "not tried")])
    _table(
        "Promises; an equal share is 0.143, 2.29 clips a batch",
        "loader | most that a class in a batch was off | least and most share of a class, median | resumes in mid-epoch",
        rows,
    )
