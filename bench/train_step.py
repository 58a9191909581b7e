"""The training step, setting by setting: python bench/train_step.py [--batch 64]

R3D-18 with MICACL's heads and MCCL at 4 instances x 4 frames x 112 px, one device: a GPU if there is one, else the CPU.

    ladder   clips/s, MFU and peak memory. On a GPU each row adds to those before it; on a CPU to the first alone
    heads    the share of the step that GEIIM, WIAN, the projections and MCCL take: the step with and without them, and
             all that comes behind the backbone, alone, with and without them (far less noise)
    input    the model's input from uint8 frames, against the way it was made before, and against the step

MFU is the FLOP of forward and backward (torch.utils.flop_counter; a multiply-add is two) over those that the device
could do: by its data sheet in dense bfloat16, of a CPU as a large float32 product does. Which seconds are meant is said
in bench/train_step_runs.py.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from demo_steps import commit, machine
from train_step_runs import PeakMemory, Rung, Work, in_turns, input_ms, ladder, make_step, peak_flops, ratio, step_flops

from micacl.loss.objective import LossConfig
from micacl.train.precision import ComputeConfig

NO_GPU = "not run: no GPU was at hand"
NO_BF16 = "not run: this CPU has no bfloat16 instructions, a step takes minutes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, help="clips; default 64 on a GPU, 2 on a CPU")
    parser.add_argument(
        "--repeats", type=int, help="steps that count, the fastest does; default 20 on a GPU, 3 on a CPU"
    )
    parser.add_argument("--seconds", type=float, default=20, help="of a row, beyond its first two steps")
    parser.add_argument("--without", nargs="*", default=[], help="rows that are left out, by the start of their name")
    parser.add_argument("--small", action="store_true", help="a tiny model, for a test")
    parser.add_argument("--cpu", action="store_true", help="even if there is a GPU")
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available() and not arguments.cpu
    device = torch.device("cuda" if gpu else "cpu")
    torch.set_num_threads(torch.get_num_threads() if gpu else 1)
    repeats = arguments.repeats or (20 if gpu else 3)
    work = Work.small(device) if arguments.small else Work(device=device, clips=arguments.batch or (64 if gpu else 2))
    limit_s = arguments.seconds
    said: dict[str, Any] = {"commit": commit(), "machine": where(device), "date": dt.date.today().isoformat()}  # noqa: DTZ011
    print(f"`python bench/train_step.py`, commit {said['commit']}, {said['machine']}, {said['date']}")
    peak, source = peak_flops(device, 256 if arguments.small else 1536)
    flops = step_flops(work)
    print(
        f"Load average {os.getloadavg()[0]:.1f} before. {work.clips} clips a step, {flops / work.clips / 1e9:.1f} GFLOP"
    )
    print(f"a clip. Peak {peak / 1e12:.3g} TFLOP/s ({source}). The fastest of up to {repeats} steps after the first.\n")
    said |= {"clips": work.clips, "flop_per_clip": flops / work.clips, "peak_flops": peak}
    said["ladder"] = show_ladder(work, arguments.without, repeats, limit_s, flops / peak)
    said["heads"] = show_heads(work, repeats, limit_s)
    said["input"] = show_input(work, repeats, said["heads"]["step_s"])
    print(f"\nLoad average {os.getloadavg()[0]:.1f} after.")
    print(json.dumps(said))


def where(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{machine()}, one thread, torch {torch.__version__}"
    cudnn = torch.backends.cudnn.version()
    return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, cuDNN {cudnn}"


def show_ladder(work: Work, without: list[str], repeats: int, limit_s: float, ideal_s: float) -> list[dict[str, Any]]:
    """`ideal_s`: of a step at the device's peak."""
    gpu = work.device.type == "cuda"
    unit = "clips/s" if gpu else "clips a CPU second"
    print(f"| setting | {unit} | of the first | MFU | memory, MiB |\n| --- | ---: | ---: | ---: | ---: |")
    found: list[dict[str, Any]] = []
    first: dict[str, Callable[[], object]] = {}
    for rung in ladder(cumulative=gpu):
        name = f"+ {rung.name}" if found else rung.name
        if why := why_not(rung, work.device, without):
            print(f"| {name} | {why} | | | |", flush=True)
            continue
        step, mib = first_step(work, rung)
        seconds = in_turns(work.device, {**first, "step": step}, repeats, limit_s)
        step_s = min(seconds["step"])
        gain = ratio(seconds["first"], seconds["step"]) if first else found[0]["step_s"] / step_s if found else 1.0
        found.append({"name": rung.name, "step_s": step_s, "gain": gain, "mfu": ideal_s / step_s, "mib": mib})
        memory = f"{mib:.0f}" if gpu or not first else ""  # a process on a CPU takes freed memory again
        print(f"| {name} | {work.clips / step_s:.4g} | {gain:.2f} | {ideal_s / step_s:.1%} | {memory} |", flush=True)
        if not gpu and not first:  # a CPU has the memory to keep it, and needs it: its speed is not the same for long
            first = {"first": step}
        del step
    return found


def first_step(work: Work, rung: Rung) -> tuple[Callable[[], object], float]:
    """A rung's step, done once, and the memory that it took."""
    as_m3dfel = rung.compute == ComputeConfig() and rung.feed == "float"
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = as_m3dfel, not as_m3dfel
    torch.compiler.reset()
    memory = PeakMemory(work.device)
    step = make_step(work, rung, work.model, LossConfig())
    step()
    return step, memory.mib


def why_not(rung: Rung, device: torch.device, without: list[str]) -> str:
    """Why a row is not measured; empty if it is."""
    if any(rung.name.startswith(start) for start in without):
        return "left out"
    if device.type == "cuda":
        return ""
    flags = Path("/proc/cpuinfo").read_text()
    if rung.compute.precision == "bf16" and "avx512_bf16" not in flags and "amx_bf16" not in flags:
        return NO_BF16
    return NO_GPU if rung.gpu_only else ""


def show_heads(work: Work, repeats: int, limit_s: float) -> dict[str, Any]:
    """Best setting on a GPU, float32 on a CPU."""
    rung = ladder(cumulative=True)[5] if work.device.type == "cuda" else ladder(cumulative=False)[0]
    ways = {"with": (work.model, LossConfig()), "without": (work.plain_model, LossConfig(mccl=False))}
    print("\n| GEIIM, WIAN, projections and MCCL | with, ms | without, ms | share of the step |")
    print("| --- | ---: | ---: | ---: |")
    step_s = 0.0
    shares = {}
    for name, tail in (("the whole step", False), ("all behind the backbone, alone", True)):
        steps = {way: make_step(work, rung, model, loss, tail=tail) for way, (model, loss) in ways.items()}
        seconds = in_turns(work.device, steps, 20 if tail else repeats, limit_s)
        a, b = (min(seconds[way]) for way in ("with", "without"))
        step_s = step_s or a
        shares[name] = (a - b) / step_s if tail else 1 - ratio(seconds["without"], seconds["with"])
        print(f"| {name} | {a * 1e3:.4g} | {b * 1e3:.4g} | {shares[name]:.1%} |")
    return {"step_s": step_s, "shares": shares}


def show_input(work: Work, repeats: int, step_s: float) -> dict[str, float]:
    found = input_ms(work, repeats)
    print("\n| the model's input | ms a clip | share of the step |\n| --- | ---: | ---: |")
    for name, milliseconds in found.items():
        print(f"| {name} | {milliseconds:.3g} | {milliseconds * work.clips / step_s / 1e3:.2%} |")
    return found


if __name__ == "__main__":
    main()
