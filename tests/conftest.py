"""What several test files share: a real S3 server, real videos where they are, and synthetic videos.

* `s3(name)` gives a fresh `s3://bucket/prefix` on a server that lives as long as the session; its credentials are in
  `os.environ` from the first use to the end of the session.
* `media` is the folder of real clips, which the repository does not carry; tests that ask for it are skipped elsewhere.
* `face_video(...)` draws a short clip with the demo's face; the same arguments give the same bytes, drawn once.

Hypothesis has no deadline: no test is about how long it took.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest

from pipeline import storage_s3
from pipeline.contract import MicaclError
from pipeline.demo import encode_mp4, hum
from pipeline.demo_faces import Bytes, make_subject, render_clip
from pipeline.object_store import ObjectStore, ObjectStoreConfig, find_weed

_BUCKET = "tests"

hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A running server with one bucket, `tests`; the process environment points at it."""
    try:
        find_weed()
    except MicaclError as missing:
        pytest.skip(str(missing))
    with ObjectStore(tmp_path_factory.mktemp("s3"), ObjectStoreConfig(stop_s=0)) as server:
        server.make_bucket(_BUCKET)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**server.environment(), "NO_PROXY": "127.0.0.1"}.items():
                patch.setenv(name, value)
            storage_s3._s3_client.cache_clear()
            yield server
        storage_s3._s3_client.cache_clear()


@pytest.fixture(scope="session")
def s3(s3_server: ObjectStore) -> Callable[[str], str]:
    """`s3("raw")` -> `s3://tests/raw-0`: an empty place of the test's own."""
    del s3_server
    numbers = itertools.count()

    def place(name: str = "t") -> str:
        return f"s3://{_BUCKET}/{name}-{next(numbers)}"

    return place


@pytest.fixture
def s3_environment(s3_server: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`change(AWS_SECRET_ACCESS_KEY="wrong")`: another environment for new S3 clients until the test ends."""
    del s3_server

    def change(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        storage_s3._s3_client.cache_clear()

    yield change
    storage_s3._s3_client.cache_clear()


@pytest.fixture(scope="session")
def media() -> Path:
    """The folder of real clips, beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "media"
    if os.environ.get("MICACL_TEST_MEDIA"):
        folder = Path(os.environ["MICACL_TEST_MEDIA"])
    if not (folder / "edge").is_dir():
        pytest.skip(f"no real clips: {folder} is not there (set MICACL_TEST_MEDIA to a folder that has edge/ and asl/)")
    return folder


@functools.cache
def draw_faces(label: str = "happy", frames: int = 12, side: int = 160, person: int = 0) -> Bytes:
    """(T, side, side, 3) RGB of one synthetic person; read-only, because it is shared."""
    subject = make_subject(np.random.default_rng([1, person]))
    frames_THW3 = render_clip(subject, label, frames, side, np.random.default_rng([2, person, frames]))
    frames_THW3.flags.writeable = False
    return frames_THW3


@functools.cache
def draw_video(label: str = "happy", frames: int = 12, side: int = 160, person: int = 0) -> bytes:
    """The same as an MP4 with sound."""
    sound = hum(frames, np.random.default_rng([3, person]))
    return encode_mp4(draw_faces(label, frames, side, person), sound)


@pytest.fixture(scope="session")
def face_frames() -> Callable[..., Bytes]:
    """`face_frames(label, frames, side, person)` -> (T, side, side, 3) RGB."""
    return draw_faces


@pytest.fixture(scope="session")
def face_video() -> Callable[..., bytes]:
    """`face_video(label, frames, side, person)` -> MP4 bytes, 25 frames a second."""
    return draw_video
