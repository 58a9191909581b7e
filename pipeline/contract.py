"""The nouns of the house, and nothing else (standard library only).

    raw videos --sources--> Video rows --crop--> bags --pack--> shards + index + version --plan/stream--> batches

* *video*: one raw file. *track*: one face followed through a video.
* *instance clip* (instance): a short run of face-cropped frames of a track.
* *bag*: all instances of one track in time order; the sample of multi-instance learning.
* *shard*: one WebDataset tar of bags of one class. *version*: the immutable list of shards that readers see.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from typing import Any

SCHEMA_VERSION = 2
"""Of crops, shards, index and version files. A reader refuses any other number in words."""

DFEW_LABELS = ("happy", "sad", "neutral", "angry", "surprise", "disgust", "fear")
"""The seven basic expressions in the order of the DFEW label files. Stored as words, never as numbers."""

SPLITS = ("train", "val", "test")
FOLDS = "folds"
"""Split of a bag that has a fold number instead: told `fold=k`, a reader sees it as test (its fold is k) or train."""
SAID = ("label", "split", "subject", "fold", "scene")
"""Fields of a bag that a source says and no pixel depends on: None in a crop, filled in by pack."""
DETECTOR = "yunet-2023mar"
FALLBACK_DETECTOR = "retinaface-mobilenet025"
FALLBACKS = (FALLBACK_DETECTOR, "none")
ALIGNS = ("roll", "box")
CODECS = ("jpeg", "h264")


class MicaclError(Exception):
    """Bad input. Says the cause, the consequence and the remedy; a command ends with it and exit code 2."""

    def __init__(self, cause: str, consequence: str, remedy: str) -> None:
        super().__init__(cause, consequence, remedy)
        self.cause, self.consequence, self.remedy = cause, consequence, remedy

    def __str__(self) -> str:
        return f"{self.cause} {self.consequence} {self.remedy}"


class Reason(StrEnum):
    """Why a video was quarantined. A closed list: a new cause gets a new name here and a line in docs/data.md."""

    MISSING = "missing"  # the table names a file that is not there
    EMPTY = "empty"  # zero bytes
    TOO_MANY_BYTES = "too_many_bytes"
    UNREADABLE = "unreadable"  # not a container that FFmpeg knows, or its header is gone
    NO_VIDEO_STREAM = "no_video_stream"
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_LONG = "too_long"
    NO_FRAMES = "no_frames"  # a container, but nothing decodes
    TOO_SHORT = "too_short"
    NO_FACE = "no_face"
    TOO_SLOW = "too_slow"  # the work on it passed CropConfig.max_decode_s
    CRASHED = "crashed"  # the process that decoded it died
    FILTERED = "filtered"  # none of its bags passes PackConfig.where


class Quarantined(Exception):
    """Raised while a video is worked on; becomes a record with its Reason, never a stop of the run."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason.value}: {self.detail}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Video:
    """One row of a source: where a raw video lies and what is said about it."""

    url: str
    """Full URL or absolute path, as pipeline.storage opens it."""
    name: str
    """Path inside the bucket: the stable, human name, the same wherever the bucket is mounted."""
    fingerprint: str = ""
    """Changes when the content may have changed (size with ETag or mtime). Decides whether to decode again."""
    label: str | None = None
    split: str | None = None
    """train, val, test, or FOLDS if `fold` is given."""
    subject: str | None = None
    fold: int | None = None
    """The one fold, from 1, in which it is a test clip. In all others it is a training clip."""
    scene: str | None = None
    """FERV39k's scene, or any grouping beside label and subject."""
    kind: str = "video"
    """`video`, or `frames`: `url` is a folder of numbered images."""
    cropped: bool = False
    """The frames show one face and nothing else: no face is searched, the whole frame is the crop."""
    start_s: float | None = None
    end_s: float | None = None
    """The part of the file that is meant, seconds from its first frame; None is from the start, to the end."""
    box: tuple[float, float, float, float] | None = None
    """Given face box x, y, w, h in pixels of the upright frame: no face is searched."""

    @property
    def id(self) -> str:
        """16 hex digits, a function of `name` alone. Two parts of one file have two names."""
        return digest(self.name.encode())[:16]

    def to_json(self) -> str:
        return canonical_json(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "a work list") -> Video:
        fields = json_object(text, f"a video in {where}")
        with expecting(f"a video in {where}"):
            return cls(**{**fields, "box": tuple(fields["box"]) if fields.get("box") else None})


