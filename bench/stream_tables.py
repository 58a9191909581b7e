"""What bench/stream.py found, as Markdown."""

from __future__ import annotations

import statistics

from stream_runs import Bench, Loader

NOTES = {
    "ours": "uniform plan, sha256 of each bag checked when it is first read, position kept for resuming; decode "
    "processes; S3: whole shards, once, on local disk",
    "ours by threads": "the same, decoded by threads of the one process",
    "ours by Ray Data": "the same plan and batches, decoded by Ray Data actors, through its object store",
    "webdataset": "our tars, RandomMix of one resampled dataset a class; no cache; S3 by a boto3 opener in the "
    "process, where the library would start `aws s3 cp` for each shard",
    "mosaicml": "MDS, one stream a class, stratified; an epoch ends with the first class that ends, so `epoch_size` is "
    "larger than what is read; torchvision is a stub of ours (its registry build does not load beside CPU torch)",
    "litdata": "one dataset a class, equal weights; the combined dataset ends with the first class that ends, so "
    "classes are repeated (`subsample` above 1); its second S3 client takes no endpoint without TLS "
    "unless a table is patched",
    "ray": "`read_webdataset` with a decoder that picks, no pickle; no class balance; a batch waits for a whole block, "
    "here a shard",
}
Row = dict[str, str]


def show(bench: Bench, loaders: list[Loader], pictures: dict[str, int], resumed: dict[str, str]) -> None:
    """Args: pictures: bytes of the JPEGs of a bag by its key. resumed: what became of resuming, by loader."""
    absent = [name for name in NOTES if name not in {loader.name for loader in loaders}]
    if absent:
        print(f"\nNot run, for want of --peers-python: {', '.join(absent)}.")
    parts = {part for part, *_ in bench.found}
    if "local" in parts:
        limits = [_limit(bench, loaders, w) for w in (1, 2)]
        _table("Local disk, steady.", [*limits, *(_local(bench, loader, loaders) for loader in loaders)])
    if "s3" in parts:
        rows = [_s3(bench, loader, loaders) for loader in loaders]
        _table("S3 on loopback, one cold epoch of 44 batches in a fresh process.", rows)
    if "near" in parts:
        rows = [_far(bench, loader, pictures) for loader in loaders]
        _table("The same through a proxy, which takes its share of the cores; one run each.", rows)
    rows = [_promises(bench, loader, resumed) for loader in loaders]
    _table("Class balance (an equal share is 0.143, 2.29 clips a batch) and resuming.", rows)
    print()
    for loader in loaders:
        print(f"* {loader.name}: {NOTES[loader.name]}.")
    for (part, name, workers), why in bench.why_not.items():
        print(f"* {name}, {part}, {workers} workers: failed: {why}")


def _table(title: str, rows: list[Row]) -> None:
    rows = [row for row in rows if row]
    if not rows:
        return
    print(f"\n{title}\n\n| {' | '.join(rows[0])} |\n| ---{' | ---:' * (len(rows[0]) - 1)} |")
    for row in rows:
        print(f"| {' | '.join(row.values())} |")


def _rates(bench: Bench, part: str, name: str, workers: int, loaders: list[Loader]) -> Row:
    """The columns that say how fast: median, spread, and the median over ours and over the limit of two processes."""
    rate = bench.median(part, name, workers)
    rates = [result["clips_per_s"] for result in bench.found[part, name, workers]]
    of_ours = bench.best(part, loaders[0])
    limit = bench.found.get(("local", "limit", 2))
    return {
        "clips/s": f"{rate:.0f}",
        "least to most": f"{min(rates):.0f} to {max(rates):.0f}",
        "of ours": f"{rate / bench.median(part, loaders[0].name, of_ours):.2f}" if of_ours is not None else "",
        "of the limit": f"{rate / bench.median('local', 'limit', 2):.2f}" if limit else "",
    }


def _cpu(bench: Bench, name: str, workers: int) -> Row:
    """CPU time hangs less on what else the machine does than clips/s."""
    used, least = (bench.median("local", *which, "cpu_ms") for which in ((name, workers), ("limit", 2)))
    return {"CPU ms a clip": f"{used:.2f}", "of the limit by CPU": f"{least / used:.2f}"}


def _limit(bench: Bench, loaders: list[Loader], workers: int) -> Row:
    return {
        "loader": "decode alone",
        "workers (others, clips/s)": f"{workers}",
        **_rates(bench, "local", "limit", workers, loaders),
        **_cpu(bench, "limit", workers),
    }


def _local(bench: Bench, loader: Loader, loaders: list[Loader]) -> Row:
    if (best := bench.best("local", loader)) is None:
        return {}
    tried = [w for w in loader.workers if w != best and ("local", loader.name, w) in bench.found]
    others = ", ".join(f"{w}: {bench.median('local', loader.name, w):.0f}" for w in tried)
    return {
        "loader": loader.name,
        "workers (others, clips/s)": f"{best} ({others})" if others else f"{best}",
        **_rates(bench, "local", loader.name, best, loaders),
        **_cpu(bench, loader.name, best),
    }


def _s3(bench: Bench, loader: Loader, loaders: list[Loader]) -> Row:
    if (best := bench.best("s3", loader)) is None:
        return {}
    tried = [w for w in loader.workers if ("s3", loader.name, w) in bench.found]
    first_s = {w: bench.median("s3", loader.name, w, "first_s") for w in tried}
    quick = min(tried, key=lambda w: first_s[w])
    return {
        "loader": loader.name,
        "workers": f"{best}",
        **_rates(bench, "s3", loader.name, best, loaders),
        "first batch, s from opening": f"{first_s[best]:.2f}",
        "least, with workers": f"{first_s[quick]:.2f}, {quick}",
        "s from the process's start": f"{bench.median('s3', loader.name, best, 'since_start_s'):.1f}",
    }


def _far(bench: Bench, loader: Loader, pictures: dict[str, int]) -> Row:
    place = next((key for key in bench.found if key[:2] == ("near", loader.name)), None)
    if place is None:
        return {}
    near, far = bench.found[place][-1], next(iter(bench.found.get(("far", *place[1:]), [])), None)
    needed = sum(pictures[key] for key in near["keys"])
    return {
        "loader": loader.name,
        "workers": f"{place[2]}",
        "clips/s": f"{near['clips_per_s']:.0f}",
        "with 50 ms": f"{far['clips_per_s']:.0f}" if far else "failed",
        "share kept": f"{far['clips_per_s'] / near['clips_per_s']:.2f}" if far else "",
        "first batch, s": f"{near['first_s']:.2f}",
        "first with 50 ms": f"{far['first_s']:.2f}" if far else "",
        "requests": f"{near['requests']}",
        "MB read": f"{near['read_bytes'] / 1e6:.0f}",
        "clips, distinct": f"{len(near['keys'])}",
        "bytes read over their JPEGs": f"{near['read_bytes'] / needed:.2f}",
    }


def _promises(bench: Bench, loader: Loader, resumed: dict[str, str]) -> Row:
    found = [(part, r) for (part, name, _), runs in bench.found.items() if name == loader.name for r in runs]
    row = {"loader": loader.name, "most off in a batch": "", "least and most share of an epoch": ""}
    if found:
        epochs = [r for part, r in found if part != "local"] or [r for _, r in found]
        low, high = (statistics.median(r[k] for r in epochs) for k in ("share_least", "share_most"))
        row["most off in a batch"] = f"{max(r['off_most'] for _, r in found):.1f}"
        row["least and most share of an epoch"] = f"{low:.3f} to {high:.3f}"
    return {**row, "resumes": resumed.get(loader.name, "not tried")}
