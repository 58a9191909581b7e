"""The process that may die: same bags as without it, and whatever kills it costs one clip.

A child that misbehaves is the real one with `crop_clip` replaced: `Sandbox(command=...)` starts another program, which
nothing outside the tests does.
"""

from __future__ import annotations

import gc
import io
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from pipeline import crop, sandbox, wire
from pipeline.clip import Cropped, crop_clip
from pipeline.contract import CropConfig, MicaclError, Reason, Video
from pipeline.crop import crop_video, read_crop
from pipeline.demo import TEXT, encode_mp4, hum, moving_gradient
from pipeline.demo_faces import Bytes
from pipeline.raw import RawClip
from pipeline.sandbox import Sandbox, thread_sandbox
from pipeline.storage import LocalStore

CONFIG = CropConfig(size=64, instances=2, frames_per_instance=3, min_frames=4)
AROUND = """
import os, sys, time, signal, resource
import pipeline.sandbox_child as child
from pipeline.clip import Cropped, crop_clip
from pipeline.contract import MicaclError
def crop(raw, *, name, video_id, config):
    if not name.startswith("bad"):
        return crop_clip(raw, name=name, video_id=video_id, config=config)
    {body}
child.crop_clip = crop
child.main()
"""

NONSENSE = """
for fd in range(3, 20):
    try: os.write(fd, b"nonsense" * 9)
    except OSError: pass
os._exit(4)
"""


