"""The HTTP service: a real Ray Serve on a private Ray, real videos, real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
import ray
from pydantic import ValidationError
from ray import serve
from ray.exceptions import ActorDiedError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from cluster.serve.app import Classifier, Ingress, build, check_port, run_server
from cluster.serve.client import get_health, post_video
from cluster.serve.schemas import MIB, BuildArgs, Refused
from cluster.serve.steps import open_bundle, preprocess, read_body, synthetic_bag
from micacl.bundle import load_bundle
from micacl.predictor import Predictor
from pipeline.contract import DFEW_LABELS, CropConfig, MicaclError
from pipeline.demo import TEXT, TWO_FACES, DemoConfig, broken_file, draw_clip, plan_clips, subject_names
from pipeline.demo import random_stream as demo_stream
from pipeline.demo_faces import make_subject
from pipeline.ray_local import ray_session
from pipeline.shards import read_bags
from tests.tiny_bundle import make_bundle

pytest.importorskip("skimage", reason="the synthetic faces need the demo extra")

CAP_MB = 2
SECRET = "zq7secretname"


@dataclass(frozen=True)
class Videos:
    one: bytes
    two: bytes
    faceless: bytes


@dataclass(frozen=True)
class Server:
    url: str
    port: int
    bundle: str
    logs: Callable[[], str]
    stop: Callable[[], None]


@pytest.fixture(scope="module")
def videos() -> Videos:
    config = DemoConfig(unlabelled_clips=2, frames=(12, 12))
    looks = {name: make_subject(demo_stream(config, "subject", name)) for name in subject_names(config)}
    clips = {clip.path: clip for clip in plan_clips(config) if clip.split == "unlabelled"}
    two = draw_clip(clips.pop(TWO_FACES), looks, config)
    (one,) = clips.values()
    return Videos(draw_clip(one, looks, config), two, broken_file("no_face", looks, config))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bundle(tmp_path_factory.mktemp("serve") / "bundle")


def free_port() -> int:
    """Below Ray's own range."""
    for port in range(8100, 8200):
        with contextlib.suppress(MicaclError):
            check_port("127.0.0.1", port)
            return port
    raise AssertionError("no free port")


@pytest.fixture(scope="module")
def server(bundle: str) -> Iterator[Server]:
    port = free_port()
    with ray_session(num_cpus=2), contextlib.ExitStack() as running:
        url = running.enter_context(run_server(bundle, "127.0.0.1", port, lambda _: None, max_upload_mb=CAP_MB))
        folder = Path(ray.worker.global_worker.node.get_session_dir_path())

        def logs() -> str:
            return "".join(
                p.read_text(errors="replace") for p in folder.rglob("*") if p.is_file() and not p.is_socket()
            )

        yield Server(url, port, bundle, logs, running.close)


def ask(server: Server, data: bytes | Iterator[bytes], **params: str) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/predict", content=data, params=params, timeout=120, trust_env=False)


def problem(reply: httpx.Response, status: int, reason: str) -> dict[str, str]:
    assert reply.status_code == status, reply.text
    error: dict[str, str] = reply.json()["error"]
    assert set(error) == {"reason", "detail", "cause", "consequence", "remedy"}
    assert error["reason"] == reason
    assert all(error[k].endswith(".") for k in ("cause", "consequence", "remedy"))
    return error


def test_a_bad_bundle_is_said_before_ray_is_asked(tmp_path: Path, bundle: str) -> None:
    before = ray.is_initialized()
    with pytest.raises(MicaclError, match=r"no bundle.json"), run_server(str(tmp_path), "127.0.0.1", 8099, print):
        pytest.fail("it started")
    with pytest.raises(MicaclError, match="Ray's own"), run_server(bundle, "127.0.0.1", 11001, print):
        pytest.fail("it started")
    assert ray.is_initialized() == before


@pytest.mark.parametrize("port", [0, -1, 10002, 19999, 65536])
def test_ports_that_cannot_work_are_refused(port: int) -> None:
    with pytest.raises(MicaclError, match=f"--port {port} "):
        check_port("127.0.0.1", port)


def test_a_taken_port_and_an_unknown_host_are_refused() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", free_port()))
        other.listen()
        with pytest.raises(MicaclError, match="Address already in use"):
            check_port("127.0.0.1", other.getsockname()[1])
    with pytest.raises(MicaclError, match=r"--host no\.such\.invalid"):
        check_port("no.such.invalid", 8000)


