"""The preprocessing verbs, and how every verb of the house speaks.

Human words and progress go to stderr; the last line of stdout is one JSON object. Exit codes: 0 done, 2 bad input,
3 done with more quarantined than allowed. Flags are the fields of the config classes, typed, by tyro.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import tyro

from pipeline.contract import CropConfig, MicaclError, PackConfig

Arguments = list[str]
EXIT_BAD_INPUT, EXIT_QUARANTINED = 2, 3
Raw = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RAW")]
DatasetUrl = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATASET")]


@dataclass(frozen=True, slots=True)
class Verb:
    """A command: what it does in one line, and where its function lies (imported only when it is called)."""

    help: str
    target: str
    """`module:function`; its parameters are the flags."""


VERBS: dict[str, Verb] = {
    "demo": Verb("write the synthetic raw bucket of the demo", "pipeline.cli:demo_bucket"),
    "prepare": Verb("raw videos -> bags -> shards -> one committed version", "pipeline.cli:prepare"),
    "status": Verb("what is done, left and broken, from storage alone", "pipeline.cli:status"),
    "verify": Verb("check every hash, count and key of a dataset", "pipeline.cli:verify"),
    "report": Verb("a self-contained HTML page on a dataset", "pipeline.cli:report"),
    "forget": Verb("a new version without a subject or a video", "pipeline.cli:forget"),
}


def say(text: str) -> None:
    """A line for a person."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def absolute(url: str) -> str:
    """Workers have other working folders: a local path is made absolute at the door."""
    return url if "://" in url else os.path.abspath(url)


def run(verbs: Mapping[str, Verb], prog: str, arguments: Arguments) -> int:
    """Dispatch one command line. Returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_overview(verbs, prog))
        return 0 if arguments else EXIT_BAD_INPUT
    name, *rest = arguments
    try:
        if name not in verbs:
            near = get_close_matches(name, verbs, n=2) or list(verbs)
            raise MicaclError(
                f"{prog} has no verb {name!r}.", "Nothing was done.", f"Did you mean {' or '.join(near)}?"
            )
        module, _, function = verbs[name].target.partition(":")
        return _call(getattr(importlib.import_module(module), function), f"{prog} {name}", verbs[name].help, rest)
    except MicaclError as error:
        say(f"\nerror: {error.cause}\n       {error.consequence}\n       {error.remedy}")
        _finish({"error": {"cause": error.cause, "consequence": error.consequence, "remedy": error.remedy}})
        return EXIT_BAD_INPUT


def _call(function: Callable[..., Any], prog: str, help_line: str, rest: Arguments) -> int:
    try:
        takes_argv = getattr(function, "takes_arguments", False)
        result = function(rest, prog) if takes_argv else parse(function, prog, help_line, rest)
    except SystemExit as stop:  # tyro said what was wrong with a flag, or showed its help
        if stop.code not in (0, None):
            _finish({"error": {"cause": f"The arguments of `{prog}` were not understood.", "remedy": f"{prog} --help"}})
        return int(stop.code or 0)
    _finish(result)
    return int(result.get("exit", 0))


def parse(target: Any, prog: str, help_line: str, rest: Arguments, **more: Any) -> Any:
    """tyro with the house's settings."""
    config = (tyro.conf.FlagConversionOff, tyro.conf.ConsolidateSubcommandArgs)
    return tyro.cli(target, prog=prog, description=help_line, args=rest, config=config, **more)


def _finish(result: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps({k: v for k, v in result.items() if k not in ("exit", "text")}, sort_keys=True) + "\n")
    sys.stdout.flush()


def _overview(verbs: Mapping[str, Verb], prog: str) -> str:
    lines = [f"usage: {prog} VERB ...   ({prog} VERB --help for its flags)", ""]
    return "\n".join([*lines, *(f"  {name:<10}{verb.help}" for name, verb in verbs.items()), ""])