@dataclass(frozen=True, kw_only=True, slots=True)
class CropConfig:
    """Everything that decides the pixels of a bag. Its hash names the crops, so other settings never mix."""

    size: int = 128
    """Side of the square crop, pixels."""
    margin: float = 1.3
    """Side of the crop over the longer side of the face box."""
    detect_every: int = 3
    """Faces are searched in every n-th frame and interpolated between."""
    detect_side: int = 640
    """Frames are scaled down (never up) to this long side before detection, pixels."""
    detect_score: float = 0.6
    detector: str = DETECTOR
    fallback: str = FALLBACK_DETECTOR
    """Searches again in clips in which the detector follows nobody for a quarter of the frames; `none` does without."""
    align: str = "roll"
    """`roll` turns the crop so that the face stands upright in the median of the track; `box` leaves it as it is."""
    faces: str = "largest"
    """`largest` keeps one track a video, `all` keeps every track."""
    instances: int = 4
    """Instance clips per bag."""
    frames_per_instance: int = 12
    """Most frames stored per instance; longer tracks are sub-sampled evenly."""
    min_frames: int = 4
    """Tracks with fewer frames than this are dropped; at least one frame for each instance."""
    codec: str = "jpeg"
    """Of stored frames: `jpeg` (any frame alone), or `h264` (annex B, an instance whole; 5 to 7 times smaller)."""
    jpeg_quality: int = 90
    image_fps: float = 25.0
    """Frames a second of sources that are folders of images."""
    max_bytes: int = 512 * 2**20
    max_pixels: int = 4096 * 2304
    """Of one frame."""
    max_seconds: float = 120.0
    max_decode_s: float = 120.0
    """CPU seconds that the work on one video may take."""

    def __post_init__(self) -> None:
        if self.faces not in ("largest", "all"):
            raise MicaclError(f"--crop.faces is {self.faces!r}.", "Nothing was done.", "Use largest or all.")
        require_at_least(
            1,
            ("--crop.instances", self.instances),
            ("--crop.frames-per-instance", self.frames_per_instance),
            ("--crop.detect-every", self.detect_every),
            ("--crop.max-bytes", self.max_bytes),
            ("--crop.max-pixels", self.max_pixels),
        )
        for flag, value, low, high in (
            ("--crop.size", self.size, 16, 1024),
            ("--crop.margin", self.margin, 0.5, 10),
            ("--crop.detect-side", self.detect_side, 64, 4096),
            ("--crop.detect-score", self.detect_score, 0.01, 1),
            ("--crop.jpeg-quality", self.jpeg_quality, 1, 100),
            ("--crop.instances times --crop.frames-per-instance", self.instances * self.frames_per_instance, 1, 4096),
            ("--crop.image-fps", self.image_fps, 0.01, 1000),
            ("--crop.max-seconds", self.max_seconds, 0, 86400),
            ("--crop.max-decode-s", self.max_decode_s, 0, 86400),
        ):
            require_between(low, high, flag, value)
        if self.detector != DETECTOR:
            raise MicaclError(f"--crop.detector is {self.detector!r}.", "No face can be found.", f"Use {DETECTOR}.")
        for flag, word, words in (
            ("--crop.fallback", self.fallback, FALLBACKS),
            ("--crop.align", self.align, ALIGNS),
            ("--crop.codec", self.codec, CODECS),
        ):
            if word not in words:
                raise MicaclError(f"{flag} is {word!r}.", "Nothing was done.", f"Use {' or '.join(words)}.")
        if self.min_frames < self.instances:
            raise MicaclError(
                f"--crop.min-frames {self.min_frames} is below --crop.instances {self.instances}.",
                "An instance would have no frame.",
                "Raise min-frames or lower instances.",
            )

    @property
    def hash(self) -> str:
        """12 hex digits over every field and the schema version."""
        return digest(canonical_json({"schema": SCHEMA_VERSION, **dataclasses.asdict(self)}).encode())[:12]


@dataclass(frozen=True, kw_only=True, slots=True)
class PackConfig:
    """How bags are cut into shards."""

    max_bags: int = 256
    """Per shard."""
    max_bytes: int = 64 * 2**20
    """Per shard; a single larger bag still gets a shard of its own."""
    where: str = ""
    """Bags are packed only if this holds, e.g. `detector_score > 0.8 and face_px >= 48` (docs/shard-format.md)."""

    def __post_init__(self) -> None:
        require_at_least(1, ("--pack.max-bags", self.max_bags), ("--pack.max-bytes", self.max_bytes))