async def chunks(*parts: bytes, wait_s: float = 0.0) -> AsyncIterator[bytes]:
    for part in parts:
        await asyncio.sleep(wait_s)
        yield part


def test_a_body_is_read_whole_up_to_the_cap() -> None:
    assert asyncio.run(read_body(chunks(b"ab", b"", b"c"), "3", 3, 10)) == b"abc"
    assert asyncio.run(read_body(chunks(b"abc"), "no number", 3, 10)) == b"abc"


@pytest.mark.parametrize(
    ("parts", "declared", "wait_s", "status"),
    [
        ((b"abcd",), None, 0, 413),
        ((b"ab", b"cd"), "2", 0, 413),
        ((b"a",), "4", 0, 413),
        ((b"a", b"b"), None, 1.0, 408),
        ((b"",), "0", 0, 400),
        ((), None, 0, 400),
    ],
)
def test_a_body_is_refused(parts: tuple[bytes, ...], declared: str | None, wait_s: float, status: int) -> None:
    with pytest.raises(Refused) as caught:
        asyncio.run(read_body(chunks(*parts, wait_s=wait_s), declared, 3, 0.05))
    assert caught.value.status == status


def test_a_declared_excess_is_refused_before_reading() -> None:
    async def never() -> AsyncIterator[bytes]:
        pytest.fail("the body was read")
        yield b""

    with pytest.raises(Refused, match="too_large"):
        asyncio.run(read_body(never(), "4", 3, 10))


def test_build_refuses_unknown_settings_and_bounds_its_queues(bundle: str) -> None:
    with pytest.raises(ValidationError, match="max_upload"):
        build({"bundle": bundle, "max_upload": 3})
    with pytest.raises(ValidationError, match="bundle"):
        build({})
    for deployment in (Ingress, Classifier):
        assert 0 < deployment._deployment_config.max_queued_requests < 1000
        assert deployment._deployment_config.max_ongoing_requests >= 16


def test_the_synthetic_bag_has_the_form_of_a_real_one(videos: Videos) -> None:
    crop = CropConfig()
    (real,) = read_bags(preprocess(videos.one, "x", crop), "x")
    synthetic = synthetic_bag(crop)
    assert len(synthetic.encoded) == len(real.encoded) == crop.instances
    assert synthetic.meta.size == real.meta.size
    assert synthetic.meta.crop == real.meta.crop


def test_a_broken_model_is_noticed_and_a_passing_failure_forgiven(videos: Videos, bundle: str) -> None:
    cls = Classifier.func_or_class
    classifier = cls.__new__(cls)
    classifier.predictor, classifier.suspect = Predictor(load_bundle(bundle)), False
    tar = preprocess(videos.one, "x", classifier.predictor.bundle.crop)
    model = classifier.predictor.model
    kept = copy.deepcopy(model.state_dict())
    classifier.check_health()
    for weights in model.parameters():
        weights.data.fill_(float("nan"))
    classifier.check_health()  # nothing has failed yet, so nothing is tested
    with pytest.raises(FloatingPointError):
        classifier._classify([tar])
    with pytest.raises(FloatingPointError):
        classifier.check_health()
    model.load_state_dict(kept)
    classifier.check_health()
    assert not classifier.suspect
    assert len(classifier._classify([tar, tar])) == 2


@pytest.mark.parametrize(
    ("outcome", "status", "reason"),
    [
        (BackPressureError(num_queued_requests=1, max_queued_requests=1), 503, "overloaded"),
        (DeploymentUnavailableError(DeploymentID("Classifier", "micacl")), 503, "unavailable"),
        (ActorDiedError(), 500, "failed"),
        (("another", []), 503, "updating"),
    ],
)
def test_trouble_behind_the_ingress_becomes_an_answer(outcome: Any, status: int, reason: str) -> None:
    class Neighbour:
        classify = property(lambda self: self)

        async def remote(self, tar: bytes) -> Any:
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

    ingress = SimpleNamespace(bundle_id="this", classifier=Neighbour())
    with pytest.raises(Refused) as caught:
        asyncio.run(Ingress.func_or_class._classify(ingress, b""))
    assert (caught.value.status, caught.value.body.error.reason) == (status, reason)
    assert bool(caught.value.retry_s) == (status == 503)


@pytest.mark.slow
def test_health_names_the_bundle(server: Server) -> None:
    health = get_health(server.url)
    assert health["bundle"] == load_bundle(server.bundle).id
    assert health["labels"] == list(DFEW_LABELS)
    assert health["max_upload_mb"] == CAP_MB