def demo_bucket(raw: Raw, seed: int = 7) -> dict[str, Any]:
    """Write the synthetic raw bucket to a folder or s3:// URL.

    Args:
        raw: folder or s3://bucket/prefix to write to.
        seed: of everything that is drawn; same seed, same bytes.
    """
    from pipeline.demo import DemoConfig, write_raw_bucket
    from pipeline.storage import open_store

    store = open_store(raw)
    store.check()
    return {"raw": absolute(raw), **write_raw_bucket(store, DemoConfig(seed=seed))}


def prepare(
    raw: Raw,
    dataset: DatasetUrl,
    source: str = "auto",
    labels: tuple[str, ...] = (),
    test_share: float = 0.2,
    max_quarantined: float = 0.2,
    workers: int | None = None,
    address: str | None = None,
    crop: CropConfig = CropConfig(),
    pack: PackConfig = PackConfig(),
) -> dict[str, Any]:
    """Raw videos to a committed dataset version.

    Args:
        raw: a table (CSV, Parquet), or a folder or bucket of videos.
        dataset: where the shards go: folder or s3://bucket/prefix.
        source: auto, table, folder or bucket.
        labels: label set in order; default DFEW's seven; `auto` takes the words that are there.
        test_share: of subjects, where the source names no split.
        max_quarantined: share of videos; above it the exit code is 3.
        workers: cores of a private Ray; default all.
        address: of a running Ray cluster to join; default RAY_ADDRESS, else a private one.
    """
    from pipeline.ray_local import ray_session
    from pipeline.sources import open_source
    from pipeline.storage import open_store

    open_store(absolute(dataset)).check()
    videos, words = open_source(absolute(raw), source, labels)
    say(f"{len(videos)} videos in {raw}")
    with ray_session(address=address, num_cpus=workers):
        from pipeline.prepare import PrepareConfig
        from pipeline.prepare import prepare as job

        config = PrepareConfig(test_share=test_share, crop=crop, pack=pack)
        result = job(videos, words, absolute(dataset), config, say)
    listed, bad = result["videos"]["listed"], result["videos"]["quarantined"]
    if bad > max_quarantined * listed:
        say(f"{bad} of {listed} videos are quarantined, more than --max-quarantined {max_quarantined:g}.")
        result["exit"] = EXIT_QUARANTINED
    return result


def status(dataset: DatasetUrl) -> dict[str, Any]:
    """What a dataset's storage holds.

    Args:
        dataset: folder or s3://bucket/prefix.
    """
    from pipeline.status import dataset_status

    return dataset_status(absolute(dataset))


def verify(dataset: DatasetUrl, version: int | None = None) -> dict[str, Any]:
    """Check a dataset version; exit code 2 if there is a problem.

    Args:
        dataset: folder or s3://bucket/prefix.
        version: number; default the newest.
    """
    from pipeline.verify import verify_dataset

    result = verify_dataset(absolute(dataset), version)
    for problem in result["problems"]:
        say(f"{problem['where']}: {problem['what']} {problem['remedy']}")
    return {**result, "exit": 0 if result["ok"] else EXIT_BAD_INPUT}


def report(dataset: DatasetUrl, out: Path = Path("report.html"), version: int | None = None) -> dict[str, Any]:
    """Write the HTML report of a dataset version.

    Args:
        dataset: folder or s3://bucket/prefix.
        out: local file to write.
        version: number; default the newest.
    """
    from pipeline.report import write_report

    page = write_report(absolute(dataset), version)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(page)
    say(f"report: {out.resolve()}")
    return {"report": str(out.resolve()), "bytes": len(page)}


def forget(
    dataset: DatasetUrl, subject: tuple[str, ...] = (), video: tuple[str, ...] = (), delete: bool = False
) -> dict[str, Any]:
    """Commit a new version without some subjects or videos.

    Args:
        dataset: folder or s3://bucket/prefix.
        subject: names of subjects.
        video: names of videos, as the index has them.
        delete: also delete the shards, index files and crops that held them.
    """
    from pipeline.forget import forget as job

    return job(absolute(dataset), subject, video, delete=delete)


def main() -> None:
    """`python -m pipeline`: these verbs alone, without torch."""
    sys.exit(run(VERBS, "python -m pipeline", sys.argv[1:]))