@dataclass(frozen=True, kw_only=True, slots=True)
class BagMeta:
    """What is known of a bag besides its pixels; the `<key>.json` member of a shard.

    The fields of SAID are None in a crop and filled in by pack: relabelling decodes nothing again.
    """

    key: str
    """`<video id>_<track>`: no dots, at most 80 bytes."""
    video: str
    """Video.name."""
    track: int
    instance_frames: tuple[int, ...]
    """Stored frames of each instance."""
    seconds: float
    """From the first to the last frame of the track."""
    fps: float
    """Of the stored frames."""
    size: int
    detector: str
    detector_score: float
    """Mean over the frames in which a face was searched and found."""
    crop: str
    """CropConfig.hash."""
    boxes: tuple[tuple[float, float, float], ...]
    """Of each instance: centre x, centre y and side of the square that was cut, in source pixels."""
    roll: float = 0.0
    """The squares are turned by this many degrees clockwise about their centres (CropConfig.align)."""
    codec: str = "jpeg"
    face_px: float = 0.0
    """Median over the frames of the longer side of the face box, source pixels; 0 if no face was searched."""
    face_share: float = 1.0
    """Of the searches while the track lived, the share that found the face."""
    blur: float = 0.0
    """Median over the frames of the variance of the Laplacian of the crop: low is blurred."""
    yaw: float | None = None
    """Median over the searches, -1 (to the person's right) to 1: nose between the eyes; None without landmarks."""
    phash: str = ""
    """Perceptual hash of the stored frames, hex (pipeline/phash.py): equal pictures, near hashes."""
    label: str | None = None
    split: str | None = None
    subject: str | None = None
    fold: int | None = None
    scene: str | None = None
    schema: int = SCHEMA_VERSION

    @property
    def frames(self) -> int:
        return sum(self.instance_frames)

    def said(self, **what: Any) -> BagMeta:
        """The same bag with other things said of it (SAID); what is not given is None."""
        all_of_it: dict[str, Any] = {name: what.get(name) for name in SAID}
        return dataclasses.replace(self, **all_of_it)

    def to_json(self) -> str:
        return canonical_json(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "a bag") -> BagMeta:
        fields = json_object(text, f"json in {where}")
        require_schema(fields.get("schema"), where)
        try:
            fields["instance_frames"] = tuple(fields["instance_frames"])
            fields["boxes"] = tuple(tuple(box) for box in fields["boxes"])
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise foreign(f"json in {where}", error) from error


def digest(data: bytes | memoryview) -> str:
    """sha256 in hex; the only hash of the house."""
    return hashlib.sha256(data).hexdigest()


def canonical_json(value: Any) -> str:
    """One JSON text for one value: sorted keys, no spaces, no NaN. Same value, same bytes, same hash."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def json_object(text: str | bytes, what: str) -> dict[str, Any]:
    """A JSON object from outside. Raises MicaclError on anything else."""
    try:
        value = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise foreign(what, error) from error
    if not isinstance(value, dict):
        raise foreign(what, TypeError(f"a {type(value).__name__}"))
    return value


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


@contextlib.contextmanager
def expecting(what: str) -> Iterator[None]:
    """Reading something that should be ours: what does not fit is refused by name. Raises MicaclError."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise foreign(what, error) from error


def foreign(what: str, error: Exception) -> MicaclError:
    """Something that should be ours is not."""
    return MicaclError(
        f"Found {what} that is not what this release writes ({type(error).__name__}: {error}).",
        "Nothing was read from it.",
        "It was changed after it was written: delete it and make it again (prepare, train, evaluate, export).",
    )


def require_at_least(least: float, *flags: tuple[str, float]) -> None:
    """Refuse numbers below `least`, naming the flag. Raises MicaclError."""
    for flag, value in flags:
        if not value >= least:
            raise MicaclError(f"{flag} is {value}.", "Nothing was done.", f"Give {least:g} or more.")


def require_between(low: float, high: float, flag: str, value: float) -> None:
    """Refuse a number outside [low, high], naming the flag. Raises MicaclError."""
    if not low <= value <= high:
        raise MicaclError(f"{flag} is {value}.", "Nothing was done.", f"Give a value from {low:g} to {high:g}.")


def require_schema(found: object, what: str) -> None:
    """Refuse an artefact of another schema version in words. Raises MicaclError."""
    if found != SCHEMA_VERSION:
        raise MicaclError(
            f"Found {what} of schema {found!r}; this release reads schema {SCHEMA_VERSION}.",
            "Nothing was read from it.",
            "Use the release that wrote it, or write it again with this one (prepare, export).",
        )


def require_label(label: str, labels: Sequence[str], where: str) -> None:
    """Refuse a label that is not of the label set, with the nearest names. Raises MicaclError."""
    if label not in labels:
        near = get_close_matches(label, labels, n=3, cutoff=0.5)
        raise MicaclError(
            f"Unknown label {label!r} in {where}.",
            "Nothing was written: a clip of no class cannot be used.",
            f"{'Did you mean ' + ' or '.join(near) + '? ' if near else ''}The label set is {', '.join(labels)}.",
        )


def part_name(split: str, fold: int | None) -> str:
    """The folder and the key in counts of a split: `train`, `val`, `test`, or `fold-3` where the source is in folds."""
    return split if fold is None else f"fold-{fold}"


def count_by(rows: Sequence[Mapping[str, Any]], *columns: str) -> dict[str, Any]:
    """Nested counts, e.g. by split and label, with sorted keys: {split: {label: bags}}."""
    if not columns:
        raise ValueError("count_by needs at least one column")
    out: dict[str, Any] = {}
    for row in rows:
        at = out
        for column in columns[:-1]:
            at = at.setdefault(str(row[column]), {})
        last = str(row[columns[-1]])
        at[last] = at.get(last, 0) + 1
    return {k: out[k] for k in sorted(out)}
