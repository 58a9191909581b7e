"""`micacl compare`: two evaluations of the same clips -> a table, and in words which differences are more than chance.

It evaluates nothing: it reads what `micacl evaluate` has left (micacl.predictions) and refuses what is not of the same
clips, because a paired test of two different sets is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from micacl.bootstrap import LEVEL, Units
from micacl.paired import SIGNIFICANT, Difference, compare
from micacl.predictions import LAST, Evaluation, read_evaluation
from pipeline.contract import MicaclError


def compare_runs(a_url: str, b_url: str, split: str = "test", checkpoint: str = LAST) -> dict[str, Any]:
    """Everything for the JSON line, and `text` for people. Raises MicaclError."""
    a, b = (read_evaluation(url, split, checkpoint) for url in (a_url, b_url))
    require_same_clips(a, b)
    units = units_of(a, b)
    rows = compare(
        units, a.predictions.truth_N, a.predictions.predicted_N, b.predictions.predicted_N, a.predictions.labels
    )
    return {
        "a": _about(a),
        "b": _about(b),
        "split": a.scores["split"],
        "clips": len(a.predictions),
        "by": units.kind,
        "units": units.units,
        "note": units.note,
        "level": LEVEL,
        "differences": [row.to_dict() for row in rows],
        "resolved": [row.name for row in rows if row.resolved],
        "text": to_text(a, b, units, rows),
    }


def _about(one: Evaluation) -> dict[str, Any]:
    said = one.scores
    return {"url": one.url, "step": said["origin"]["step"], "config_hash": said.get("config_hash")}


def require_same_clips(a: Evaluation, b: Evaluation) -> None:
    """Raises MicaclError, naming the first thing in which they differ."""
    for what, of_a, of_b in (
        ("label set", tuple(a.scores["classes"]), tuple(b.scores["classes"])),
        ("split", a.scores["split"], b.scores["split"]),
        ("test fold", a.scores.get("fold"), b.scores.get("fold")),
    ):
        if of_a != of_b:
            _refuse(a, b, f"the {what} of the first is {_words(of_a)}, of the second {_words(of_b)}")
    of_a, of_b = _Version.of(a), _Version.of(b)
    if of_a.sha256 != of_b.sha256:
        _refuse(a, b, f"the first is of {of_a.words}, the second of {of_b.words}")
    keys_a, keys_b = set(a.predictions.keys), set(b.predictions.keys)
    if keys_a != keys_b:
        alone = f"{len(keys_a - keys_b)} clips are in the first alone, {len(keys_b - keys_a)} in the second alone"
        _refuse(a, b, f"{alone}, {len(keys_a & keys_b)} in both")
    other = int((a.predictions.truth_N != b.predictions.truth_N).sum())
    if other:
        _refuse(a, b, f"{other} clips have another label in the one than in the other")


class _Version(NamedTuple):
    """Equal if the hashes are: a dataset that was copied is the same."""

    sha256: str
    words: str

    @classmethod
    def of(cls, one: Evaluation) -> _Version:
        data = one.scores["dataset"]
        return cls(
            str(data.get("sha256")), f"version {data['version']} of {data['url']} ({str(data.get('sha256'))[:12]})"
        )


def _words(value: object) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def _refuse(a: Evaluation, b: Evaluation, what: str) -> None:
    raise MicaclError(
        f"{a.url} and {b.url} are not of the same clips: {what}.",
        "A paired comparison would compare the clips, not the models.",
        "Evaluate both on one version, split and fold: `micacl evaluate RUN DATASET --split test --version N`.",
    )


def units_of(a: Evaluation, b: Evaluation) -> Units:
    """Subjects as either of them knows them."""
    pairs = zip(a.predictions.subjects, b.predictions.subjects, strict=True)
    return Units.of(a.predictions.keys, [x if x is not None else y for x, y in pairs])


def to_text(a: Evaluation, b: Evaluation, units: Units, rows: Sequence[Difference]) -> str:
    """The table and the words, in percent."""
    width = max(len("recall of "), *(len(row.name) for row in rows))
    head = f"{'':{width}}  {'A':>6}  {'B':>6}  {'B - A':>7}  {f'95 % by {units.kind}':>18}  McNemar p"
    names = f"A  {a.url}, step {a.scores['origin']['step']}\nB  {b.url}, step {b.scores['origin']['step']}"
    lines = [names, "", head, *(_line(row, width) for row in rows[:2]), "recall of"]
    lines += [_line(row, width) for row in rows[2:]]
    return "\n".join([*lines, "", *words(units, rows)])


def _line(row: Difference, width: int) -> str:
    if row.a is None or row.b is None or row.difference is None:
        return f"{row.name:{width}}  no clip of it"
    span = "" if row.interval is None else f"{100 * row.interval[0]:+.2f} to {100 * row.interval[1]:+.2f}"
    p = "" if row.p is None else f"{row.p:.3g}"
    mark = "resolved" if row.resolved else ""
    numbers = f"{100 * row.a:6.2f}  {100 * row.b:6.2f}  {100 * row.difference:+7.2f}"
    return f"{row.name:{width}}  {numbers}  {span:>18}  {p:>9}  {mark}".rstrip()


def words(units: Units, rows: Sequence[Difference]) -> list[str]:
    """What the numbers mean, one thought a line."""
    told = [row for row in rows if row.difference is not None]
    yes = [f"{row.name} ({100 * (row.difference or 0):+.2f})" for row in told if row.resolved]
    no = [row.name for row in told if not row.resolved]
    out = [f"Resolved: {', '.join(yes) or 'none'}."]
    out += [f"Not resolved, so neither better nor equal can be said: {', '.join(no)}."] if no else []
    uar, war = rows[0], rows[1]
    if uar.interval is not None:
        half = 50 * (uar.interval[1] - uar.interval[0])
        out.append(
            f"With {units.units} {units.kind}s, UAR of two such runs is known to about {half:.1f} points either way."
        )
    if war.p is not None and (war.p < SIGNIFICANT) != war.resolved:
        out.append(
            f"For WAR, McNemar (p {war.p:.3g}; {war.only_a} clips that A alone has right, {war.only_b} B) and the "
            f"interval by {units.kind} disagree; the interval counts, since clips of one person are not independent."
        )
    out.append(
        "Resolved means: the 95 % interval leaves out 0; for a class also a McNemar p below 0.05. The p of a class is "
        "corrected over the classes (Holm), that of WAR is not. Another seed is a difference of its own: "
        "`micacl crossval` shows it."
    )
    return [*out, *([units.note] if units.note else [])]