def page_faults(pid: int) -> int:
    """Minor ones so far: proc(5), field 10 of stat."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])


def program(body: str) -> tuple[str, ...]:
    """A child that does `body` with clips whose name begins with `bad`, and crops all others."""
    return (sys.executable, "-c", AROUND.format(body=textwrap.indent(textwrap.dedent(body), "    ").strip()))


@pytest.fixture
def box() -> Iterator[Callable[..., Sandbox]]:
    made: list[Sandbox] = []

    def make(body: str = "pass", **options: object) -> Sandbox:
        made.append(Sandbox(program(body), **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.close()


def child_of(one: Sandbox) -> subprocess.Popen[bytes]:
    assert one._child is not None
    return one._child


def run(one: Sandbox, data: bytes, name: str = "good", config: CropConfig = CONFIG) -> Cropped:
    return one.crop(RawClip(data), name=name, video_id="v", config=config)


def png(rgb_HWC: Bytes) -> bytes:
    out = io.BytesIO()
    Image.fromarray(rgb_HWC).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def long_video() -> bytes:
    """More than a second of work with SLOW."""
    return encode_mp4(np.tile(moving_gradient(8, 160), (125, 1, 1, 1)), hum(8, np.random.default_rng(0)))


SLOW = CropConfig(detect_every=1)


# Parity.


def test_the_same_with_and_without_the_sandbox(
    face_video: Callable[..., bytes], face_frames: Callable[..., Bytes]
) -> None:
    images = tuple(png(frame) for frame in face_frames())
    clips = {
        "whole": RawClip(face_video()),
        "part": RawClip(face_video(), start_s=0.1, end_s=0.4),
        "images": RawClip(images),
        "box": RawClip(face_video(), box=(40.0, 30.0, 80.0, 90.5)),
        "cropped": RawClip(images, cropped=True),
        "damaged": RawClip(face_video()[:-700]),
        "text": RawClip(TEXT),
        "empty": RawClip(b""),
        "no image": RawClip((b"", b"")),
    }
    for name, raw in clips.items():
        for config in (CONFIG, CropConfig(detect_score=0.99)):
            here = crop_clip(raw, name=name, video_id="v", config=config)
            assert thread_sandbox().crop(raw, name=name, video_id="v", config=config) == here


@pytest.mark.slow
@pytest.mark.parametrize("name", ["asl/book.mkv", "edge/corrupt_middle.mp4", "edge/hevc_10bit.mp4"])
def test_real_clips_are_the_same_too(media: Path, name: str) -> None:
    raw, config = RawClip((media / name).read_bytes()), CropConfig()
    here = crop_clip(raw, name=name, video_id="v", config=config)
    assert here.tar
    assert thread_sandbox().crop(raw, name=name, video_id="v", config=config) == here


def test_one_child_serves_many_clips(face_video: Callable[..., bytes]) -> None:
    run(one := Sandbox(), face_video())
    first = child_of(one)
    assert run(one, TEXT).reason == "unreadable"
    run(one, face_video())
    assert child_of(one) is first
    one.close()
    assert first.poll() is not None


def test_frames_come_to_memory_that_is_there(face_video: Callable[..., bytes]) -> None:
    data = face_video("happy", 24, 480)
    run(one := Sandbox(), data)  # a child's first clips fetch the memory
    run(one, data)
    child = child_of(one)
    before = page_faults(child.pid)
    frames = run(one, data).frames
    faults = page_faults(child.pid) - before
    one.close()
    assert frames == 24
    assert faults < 80 * frames, "the memory of a frame, 169 pages, is fetched again for every frame"


# Deaths.


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
        ("signal.signal(signal.SIGSEGV, signal.SIG_DFL); os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("os.abort()", "SIGABRT"),
        ("os._exit(3)", "exit code 3"),
        (NONSENSE, "exit code 4"),
    ],
)
def test_a_death_costs_one_clip(
    box: Callable[..., Sandbox], face_video: Callable[..., bytes], body: str, named: str
) -> None:
    one = box(body)
    made = run(one, face_video(), "bad")
    assert (made.reason, made.tar) == (Reason.CRASHED.value, b"")
    assert named in made.detail
    assert run(one, face_video()) == crop_clip(RawClip(face_video()), name="good", video_id="v", config=CONFIG)


def test_a_child_killed_in_the_middle_of_decoding(long_video: bytes, face_video: Callable[..., bytes]) -> None:
    run(one := Sandbox(), face_video())
    process = psutil.Process(child_of(one).pid)
    before = sum(process.cpu_times()[:2])

    def kill() -> None:
        while sum(process.cpu_times()[:2]) < before + 0.05:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    made = run(one, long_video, config=SLOW)
    killer.join()
    assert (made.reason, "SIGKILL" in made.detail) == (Reason.CRASHED.value, True)
    assert run(one, face_video()).reason is None
    one.close()


def test_a_child_that_dies_between_two_clips_is_nobodys_fault(face_video: Callable[..., bytes]) -> None:
    run(one := Sandbox(), face_video())
    child = child_of(one)
    os.kill(child.pid, signal.SIGKILL)
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert run(one, face_video()).reason is None
    one.close()


def test_a_sleeping_child_is_killed(box: Callable[..., Sandbox], face_video: Callable[..., bytes]) -> None:
    one = box("time.sleep(1000)", limit_s=lambda _: 0.5)
    made = run(one, face_video(), "bad")
    assert (made.reason, made.detail) == ("too_slow", "the process that decoded it was ended after 0.5 s")
    assert run(box(), face_video()).reason is None


@pytest.mark.slow
def test_a_looping_child_is_killed_by_its_cpu_time(
    box: Callable[..., Sandbox], face_video: Callable[..., bytes]
) -> None:
    one = box("while True: pass")
    made = run(one, face_video(), "bad", CropConfig(max_decode_s=0.1))
    assert (made.reason, made.detail) == ("too_slow", "more than 0.1 CPU seconds inside one step")
    assert run(one, face_video()).reason is None


def test_a_slow_video_stops_itself_and_leaves_its_picture(long_video: bytes) -> None:
    made = run(thread_sandbox(), long_video, config=CropConfig(detect_every=1, max_decode_s=0.3))
    assert made.reason == "too_slow"
    assert 0 < made.frames < 1000
    assert made.thumb.startswith(b"\xff\xd8")


# Faults of code, and what the child may not do.


def test_an_error_in_words_travels_as_itself(box: Callable[..., Sandbox], face_video: Callable[..., bytes]) -> None:
    one = box("raise MicaclError('Cause.', 'Consequence.', 'Remedy.')")
    with pytest.raises(MicaclError) as caught:
        run(one, face_video(), "bad")
    assert caught.value.args == ("Cause.", "Consequence.", "Remedy.")
    assert run(one, face_video()).reason is None


def test_a_bug_is_an_exception_and_no_quarantine(box: Callable[..., Sandbox], face_video: Callable[..., bytes]) -> None:
    one = box("return {}['a bug']")
    with pytest.raises(wire.SandboxFailure, match=r"(?s)Traceback.*KeyError: 'a bug'"):
        run(one, face_video(), "bad")
    assert run(one, face_video()).reason is None


def test_a_child_that_does_not_start_says_why() -> None:
    with pytest.raises(wire.SandboxFailure, match=r"(?s)exit code 1.*No module named 'gone'"):
        run(Sandbox((sys.executable, "-c", "import gone")), b"x")


def test_a_child_that_starts_too_slowly_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_START_S", 0.2)
    with pytest.raises(MicaclError, match=r"does not start: .*SIGKILL.*fewer --workers"):
        run(Sandbox((sys.executable, "-c", "import time; time.sleep(60)")), b"x")


@pytest.mark.parametrize("body", ["import numpy; numpy.ones(2**40)", "bytearray(2**40)", "[0] * 2**36"])
def test_memory_has_a_cap(box: Callable[..., Sandbox], face_video: Callable[..., bytes], body: str) -> None:
    made = run(one := box(body), face_video(), "bad")
    assert (made.reason, made.detail) == ("crashed", "the work on it needs more than the cap of 4 GiB of memory")
    assert run(one, face_video()).reason is None


def test_what_the_child_gives_up(
    box: Callable[..., Sandbox], face_video: Callable[..., bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a secret")
    body = f"""
    said = [resource.getrlimit(getattr(resource, "RLIMIT_" + w))[0] for w in ("CORE", "FSIZE", "DATA")]
    print("a library prints"); os.system("echo so does a program"); os.write(1, b"and C")
    try:
        with open({str(tmp_path / "written")!r}, "w") as file: file.write("x")
    except OSError as error:
        said.append(error.errno)
    said += [sys.stdin.read(), "AWS_SECRET_ACCESS_KEY" in os.environ]
    return Cropped(detail=repr(said))
    """
    data = face_video()
    made = run(box(body), data, "bad")
    assert made.detail == repr([0, 0, 4 * 2**30 + 2 * len(data), 27, "", False])


def test_a_child_ends_with_its_parent(face_video: Callable[..., bytes], tmp_path: Path) -> None:
    """SIGKILL of the parent, while the child computes and looks at no pipe."""
    (tmp_path / "v.mp4").write_bytes(face_video())
    taken = tmp_path / "taken"  # an empty file is all that the child can write
    code = f"""
