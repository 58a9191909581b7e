"""The preprocessing verbs, and how every verb of the house speaks.

Human words and progress go to stderr; the last line of stdout is one JSON object. Exit codes: 0 done, 2 bad input or a
damaged dataset, 3 done with more quarantined than allowed, 4 a dataset that is whole but leaks between splits. Flags
are the fields of the config classes, typed, by tyro.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, TextIO

import tyro

from pipeline.contract import CropConfig, MicaclError, PackConfig, require_at_least, require_between

Arguments = list[str]
EXIT_BAD_INPUT, EXIT_QUARANTINED, EXIT_LEAK, EXIT_INTERRUPTED = 2, 3, 4, 130
Raw = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RAW")]
Names = Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction]
"""`--flag a b --flag c`: a flag that is given twice adds to the first; a plain tuple would forget the first."""
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
    "plan": Verb("how often each class and clip would be drawn, how shards would be read", "pipeline.plan_report:plan"),
    "report": Verb("a self-contained HTML page on a dataset", "pipeline.cli:report"),
    "forget": Verb("a new version without a subject or a video", "pipeline.cli:forget"),
}


def say(text: str) -> None:
    """A line for a person."""
    _write(sys.stderr, f"{text}\n")


def _write(stream: TextIO, text: str) -> None:
    """A reader that has gone (`| head`) does not end the work: what is said after it goes nowhere."""
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def absolute(url: str) -> str:
    """Workers have other working folders: a local path is made absolute at the door."""
    if url.startswith("memory://"):
        raise MicaclError(
            f"{url} lives in one process.", "Ray's workers would not see it.", "Use a folder or a bucket."
        )
    return url if "://" in url or not url else os.path.abspath(url)


class ArgumentsRefused(Exception):
    """tyro has shown its help (code 0) or said what is wrong with a flag (code 2)."""

    def __init__(self, code: int, prog: str) -> None:
        super().__init__(code, prog)
        self.code, self.prog = code, prog


def run(verbs: Mapping[str, Verb], prog: str, arguments: Arguments) -> int:
    """Dispatch one command line. Returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        _write(sys.stdout, _overview(verbs, prog))
        return 0 if arguments else EXIT_BAD_INPUT
    try:
        require_text(arguments)
        result = _call(verbs, prog, *arguments)
    except ArgumentsRefused as refused:
        if refused.code:
            _fail(
                f"The arguments of `{refused.prog}` were not understood.", "Nothing was done.", f"{refused.prog} --help"
            )
        return refused.code
    except MicaclError as error:
        return _fail(error.cause, error.consequence, error.remedy)
    except (KeyboardInterrupt, SystemExit):
        # What was half made at that moment (a Ray handle) complains when it is unmade; the interruption is said below.
        sys.unraisablehook = lambda _: None
        _fail("Interrupted.", "What was finished is kept.", "The same command goes on from there.")
        return EXIT_INTERRUPTED
    except OSError as error:  # a folder where a file should be, no rights, a full disk: not a failure of code
        return _fail(
            f"{type(error).__name__}: {error}.", "The command stopped.", "Check the path, its rights and the disk."
        )
    _finish(result)
    return int(result.get("exit", 0))


def require_text(arguments: Arguments) -> None:
    """Refuse words that are no UTF-8: they cannot be stored or said. Raises MicaclError."""
    for word in arguments:
        if word != word.encode(errors="replace").decode():
            raise MicaclError(
                f"The argument {word!a} is not UTF-8.", "Nothing was done.", "Write it in UTF-8, or rename the file."
            )


def _call(verbs: Mapping[str, Verb], prog: str, name: str, *rest: str) -> dict[str, Any]:
    if name not in verbs:
        near = get_close_matches(name, verbs, n=2) or list(verbs)
        raise MicaclError(f"{prog} has no verb {name!r}.", "Nothing was done.", f"Did you mean {' or '.join(near)}?")
    module, _, attribute = verbs[name].target.partition(":")
    function = getattr(importlib.import_module(module), attribute)
    if getattr(function, "takes_arguments", False):
        return dict(function(list(rest), f"{prog} {name}"))

    @functools.wraps(function)
    def bind(*args: Any, **flags: Any) -> Callable[[], dict[str, Any]]:
        return functools.partial(function, *args, **flags)

    return dict(parse(bind, f"{prog} {name}", verbs[name].help, list(rest))())