@pytest.mark.slow
@pytest.mark.parametrize(("which", "faces"), [("one", 1), ("two", 2)])
def test_the_answer_is_the_predictors(server: Server, videos: Videos, which: str, faces: int) -> None:
    data = getattr(videos, which)
    wanted = Predictor(open_bundle(BuildArgs(bundle=server.bundle))).predict(data, "clip.mp4")
    reply = ask(server, data, name="clip.mp4")
    assert reply.status_code == 200, reply.text
    answer = reply.json()
    assert len(wanted) == len(answer["faces"]) == faces
    assert answer["bundle"] == load_bundle(server.bundle).id
    assert answer["labels"] == list(DFEW_LABELS)
    assert set(answer["seconds"]) == {"upload", "decode", "model"}
    for face, offline in zip(answer["faces"], wanted, strict=True):
        assert face["probabilities"] == pytest.approx(offline.probabilities, abs=1e-6)
        assert face["instance_weights"] == pytest.approx(list(offline.instance_weights), abs=1e-4)
        same = ("track", "label", "seconds", "detector_score")
        assert {k: face[k] for k in same} == {k: getattr(offline, k) for k in same}
        assert face["box"] == list(offline.box)


@pytest.mark.slow
def test_the_first_face_is_the_one_that_largest_keeps(server: Server, videos: Videos) -> None:
    (largest,) = Predictor(load_bundle(server.bundle)).predict(videos.two, "clip.mp4")
    faces = post_video(server.url, videos.two, "clip.mp4")["faces"]
    assert faces[0]["probabilities"] == pytest.approx(largest.probabilities, abs=1e-6)
    assert faces[1]["box"] != faces[0]["box"]


@pytest.mark.slow
def test_eight_at_once_are_all_answered_as_one_alone(server: Server, videos: Videos) -> None:
    alone = {data: ask(server, data).json()["faces"] for data in (videos.one, videos.two)}
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda i: ask(server, (videos.one, videos.two)[i % 2]), range(8)))
    assert [reply.status_code for reply in replies] == [200] * 8
    for i, reply in enumerate(replies):
        for face, wanted in zip(reply.json()["faces"], alone[(videos.one, videos.two)[i % 2]], strict=True):
            assert face["box"] == wanted["box"]
            assert face["probabilities"] == pytest.approx(wanted["probabilities"], abs=2e-6)


