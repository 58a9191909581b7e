"""Speed of `micacl prepare`, as ratios measured in one run: python bench/prepare.py FOLDER [--quick] [--parts ...]

FOLDER holds clips with a face. Parts: `clip` (one clip in one process, against the sum of its unavoidable steps and
against the loop that most people write), `stages` (where its time goes), `ray` (the whole job by one and two workers,
its memory, Ray's overhead). Prints Markdown, and one line of JSON at the end. Reads /proc: Linux only.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import prepare_clip
import prepare_ray
import prepare_stages
from demo_steps import commit, machine

PARTS = ("clip", "stages", "ray")
SUFFIXES = (".avi", ".mkv", ".mov", ".mp4", ".webm")
WITHOUT_POSE = ("decode", "detect", "encode")
WITH_PART = ("crop_clip", "crop_in_sandbox")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true", help="two clips, one round, runs of seconds: a smoke test")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=3, help="the least of so many counts")
    parser.add_argument("--run-s", type=float, default=60, help="seconds of a whole job by one worker, about")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.run_s = 1, 2
    paths = sorted(p for p in arguments.folder.iterdir() if p.suffix.lower() in SUFFIXES)
    paths = paths[:2] if arguments.quick else paths
    clips, without = prepare_clip.load(paths)
    head(clips, without, arguments)
    out: dict[str, Any] = {"clips": len(clips), "without_face": without, "rounds": arguments.rounds}
    if "clip" in arguments.parts:
        out["clip"] = clip_part(clips, arguments.rounds)
    if "stages" in arguments.parts:
        out["stages"] = stages_part(clips, arguments.rounds)
    if "ray" in arguments.parts:
        clip_s = out["clip"]["cpu_ms"]["crop_in_sandbox"] / 1000 if "clip" in out else 0.3
        out["ray"] = ray_part([clip.path for clip in clips], clip_s, arguments.run_s)
    print(json.dumps(out, sort_keys=True))


def head(clips: list[prepare_clip.Clip], without: list[str], arguments: argparse.Namespace) -> None:
    said = f"`python bench/prepare.py {arguments.folder.name}{' --quick' if arguments.quick else ''}`"
    print(f"{said}, commit {commit()}, {machine()}, {dt.date.today().isoformat()}\n")  # noqa: DTZ011
    frames = sum(sum(map(len, clip.crops)) for clip in clips) / len(clips)
    left_out = f", left out (no bag): {', '.join(without)}" if without else ""
    print(f"{len(clips)} clips, {frames:.1f} frames a bag{left_out}. Least of {arguments.rounds} round(s).\n")


def clip_part(clips: list[prepare_clip.Clip], rounds: int) -> dict[str, Any]:
    """Issue: at least 0.9 of the limit, at least 3 times the naive loop."""
    costs = prepare_clip.measure(clips, rounds)
    cpu_ms = {name: 1000 * cost.least_s("cpu_s") for name, cost in costs.items()}
    wall_ms = {name: 1000 * cost.least_s("wall_s") for name, cost in costs.items()}
    for ms in (cpu_ms, wall_ms):
        ms["limit"] = sum(ms[name] for name in prepare_clip.LIMIT)
    print("| one clip, one thread | CPU, ms | wall, ms | clips/s per core |\n| --- | ---: | ---: | ---: |")
    for name, ms in cpu_ms.items():
        print(f"| {name} | {ms:.1f} | {wall_ms[name]:.1f} | {1000 / ms:.2f} |")
    ratios = {}
    for name in WITH_PART:
        for limit, steps, goal in (("limit", prepare_clip.LIMIT, 0.9), ("limit without pose", WITHOUT_POSE, None)):
            whole = sum(cpu_ms[step] for step in steps)
            ratios[f"{name} / {limit}"] = _goal(whole / cpu_ms[name], _rounds_of_limit(costs, name, steps), goal)
    product = cpu_ms["crop_in_sandbox"] + cpu_ms["write the tar"]
    for name, goal in (("naive loop", 3.0), ("naive loop, our detector", None)):
        of_rounds = [costs[name].round_s(i) / costs["crop_in_sandbox"].round_s(i) for i in range(rounds)]
        ratios[f"crop_in_sandbox and write / {name}"] = _goal(cpu_ms[name] / product, of_rounds, goal)
    print("\n| clips/s over clips/s, by CPU time | ratio | in single rounds | goal | met |")
    print("| --- | ---: | ---: | ---: | --- |")
    for name, said in ratios.items():
        low, high = said["rounds"]
        goal = "" if said["goal"] is None else f"{said['goal']:g}"
        print(f"| {name} | {said['ratio']:.3f} | {low:.3f} to {high:.3f} | {goal} | {_yes(said['met'])} |")
    print(f"\nlimit = {' + '.join(prepare_clip.LIMIT)}, each alone on the same clips.\n")
    return {"cpu_ms": cpu_ms, "wall_ms": wall_ms, "ratios": ratios}


def _rounds_of_limit(costs: dict[str, prepare_clip.Cost], name: str, steps: Sequence[str]) -> list[float]:
    rounds = len(next(iter(costs[name].cpu_s.values())))
    return [sum(costs[n].round_s(i) for n in steps) / costs[name].round_s(i) for i in range(rounds)]


def _goal(ratio: float, rounds: list[float], goal: float | None) -> dict[str, Any]:
    met = None if goal is None else ratio >= goal
    return {"ratio": ratio, "rounds": [min(rounds), max(rounds)], "goal": goal, "met": met}


def stages_part(clips: list[prepare_clip.Clip], rounds: int) -> dict[str, Any]:
    """Issue: a profile with the next three things to gain."""
    seconds, missing = prepare_stages.profile(clips, rounds)
    whole = sum(seconds.values())
    print("| stage of crop_clip | CPU, ms a clip | share |\n| --- | ---: | ---: |")
    for stage, s in seconds.items():
        print(f"| {stage} | {1000 * s:.2f} | {s / whole:.1%} |")
    print(f"| all | {1000 * whole:.2f} | |\n")
    most = sorted(seconds, key=lambda stage: -seconds[stage])[:3]
    print("The three largest, and what a clip would gain if they cost nothing:\n")
    for number, stage in enumerate(most, 1):
        print(
            f"{number}. {stage}: {1000 * seconds[stage]:.1f} ms, clips/s times {whole / (whole - seconds[stage]):.2f}"
        )
    outside = {stage: s for stage, s in seconds.items() if stage not in prepare_stages.LIMIT}
    said = ", ".join(f"{stage} {1000 * s:.1f}" for stage, s in outside.items())
    print(f"\nNot in the limit: {said} ms; together {sum(outside.values()) / whole:.1%}.")
    if missing:
        print(f"\nNot found, so counted where they are called: {', '.join(missing)}.")
    print()
    return {"ms": {stage: 1000 * s for stage, s in seconds.items()}, "largest": most, "missing": missing}


def ray_part(paths: list[Path], clip_s: float, run_s: float) -> dict[str, Any]:
    """Issue: 1 to 2 workers at least 0.9; Ray's overhead stated; memory does not grow with the number of videos."""
    runs = prepare_ray.measure(paths, clip_s, run_s)
    print(
        "| run | workers | videos | crop phase, s | videos/s | steady videos/s | CPU, ms a video | cores used | "
        "by others | driver, MB | all, MB (PSS) |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for r in runs:
        print(
            f"| {r.name} | {r.workers} | {r.videos} | {r.crop_s:.1f} | {r.per_s:.2f} | {_number(r.steady_per_s, 2)} | "
            f"{r.cpu_ms:.0f} | {r.cores:.2f} | {r.others:.2f} | {r.driver_mb:.0f} | {r.tree_pss_mb:.0f} |"
        )
    found = prepare_ray.summary(runs)
    print("\n| | measured | goal | met |\n| --- | ---: | ---: | --- |")
    for name, text, goal, met in _lines(found):
        print(f"| {name} | {text} | {goal} | {_yes(met)} |")
    print()
    return {"runs": prepare_ray.as_json(runs), **prepare_ray.without_nan(found)}


def _lines(found: dict[str, float]) -> list[tuple[str, str, str, bool | None]]:
    return [
        ("2 workers over twice 1 worker", _number(found["efficiency"], 3), "0.9", found["efficiency"] >= 0.9),
        ("the same, between progress lines", _number(found["efficiency_steady"], 3), "", None),
        ("2 plain processes over twice 1", _number(found["efficiency_plain"], 3), "", None),
        ("Ray and driver, 1 worker, wall ms a video", _number(found["ray_wall_ms"], 1), "", None),
        ("the same, between progress lines", _number(found["ray_steady_wall_ms"], 1), "", None),
        ("Ray and driver, 1 worker, CPU ms a video", _number(found["ray_cpu_ms"], 1), "", None),
        ("the same, 2 workers, without the start", _number(found["ray_long_run_cpu_ms"], 1), "", None),
        ("a video that is done, wall ms, with the start", _number(found["look_ms"], 1), "", None),
        ("the same, without the start", _number(found["look_long_run_ms"], 2), "", None),
        ("driver's peak memory, 4 N over N", f"{found['driver_growth']:+.1%}", "10 %", found["driver_growth"] < 0.1),
        ("peak memory of all, 4 N over N", f"{found['tree_growth']:+.1%}", "10 %", found["tree_growth"] < 0.1),
    ]


def _number(value: float, digits: int) -> str:
    """Empty for NaN."""
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def _yes(met: bool | None) -> str:
    return "" if met is None else "yes" if met else "no"


if __name__ == "__main__":
    main()
