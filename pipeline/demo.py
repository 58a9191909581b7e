"""A raw bucket of synthetic videos: the demo's data, drawn on the spot and the same for the same seed.

    DemoConfig --draw (pipeline.demo_faces)--> frames --H.264 + AAC in memory--> Store
        videos/<subject>/<clip>.mp4   labelled clips, long-tailed in train, level in test, no subject in both
        broken/*.mp4                  five files that cannot be used, each in its own way
        unlabelled/*.mp4              clips of one more subject for prediction, and one broken file
        labels.csv                    path,label,subject,split of videos/ and broken/

A clip depends on the seed and its own name only. The bytes are the same for the same seed, machine and versions of
PyAV, NumPy and OpenCV: one encoder thread, no times or random tags in the container.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Final

import av
import numpy as np
import numpy.typing as npt

from pipeline.contract import DFEW_LABELS, MicaclError, count_by, digest
from pipeline.demo_faces import Bytes, Subject, make_subject, render_clip

if TYPE_CHECKING:
    from pipeline.storage import Store

FPS: Final = 25
AUDIO_RATE: Final = 16_000
"""Samples per second."""
AAC_SAMPLES: Final = 1024
"""Of one AAC frame."""
TWO_FACES: Final = "unlabelled/two_faces.mp4"
BROKEN: Final = ("audio_only", "no_face", "text", "truncated", "zero_byte")
"""The files under broken/, by what is wrong with them."""
X264: Final = {"crf": "23", "preset": "veryfast", "x264-params": "mbtree=0"}
"""With mbtree the bytes of some clips differ from run to run, on one thread too (measured with PyAV 18.1.0)."""
TEXT: Final = b"This is a text file with the name of a video.\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """How much is drawn, and from which seed."""

    seed: int = 7
    """Of subjects, clips and everything in them."""
    train_clips: tuple[int, ...] = (36, 12, 22, 16, 8, 2, 4)
    """Training clips of each class, in the order of DFEW_LABELS. The default falls 18 to 1, from happy to disgust."""
    test_clips: int = 6
    """Held-out clips of every class."""
    train_subjects: int = 6
    test_subjects: int = 3
    """Held out: no clip of them is in train."""
    unlabelled_clips: int = 8
    """Of one more subject, for prediction. The last one shows two faces."""
    frames: tuple[int, int] = (28, 32)
    """Fewest and most frames of a clip, at 25 per second."""
    side: int = 240
    """Of the square frame, pixels; even, as yuv420p asks."""
    ambiguity: float = 0.0
    """Most share of another expression that is mixed into a clip."""

    def __post_init__(self) -> None:
        counts = (*self.train_clips, self.test_clips, self.train_subjects, self.test_subjects)
        if len(self.train_clips) != len(DFEW_LABELS) or min(counts) < 1:
            raise MicaclError(
                f"The demo was asked for {self.train_clips} training clips, {self.test_clips} test clips a class, "
                f"{self.train_subjects} training and {self.test_subjects} test subjects.",
                "Nothing was written.",
                f"Give {len(DFEW_LABELS)} counts of training clips, and no count below 1.",
            )
        if not 8 <= self.frames[0] <= self.frames[1]:
            raise MicaclError(
                f"The demo's clips were to have {self.frames[0]} to {self.frames[1]} frames.",
                "Nothing was written.",
                "Give at least 8 frames, and the smaller number first.",
            )
        if not 0 <= self.ambiguity <= 1:
            raise MicaclError(
                f"The demo's ambiguity was to be {self.ambiguity}.", "Nothing was written.", "Give 0 to 1."
            )
        if self.side % 2 or self.side < 128:
            raise MicaclError(
                f"The demo's frames were to be {self.side} pixels wide.",
                "Nothing was written: H.264 needs an even side and the face detector a face it can see.",
                "Give an even side of at least 128.",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """One planned clip, or one row of labels.csv."""

    path: str
    """In the bucket."""
    label: str
    subject: str
    split: str
    """train, test or unlabelled."""


def write_raw_bucket(store: Store, config: DemoConfig) -> dict[str, Any]:
    """Draw and store the whole bucket; return what was written, fit for JSON.

    `videos` counts clips by split and label, `subjects` names them by split, `broken` lists the unusable files of
    labels.csv, `unlabelled_truth` gives the class of each usable clip under unlabelled/, `bytes` is the size of all.
    """
    clips = plan_clips(config)
    looks = {name: make_subject(random_stream(config, "subject", name)) for name in subject_names(config)}
    total = sum(put(store, clip.path, draw_clip(clip, looks, config)) for clip in clips)
    broken = [Clip(path=f"broken/{kind}.mp4", label="neutral", subject="broken", split="train") for kind in BROKEN]
    for kind, row in zip(BROKEN, broken, strict=True):
        total += put(store, row.path, broken_file(kind, looks, config))
    total += put(store, "unlabelled/broken.mp4", TEXT)
    labelled = [clip for clip in clips if clip.split != "unlabelled"]
    total += put(store, "labels.csv", labels_csv([*labelled, *broken]))
    people = {split: sorted({clip.subject for clip in labelled if clip.split == split}) for split in ("test", "train")}
    return {
        "videos": count_by([asdict(clip) for clip in labelled], "split", "label"),
        "subjects": people,
        "broken": [row.path for row in broken],
        "unlabelled_truth": {clip.path: clip.label for clip in clips if clip.split == "unlabelled"},
        "bytes": total,
    }


def put(store: Store, key: str, data: bytes) -> int:
    store.put(key, data)
    return len(data)


def random_stream(config: DemoConfig, *names: str) -> np.random.Generator:
    """A stream of random numbers of its own for each name: adding clips changes no other clip."""
    return np.random.default_rng(int(digest("/".join((str(config.seed), *names)).encode())[:32], 16))


def subject_names(config: DemoConfig) -> list[str]:
    """s* train, t* test, u* unlabelled; u01 only appears beside u00 in the clip with two faces."""
    counts = {"s": config.train_subjects, "t": config.test_subjects, "u": 2}
    return [f"{kind}{i:02d}" for kind, count in counts.items() for i in range(count)]


def plan_clips(config: DemoConfig) -> list[Clip]:
    """Every usable clip. Subjects take turns within a class; numbers are shuffled so that a name tells no class."""
    wanted = [(label, "s", i + c) for c, label in enumerate(DFEW_LABELS) for i in range(config.train_clips[c])]
    wanted += [(label, "t", i + c) for c, label in enumerate(DFEW_LABELS) for i in range(config.test_clips)]
    order = random_stream(config, "order").permutation(len(wanted))
    people = {"s": config.train_subjects, "t": config.test_subjects}
    seen: Counter[str] = Counter()
    clips = []
    for label, kind, turn in (wanted[i] for i in order):
        subject = f"{kind}{turn % people[kind]:02d}"
        path = f"videos/{subject}/{subject}_{seen[subject]:03d}.mp4"
        clips.append(Clip(path=path, label=label, subject=subject, split="train" if kind == "s" else "test"))
        seen[subject] += 1
    turns = random_stream(config, "unlabelled").permutation(len(DFEW_LABELS))
    for i in range(config.unlabelled_clips):
        path = TWO_FACES if i == config.unlabelled_clips - 1 else f"unlabelled/clip_{i:02d}.mp4"
        label = DFEW_LABELS[turns[i % len(turns)]]
        clips.append(Clip(path=path, label=label, subject="u00", split="unlabelled"))
    return sorted(clips, key=lambda clip: clip.path)


def draw_clip(clip: Clip, looks: Mapping[str, Subject], config: DemoConfig) -> bytes:
    """One clip as MP4."""
    rng = random_stream(config, clip.path)
    frames = int(rng.integers(config.frames[0], config.frames[1] + 1))
    frames_THW3 = render_clip(looks[clip.subject], clip.label, frames, config.side, rng, config.ambiguity)
    if clip.path == TWO_FACES:
        beside_THW3 = render_clip(looks["u01"], clip.label, frames, config.side, rng)
        frames_THW3 = np.concatenate([frames_THW3, beside_THW3], axis=2)
    return encode_mp4(frames_THW3, hum(frames, rng))


def broken_file(kind: str, looks: Mapping[str, Subject], config: DemoConfig) -> bytes:
    """A file of BROKEN that no face can be read from."""
    rng = random_stream(config, "broken", kind)
    frames = config.frames[0]
    if kind == "zero_byte":
        return b""
    if kind == "text":
        return TEXT
    if kind == "audio_only":
        return encode_mp4(None, hum(frames, rng))
    if kind == "no_face":
        return encode_mp4(moving_gradient(frames, config.side), hum(frames, rng))
    whole = encode_mp4(render_clip(looks["s00"], "neutral", frames, config.side, rng), hum(frames, rng))
    return whole[: len(whole) // 2]  # the index of an MP4 (moov) is its last part, so nothing of it can be read


def moving_gradient(frames: int, side: int) -> Bytes:
    """(T, side, side, 3): slow colour waves."""
    t_T11 = np.arange(frames)[:, None, None] / FPS
    y_HW, x_HW = np.mgrid[:side, :side] / side
    waves = [np.sin(2 * np.pi * (t_T11 * (1 + c / 3) + (2 - c) * x_HW + (c + 1) * y_HW)) for c in range(3)]
    return (127 + 90 * np.stack(waves, -1)).astype(np.uint8)


def hum(frames: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """A quiet tone with noise, as long as the frames: samples, -1 to 1."""
    time = np.arange(frames * AUDIO_RATE // FPS) / AUDIO_RATE
    tone = 0.02 * np.sin(2 * np.pi * rng.uniform(120, 480) * time)
    return (tone + 0.002 * rng.normal(size=time.size)).astype(np.float32)


def encode_mp4(frames_THW3: Bytes | None, sound: npt.NDArray[np.float32]) -> bytes:
    """H.264 (without frames: no video stream) and AAC in an MP4, in memory. Same input, same bytes."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", container_options={"fflags": "+bitexact"}) as container:
        video = None
        if frames_THW3 is not None:
            video = container.add_stream("libx264", rate=FPS, options=X264)
            video.height, video.width = frames_THW3.shape[1:3]
            video.pix_fmt = "yuv420p"
            video.codec_context.thread_count = 1
        audio = container.add_stream("aac", rate=AUDIO_RATE, layout="mono")
        audio.codec_context.flags |= av.codec.context.Flags.bitexact
        if video is not None and frames_THW3 is not None:
            for frame_HW3 in frames_THW3:
                container.mux(video.encode(av.VideoFrame.from_ndarray(frame_HW3, format="rgb24")))
            container.mux(video.encode())
        for start in range(0, len(sound), AAC_SAMPLES):
            part = av.AudioFrame.from_ndarray(sound[None, start : start + AAC_SAMPLES], format="fltp", layout="mono")
            part.sample_rate, part.pts, part.time_base = AUDIO_RATE, start, Fraction(1, AUDIO_RATE)
            container.mux(audio.encode(part))
        container.mux(audio.encode())
    return file.getvalue()


def labels_csv(rows: Iterable[Clip]) -> bytes:
    """path,label,subject,split: sorted by path, LF."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("path", "label", "subject", "split"))
    writer.writerows(sorted((row.path, row.label, row.subject, row.split) for row in rows))
    return text.getvalue().encode()
