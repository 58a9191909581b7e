"""Size, time and fidelity of both codecs on real face crops: python bench/codec.py FOLDER [FOLDER ...]

Each video in the folders is cropped as `prepare` does by default, its crops are kept before they are encoded, and each
codec is timed on them alone: CPU seconds of one thread, best of ROUNDS.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
from demo_steps import commit, machine

from pipeline.bags import Bag, video_to_bags
from pipeline.codec import decode_instance, encode_instance
from pipeline.contract import CODECS, CropConfig
from pipeline.shards import bag_members, write_members
from pipeline.stream import StreamConfig, decode_bag
from pipeline.video import RGB

ROUNDS = 7


def keep_crops(path: Path) -> tuple[Bag, list[list[RGB]]]:
    """The bag of the largest face and, of each instance, the crops as they were before encoding."""
    kept: list[list[RGB]] = []

    def keep(frames_HWC: list[RGB], codec: str, quality: int) -> tuple[bytes, ...]:
        kept.append([frame_HWC.copy() for frame_HWC in frames_HWC])
        return encode_instance(frames_HWC, codec, quality)

    with mock.patch("pipeline.bags.encode_instance", keep):
        (bag,), _ = video_to_bags(path.read_bytes(), name=path.name, video_id="0" * 16, config=CropConfig())
    return bag, kept


def best_s(work: Callable[[], object]) -> float:
    """CPU seconds of the fastest of ROUNDS."""
    seconds = []
    for _ in range(ROUNDS):
        start = time.thread_time()
        work()
        seconds.append(time.thread_time() - start)
    return min(seconds)


def psnr_db(a: RGB, b: RGB) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


def measure(codec: str, crops: list[tuple[Bag, list[list[RGB]]]]) -> list[float]:
    """[kB of frames, kB in the tar, encode ms, step clips/s, whole clips/s, mean PSNR, worst instance's PSNR] a bag."""
    quality = CropConfig().jpeg_quality
    encoded = [tuple(encode_instance(run, codec, quality) for run in runs) for _, runs in crops]
    metas = [dataclasses.replace(bag.meta, codec=codec) for bag, _ in crops]
    bags = [Bag(meta, members) for meta, members in zip(metas, encoded, strict=True)]
    encode_s = best_s(lambda: [encode_instance(run, codec, quality) for _, runs in crops for run in runs])
    step_s = best_s(lambda: [decode_bag(bag, StreamConfig(frames=4), None) for bag in bags])
    whole_s = best_s(lambda: [_decode_whole(bag) for bag in bags])
    psnr = [
        psnr_db(np.stack(run), np.stack(back))
        for bag, (_, runs) in zip(bags, crops, strict=True)
        for run, back in zip(runs, _decode_whole(bag), strict=True)
    ]
    n = len(bags)
    frames_kb = sum(len(data) for bag in bags for members in bag.encoded for data in members) / n / 1000
    tar_kb = sum(len(write_members(bag_members(bag))) for bag in bags) / n / 1000
    return [frames_kb, tar_kb, encode_s / n * 1000, n / step_s, n / whole_s, float(np.mean(psnr)), min(psnr)]


def _decode_whole(bag: Bag) -> list[list[RGB]]:
    counts = bag.meta.instance_frames
    return [decode_instance(m, bag.meta, i, range(n)) for i, (m, n) in enumerate(zip(bag.encoded, counts, strict=True))]


def main(folders: list[str]) -> None:
    paths = sorted(p for folder in folders for p in Path(folder).iterdir() if p.suffix in (".mkv", ".mp4"))
    crops = [keep_crops(path) for path in paths]
    frames = sum(bag.meta.frames for bag, _ in crops) / len(crops)
    print(f"`python bench/codec.py`, commit {commit()}, {machine()}, {dt.date.today().isoformat()}\n")  # noqa: DTZ011
    print(f"{len(crops)} clips, {frames:.1f} frames of {CropConfig().size} px a bag; one thread, best of {ROUNDS}.\n")
    print("| codec | kB | kB in the tar | encode, ms | step, clips/s | whole, clips/s | PSNR, dB | worst, dB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for codec in CODECS:
        cells = " | ".join(f"{value:.1f}" for value in measure(codec, crops))
        print(f"| {codec} | {cells} |")


if __name__ == "__main__":
    main(sys.argv[1:])