import threading, time
from pipeline.contract import CropConfig
from pipeline.raw import RawClip
from pipeline.sandbox import Sandbox
one = Sandbox({program(f"open({str(taken)!r}, 'w').close()" + "; exec('while True: time.sleep(0.01)')")!r})
one.start()
print(one._child.pid, flush=True)
one.crop(RawClip(open({str(tmp_path / "v.mp4")!r}, "rb").read()), name="bad", video_id="v", config=CropConfig())
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        end_s = time.monotonic() + 60
        while not taken.exists() and time.monotonic() < end_s:
            time.sleep(0.05)
        assert taken.exists()
        parent.kill()
    try:
        assert not psutil.wait_procs([child], timeout=10)[1] or child.status() == psutil.STATUS_ZOMBIE
    finally:
        if child.is_running():
            child.kill()


def test_each_thread_has_a_child_that_ends_with_it(face_video: Callable[..., bytes]) -> None:
    found: list[subprocess.Popen[bytes]] = []

    def work() -> None:
        run(thread_sandbox(), face_video())
        found.append(child_of(thread_sandbox()))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert len({child.pid for child in found}) == 2
    assert all(child.poll() is not None for child in found)


# In prepare.


def test_a_crash_is_one_record_and_is_not_tried_again(
    box: Callable[..., Sandbox], face_video: Callable[..., bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, store = LocalStore(str(tmp_path / "raw")), LocalStore(str(tmp_path / "ds"))
    videos = []
    for name in ("bad.mp4", "good.mp4"):
        raw.put(name, face_video())
        videos.append(Video(url=raw.url(name), name=name, fingerprint="1"))
    monkeypatch.setattr(crop, "crop_in_sandbox", box("os.abort()").crop)
    records = [crop_video(video, CONFIG, store)[0] for video in videos]
    assert [record.reason for record in records] == ["crashed", None]
    assert crop_video(videos[0], CONFIG, store) == (records[0], False)
    store.delete(records[0].object)
    monkeypatch.setattr(crop, "crop_in_sandbox", sandbox.crop_in_sandbox)
    again, worked = crop_video(videos[0], CONFIG, store)
    assert (again.reason, worked) == (None, True)
    assert len(read_crop(store, again.object)) == 1