def parse(target: Any, prog: str, help_line: str, rest: Arguments, **more: Any) -> Any:
    """tyro with the house's settings. Raises ArgumentsRefused where tyro would leave the process."""
    config = (tyro.conf.FlagConversionOff, tyro.conf.ConsolidateSubcommandArgs)
    try:
        return tyro.cli(target, prog=prog, description=help_line, args=rest, config=config, **more)
    except SystemExit as stop:
        raise ArgumentsRefused(int(stop.code or 0), prog) from stop


def stop_on_sigterm() -> None:
    """SIGTERM ends a command as Ctrl-C does: what was started is stopped. So does SIGINT where a shell ignores it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)


def _fail(cause: str, consequence: str, remedy: str) -> int:
    say(f"\nerror: {cause}\n       {consequence}\n       {remedy}")
    _finish({"error": {"cause": cause, "consequence": consequence, "remedy": remedy}})
    return EXIT_BAD_INPUT


def _finish(result: Mapping[str, Any]) -> None:
    shown = {k: v for k, v in result.items() if k not in ("exit", "text")}
    _write(sys.stdout, json.dumps(shown, sort_keys=True) + "\n")


def _overview(verbs: Mapping[str, Verb], prog: str) -> str:
    lines = [f"usage: {prog} VERB ...   ({prog} VERB --help for its flags)", ""]
    return "\n".join([*lines, *(f"  {name:<10}{verb.help}" for name, verb in verbs.items()), ""])


def demo_bucket(raw: Raw, seed: int = 7, kind: str = "expressions") -> dict[str, Any]:
    """Write a synthetic raw bucket to a folder or s3:// URL.

    Args:
        raw: folder or s3://bucket/prefix to write to.
        seed: of everything that is drawn; same seed, same bytes.
        kind: expressions (the demo's), or dynamics: eight classes that differ in nothing but the order of their frames.
    """
    from pipeline.demo import DemoConfig, write_raw_bucket
    from pipeline.demo_dynamics import DynamicsConfig, write_dynamics_bucket
    from pipeline.storage import open_store

    if kind not in ("expressions", "dynamics"):
        raise MicaclError(f"--kind is {kind!r}.", "Nothing was written.", "Use expressions or dynamics.")
    store = open_store(raw)
    store.check()
    if kind == "dynamics":
        return {"raw": absolute(raw), **write_dynamics_bucket(store, DynamicsConfig(seed=seed))}
    return {"raw": absolute(raw), **write_raw_bucket(store, DemoConfig(seed=seed))}


def prepare(
    raw: Raw,
    dataset: DatasetUrl,
    source: str = "auto",
    frames: str = "auto",
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
        raw: a table (CSV, Parquet), or a folder or bucket of clips.
        dataset: where the shards go: folder or s3://bucket/prefix.
        source: auto, table, folder, bucket, dfew, ferv39k, mafw, afew, caer, crema-d or ravdess (docs/data.md).
        frames: of a clip that is there in several forms: original, images, aligned or 16f; default aligned, if there.
        labels: label set in order; default the data set's own, else DFEW's seven; `auto` takes the words there are.
        test_share: of subjects, where the source names no split.
        max_quarantined: share of videos; above it the exit code is 3.
        workers: cores of a private Ray; default all.
        address: of a running Ray cluster to join; default RAY_ADDRESS, else a private one.
    """
    from pipeline.ray_local import ray_session
    from pipeline.sources import SourceOptions, find_source, label_set
    from pipeline.storage import open_store

    if workers is not None:
        require_at_least(1, ("--workers", workers))
    for flag, value in (("--test-share", test_share), ("--max-quarantined", max_quarantined)):
        require_between(0, 1, flag, value)
    open_store(absolute(dataset)).check()
    found = find_source(absolute(raw), source, options=SourceOptions(frames=frames))
    for line in (found.layout, *found.notes):
        say(line)
    words = label_set(labels, found)
    from pipeline.prepare import PrepareConfig
    from pipeline.prepare import prepare as job

    config = PrepareConfig(test_share=test_share, crop=crop, pack=pack)
    session = functools.partial(ray_session, address=address, num_cpus=workers)
    said = {"kind": found.kind, "layout": found.layout.replace(absolute(raw).rstrip("/"), "RAW")}
    result = job(found.videos(), words, absolute(dataset), config, say, session, source=said)
    listed, bad = result["videos"]["listed"], result["videos"]["quarantined"]
    if bad > max_quarantined * listed:
        reasons = ", ".join(f"{count} {reason}" for reason, count in result["quarantined"].items())
        say(
            f"{bad} of {listed} videos are quarantined ({reasons}), more than --max-quarantined {max_quarantined:g}. "
            f"Version {result['version']} can be used all the same; `micacl report` shows them."
        )
        result["exit"] = EXIT_QUARANTINED
    return result


def status(dataset: DatasetUrl) -> dict[str, Any]:
    """What a dataset's storage holds.

    Args:
        dataset: folder or s3://bucket/prefix.
    """
    from pipeline.status import dataset_status

    result = dataset_status(absolute(dataset))
    say(str(result["says"]))
    return result


def verify(dataset: DatasetUrl, version: int | None = None, strict: bool = False) -> dict[str, Any]:
    """Check a dataset version. Exit code 2 if it is damaged; 4 if it is whole but a subject or a video is on two sides.

    Args:
        dataset: folder or s3://bucket/prefix.
        version: number; default the newest.
        strict: suspected copies of one clip in two splits count as leaks too.
    """
    from pipeline.verify import verify_dataset

    result = verify_dataset(absolute(dataset), version, say)
    found = result["found"]
    counts = ", ".join(f"{n} {severity}" for severity, n in found.items() if n) or "nothing wrong"
    say(f"version {result['version']}: {result['bags']} bags read; {counts}")
    for note in result["notes"]:
        say(f"note: {note}")
    for problem in result["problems"]:
        say(f"{problem['severity']}: {problem['where']}: {problem['what']} {problem['remedy']}")
    leaky = found["leak"] or (strict and found["suspect"])
    return {**result, "exit": EXIT_BAD_INPUT if found["damage"] else EXIT_LEAK if leaky else 0}


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
    dataset: DatasetUrl,
    subject: Names = (),
    video: Names = (),
    delete: bool = False,
    ahead: bool = False,
    runs: Names = (),
    dry_run: bool = False,
    lift: bool = False,
) -> dict[str, Any]:
    """Commit a new version without some subjects or videos, which keeps them out of later ones.

    Args:
        dataset: folder or s3://bucket/prefix.
        subject: names of subjects.
        video: names of videos, as the index has them.
        delete: also delete the shards, index files, lists and crops that held them.
        ahead: also take names that the dataset does not know yet.
        runs: folders or s3://bucket/prefix below which runs and bundles that were trained on them are looked for.
        dry_run: show what would be done, and the models; write and delete nothing.
        lift: the other way round: let `prepare` take them again.
    """
    from pipeline.forget import forget as job
    from pipeline.forget import lift as job_lift

    subjects, videos, urls = ([name for group in groups for name in group] for groups in (subject, video, runs))
    if lift and (delete or ahead or dry_run or urls):
        raise MicaclError(
            "--lift True stands with --delete, --ahead, --dry-run or --runs.",
            "Nothing was done.",
            "To lift takes names only: --subject, --video.",
        )
    if lift:
        result = job_lift(absolute(dataset), subjects, videos)
    else:
        where = [absolute(url) for url in urls]
        result = job(absolute(dataset), subjects, videos, delete, ahead=ahead, dry_run=dry_run, runs=where)
    say(str(result["text"]))
    return result


def main() -> None:
    """`python -m pipeline`: these verbs alone, without torch."""
    stop_on_sigterm()
    sys.exit(run(VERBS, "python -m pipeline", sys.argv[1:]))