@pytest.mark.slow
def test_videos_that_cannot_be_used_are_422_with_the_reason(server: Server, videos: Videos) -> None:
    problem(ask(server, TEXT), 422, "unreadable")
    problem(ask(server, videos.faceless), 422, "no_face")
    problem(ask(server, videos.one[: len(videos.one) // 2]), 422, "unreadable")
    with pytest.raises(MicaclError, match="no face is followed"):
        post_video(server.url, videos.faceless)


@pytest.mark.slow
def test_an_empty_body_is_400(server: Server) -> None:
    problem(ask(server, b""), 400, "empty")
    problem(ask(server, iter([b""])), 400, "empty")


@pytest.mark.slow
def test_too_large_by_header_is_refused_before_the_body_comes(server: Server) -> None:
    """Only the head of the request is sent: an answer means that nobody waited for the body."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as link:
        length = CAP_MB * MIB + 1
        link.sendall(f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode())
        head = link.recv(4096)
    assert head.startswith(b"HTTP/1.1 413 ")
    error = problem(ask(server, bytes(length)), 413, "too_large")
    assert str(length) in error["detail"]


@pytest.mark.slow
def test_too_large_without_a_length_is_refused_while_reading(server: Server) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(200):  # 50 MiB
            sent += 2**18
            yield bytes(2**18)

    error = problem(ask(server, endless()), 413, "too_large")
    came = re.match(r"(\d+) bytes came", error["detail"])
    assert came
    assert CAP_MB * MIB < int(came[1]) < sent


@pytest.mark.slow
def test_other_methods_and_paths_keep_their_defaults(server: Server) -> None:
    with httpx.Client(base_url=server.url, trust_env=False, timeout=60) as client:
        assert client.get("/v1/predict").status_code == 405
        assert client.put("/v1/predict", content=b"x").status_code == 405
        assert client.delete("/v1/health").status_code == 405
        assert client.get("/v1/nothing").status_code == 404
        assert client.get("/page/../app.py").status_code == 404
        assert client.get("/docs").status_code == 404


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "<script>alert(1)</script>", "\0\r\nSet-Cookie: a=b", "臉.mp4", "a.b.c", "'; --", ""]
)
def test_a_hostile_name_changes_nothing_and_comes_back_nowhere(server: Server, videos: Videos, name: str) -> None:
    reply = ask(server, videos.one, name=name)
    assert reply.status_code == 200, reply.text
    assert "set-cookie" not in reply.headers
    for word in ("passwd", "script", "Cookie", "臉"):
        assert word not in reply.text + str(reply.headers)


@pytest.mark.slow
def test_a_name_without_end_is_400(server: Server, videos: Videos) -> None:
    problem(ask(server, videos.one, name="x" * 256), 400, "bad_request")


@pytest.mark.slow
def test_the_page_is_whole_and_asks_nobody_else(server: Server) -> None:
    kinds = {"/": "text/html", "/page/app.js": "text/javascript", "/page/style.css": "text/css"}
    for path, kind in kinds.items():
        reply = httpx.get(server.url + path, trust_env=False, timeout=60)
        assert reply.status_code == 200
        assert reply.headers["content-type"] == f"{kind}; charset=utf-8"
        assert "default-src 'none'" in reply.headers["content-security-policy"]
        text = reply.text.replace("http://HOST:PORT", "")
        assert not re.search(r"(?:https?:)?//\w", re.sub(r"; // .*", "", text)), path
        links = set(re.findall(r'(?:src|href)="([^"]+)"', text)) | set(re.findall(r'fetch\("([^"]+)"', text))
        assert {f"/{link}" for link in links} <= {*kinds, "/v1/predict", "/v1/health"}, links


@pytest.mark.slow
def test_nothing_of_an_upload_is_written_down(server: Server, videos: Videos) -> None:
    before = set(Path(tempfile.gettempdir()).iterdir())
    assert ask(server, videos.one, name=SECRET).status_code == 200
    problem(ask(server, f"{SECRET} is text".encode(), name=SECRET), 422, "unreadable")
    text = server.logs()
    assert "ServeReplica" in text, "the logs were found"
    assert SECRET not in text
    assert {p for p in Path(tempfile.gettempdir()).iterdir() if SECRET in p.name} <= before


@pytest.mark.slow
def test_one_held_upload_ends_and_excess_is_turned_away(server: Server, videos: Videos) -> None:
    """A place for one request and a queue for one: an upload that stalls is in the place until its time is over."""
    values = BuildArgs(bundle=server.bundle, upload_s=3).model_dump()
    ingress = Ingress.options(max_ongoing_requests=1, max_queued_requests=1)
    serve.run(ingress.bind(values, Classifier.bind(values)), name="small", route_prefix="/small")
    stalled = threading.Event()
    small = dataclasses.replace(server, url=f"{server.url}/small")

    def trickle() -> Iterator[bytes]:
        for at in range(600):  # 30 s, were it not cut off
            yield videos.one[at : at + 1]
            stalled.set()
            time.sleep(0.05)

    with ThreadPoolExecutor(5) as pool:
        held = pool.submit(ask, small, trickle())
        assert stalled.wait(60)
        others = [reply.status_code for reply in pool.map(lambda _: ask(small, videos.one), range(4))]
        reply = held.result()
    problem(reply, 408, "upload_too_slow")
    assert reply.headers["connection"] == "close"
    assert others.count(503) >= 2
    assert set(others) <= {200, 503}
    assert ask(server, videos.one).status_code == 200


@pytest.mark.slow
def test_a_second_server_on_the_cluster_is_refused(server: Server) -> None:
    with pytest.raises(MicaclError, match="already runs"), run_server(server.bundle, "127.0.0.1", 9871, print):
        pytest.fail("it started")
    assert get_health(server.url)


@pytest.mark.slow
def test_the_port_is_closed_at_the_end(server: Server) -> None:
    """Last: it stops the server."""
    with pytest.raises(MicaclError, match="can listen"):
        check_port("127.0.0.1", server.port)
    server.stop()
    with socket.socket() as link:
        assert link.connect_ex(("127.0.0.1", server.port)) != 0
    check_port("127.0.0.1", server.port)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_server_leaves_no_process_and_no_folder(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cluster", "serve", make_bundle(tmp_path / "bundle"), "--port", "8091"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("serving"):
            break
    started = psutil.Process(process.pid).children(recursive=True)
    folders = {p.environ().get("RAY_TMPDIR") for p in started if p.is_running()} - {None}
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert json.loads(out.strip().splitlines()[-1]) == {"served": "http://127.0.0.1:8091"}
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not alive
    assert folders
    assert not [f for f in folders if f and Path(f).exists()]
