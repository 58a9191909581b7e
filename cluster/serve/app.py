"""The recogniser behind HTTP, with Ray Serve.

    POST /v1/predict ──> Ingress (CPU): body, capped ──> thread: its sandbox ──tar blocks────┐
                                                                                            v
    answer <── probabilities of every face <────────────── Classifier (model): batches of up to 16 videos

The preprocessing and the model are those of `micacl.predictor`, so the online answer is the offline one. Between the
two go tar blocks as in a shard, and JSON-like values back. Each thread has a child process that decodes, so that a
hostile upload ends that child at most. Uploads live in memory while they are worked on: they are never written to disk
and nothing of them is logged.

`build` is the door for `serve deploy cluster/deploy/serve.yaml`, `run_server` the one for `micacl serve`.

No `from __future__ import annotations` in this file: Ray Serve copies the class below while the module is being read,
and FastAPI could not look up annotations that are text in the copy.
"""

import asyncio
import contextlib
import importlib.resources
import logging
import math
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import ray
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from cluster.serve.client import wait_for_health
from cluster.serve.schemas import MIB, Answer, BuildArgs, Health, Refusal, Refused, Seconds, busy, unusable
from cluster.serve.steps import installed_version, open_bundle, preprocess, read_body, start_sandboxes, synthetic_bag
from micacl.bundle import load_bundle
from micacl.predictor import FacePrediction, Predictor
from pipeline.bags import Bag
from pipeline.contract import MicaclError, Quarantined
from pipeline.shards import read_bags

APPLICATION = "micacl"
_RAY_PORTS = range(10002, 20000)
_PAGE = {"index.html": "text/html", "app.js": "text/javascript", "style.css": "text/css"}
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

api = FastAPI(
    title="MICACL",
    version=installed_version(),
    docs_url=None,  # these two pages would load scripts from elsewhere
    redoc_url=None,
    openapi_url="/v1/openapi.json",
)


@api.exception_handler(Refused)
async def _say_refused(_: Request, refused: Refused) -> JSONResponse:
    headers = {"Retry-After": str(refused.retry_s)} if refused.retry_s else {}
    if refused.status == 408:
        headers["Connection"] = "close"  # else the rest of the slow upload would be waited for
    return JSONResponse(refused.body.model_dump(), refused.status, headers)


@api.exception_handler(RequestValidationError)
async def _say_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    detail = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
    refused = Refused(400, "bad_request", detail, cause=f"The request is not valid: {detail}.", remedy="Correct it.")
    return await _say_refused(request, refused)


@serve.deployment(name="Ingress", max_ongoing_requests=16, max_queued_requests=64, ray_actor_options={"num_cpus": 0.5})
@serve.ingress(api)
class Ingress:
    """HTTP, the checks of an upload, and its preprocessing. No model in here."""

    def __init__(self, args: dict[str, Any], classifier: DeploymentHandle) -> None:
        self.args, self.classifier = BuildArgs(**args), classifier
        bundle = open_bundle(self.args)
        self.bundle_id, self.labels, self.crop = bundle.id, list(bundle.labels), bundle.crop
        self.cap_bytes = min(self.args.max_upload_mb * MIB, self.crop.max_bytes)
        self.decoders = ThreadPoolExecutor(self.args.decode_threads, thread_name_prefix="decode")
        start_sandboxes(self.decoders, self.args.decode_threads)
        folder = importlib.resources.files("cluster.serve") / "page"
        self.page = {name: (folder / name).read_bytes() for name in _PAGE}

    @api.post("/v1/predict", responses={code: {"model": Refusal} for code in (400, 408, 413, 422, 500, 503)})
    async def predict(self, request: Request, name: Annotated[str, Query(max_length=255)] = "upload") -> Answer:
        """The faces of one video. The body is the file itself: `curl --data-binary @clip.mp4 URL`."""
        times = [time.perf_counter()]
        data = await read_body(
            request.stream(), request.headers.get("content-length"), self.cap_bytes, self.args.upload_s
        )
        times.append(time.perf_counter())
        try:
            tar = await asyncio.get_running_loop().run_in_executor(self.decoders, preprocess, data, name, self.crop)
        except Quarantined as why:
            raise unusable(why) from why
        times.append(time.perf_counter())
        faces = await self._classify(tar)
        times.append(time.perf_counter())
        upload, decode, model = (round(end - start, 4) for start, end in zip(times, times[1:], strict=False))
        seconds = Seconds(upload=upload, decode=decode, model=model)
        return Answer(bundle=self.bundle_id, labels=self.labels, faces=faces, seconds=seconds)

    async def _classify(self, tar: bytes) -> list[Any]:
        try:
            bundle_id, faces = await self.classifier.classify.remote(tar)
        except BackPressureError as error:
            raise busy("overloaded", "More requests wait than the service takes.") from error
        except RayServeException as error:
            raise busy("unavailable", "No classifier is up at the moment.") from error
        except RayError as error:  # its log has the traceback
            raise Refused(
                500, "failed", type(error).__name__, cause="The classifier failed.", remedy="Look at its log."
            ) from error
        if bundle_id != self.bundle_id:
            raise busy("updating", "Another bundle is being rolled out.")
        return list(faces)

    @api.get("/v1/health")
    async def health(self) -> Health:
        """Which bundle answers."""
        cap_mb = self.cap_bytes // MIB
        return Health(bundle=self.bundle_id, labels=self.labels, version=api.version, max_upload_mb=cap_mb)

    @api.get("/", include_in_schema=False)
    async def index(self) -> Response:
        """The page for people."""
        return self._file("index.html")

    @api.get("/page/app.js", include_in_schema=False)
    async def script(self) -> Response:
        """Of the page."""
        return self._file("app.js")

    @api.get("/page/style.css", include_in_schema=False)
    async def style(self) -> Response:
        """Of the page."""
        return self._file("style.css")

    def _file(self, name: str) -> Response:
        return Response(self.page[name], media_type=f"{_PAGE[name]}; charset=utf-8", headers=_PAGE_HEADERS)


@serve.deployment(
    name="Classifier",
    max_ongoing_requests=32,
    max_queued_requests=128,
    graceful_shutdown_wait_loop_s=0.5,
    max_constructor_retry_count=3,
    ray_actor_options={"num_cpus": 0.5},
)
class Classifier:
    """The model. Ready once a synthetic bag has passed through it."""

    def __init__(self, args: dict[str, Any]) -> None:
        device = "cuda" if ray.get_runtime_context().get_accelerator_ids().get("GPU") else "cpu"
        self.predictor = Predictor(open_bundle(BuildArgs(**args)), device)
        self.suspect = False
        self._test_model()

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.01)
    async def classify(self, tars: list[bytes]) -> list[tuple[str, list[dict[str, Any]]]]:
        """(bundle id, faces) of each video; the bags of all go through the model together."""
        return await asyncio.to_thread(self._classify, tars)

    def _classify(self, tars: list[bytes]) -> list[tuple[str, list[dict[str, Any]]]]:
        videos = [list(read_bags(tar, "an upload")) for tar in tars]
        try:
            faces = iter(self._faces([bag for bags in videos for bag in bags]))
        except Exception:
            self.suspect = True  # one request's bad luck, or a GPU that is gone: check_health finds out
            raise
        return [(self.predictor.bundle.id, [next(faces).to_dict() for _ in bags]) for bags in videos]

    def _faces(self, bags: list[Bag]) -> list[FacePrediction]:
        faces = self.predictor.classify(bags)
        if not all(math.isclose(sum(face.probabilities.values()), 1.0, abs_tol=1e-3) for face in faces):
            raise FloatingPointError("the model's probabilities do not sum to 1")
        return faces

    def _test_model(self) -> None:
        self._faces([synthetic_bag(self.predictor.bundle.crop)])

    def check_health(self) -> None:
        """Called by Ray Serve. After a failure the model must pass its test again, else the replica is replaced."""
        if self.suspect:
            self._test_model()
            self.suspect = False


def build(args: BuildArgs | dict[str, Any]) -> serve.Application:
    """The application for `serve deploy` and `serve run`. Raises pydantic.ValidationError for unknown args."""
    checked = BuildArgs.model_validate(args)
    values = checked.model_dump()
    ingress: Any = Ingress  # Deployments, which the decorators' types do not say
    classifier: Any = Classifier
    if checked.gpus:
        classifier = classifier.options(ray_actor_options={"num_cpus": 0.5, "num_gpus": checked.gpus})
    return ingress.bind(values, classifier.bind(values))


@contextlib.contextmanager
def run_server(
    bundle_url: str, host: str, port: int, say: Callable[[str], None], *, max_upload_mb: int = 100
) -> Iterator[str]:
    """Serve a bundle on the Ray that is up; yields the URL once it answers, stops Serve at the end.

    The model takes a GPU where the cluster has one. What can be known before Ray Serve starts is checked before.
    Raises MicaclError.
    """
    bundle = load_bundle(bundle_url)
    check_port(host, port)
    _refuse_second_serve()
    gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
    say(f"bundle {bundle.id}: {', '.join(bundle.labels)}; model on {'one GPU' if gpus else 'the CPU'}")
    args = BuildArgs(bundle=bundle_url, gpus=gpus, max_upload_mb=max_upload_mb)
    options = {"host": host, "port": port, "request_timeout_s": args.upload_s + bundle.crop.max_decode_s}
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        _start(args, options)
        wait_for_health(url := _url(host, port), 60)
        yield url
    finally:
        _stop()


def _start(args: BuildArgs, http_options: dict[str, Any]) -> None:
    """Start Ray Serve and wait until the application runs. Raises MicaclError."""
    try:
        serve.start(proxy_location="HeadOnly", http_options=http_options, logging_config={"log_level": "WARNING"})
        serve.run(build(args), name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        raise MicaclError(
            f"Ray Serve could not start the application ({_why_not(error)}).",
            "Nothing is served.",
            "The log of the replica, in logs/serve of Ray's session folder, says more.",
        ) from error


def _stop() -> None:
    """Stop Ray Serve. Its own `shutdown` alone ends in a line about a failed task, in red, though all went well."""
    if _serve_is_up():
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve").graceful_shutdown.remote(wait=False)
        end_s = time.monotonic() + 30
        while _serve_is_up() and time.monotonic() < end_s:
            time.sleep(0.1)
    serve.shutdown()


def _why_not(error: RuntimeError) -> str:
    """The last line of the traceback that a deployment reported, else of Serve's own error."""
    application = serve.status().applications.get(APPLICATION)
    reports = [deployment.message for deployment in application.deployments.values()] if application else []
    text = max(reports, key=len, default="") or str(error)
    return str(text.strip().splitlines()[-1].strip())


def _url(host: str, port: int) -> str:
    """Where this machine reaches the server."""
    here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  (compared with, not listened on)
    return f"http://[{here}]:{port}" if ":" in here else f"http://{here}:{port}"


def check_port(host: str, port: int) -> None:
    """Refuse a port that nothing can listen on now. Raises MicaclError."""
    nothing = "Nothing is served."
    if not 1 <= port <= 65535 or port in _RAY_PORTS:
        kept = f"{_RAY_PORTS.start} to {_RAY_PORTS.stop - 1} are Ray's own"
        raise MicaclError(
            f"--port {port} cannot be used ({kept}).", nothing, "Choose one from 1024 to 10001 or 20000 to 65535."
        )
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise MicaclError(
            f"Nothing can listen on --host {host} --port {port} ({error.strerror or error}).",
            nothing,
            "Choose another --port or --host, or end the program that has it.",
        ) from error


def _serve_is_up() -> bool:
    return any(actor["namespace"] == "serve" for actor in ray.util.list_named_actors(all_namespaces=True))


def _refuse_second_serve() -> None:
    """A cluster has one Ray Serve; ours would change its port and stop its applications. Raises MicaclError."""
    if _serve_is_up():
        raise MicaclError(
            "Ray Serve already runs on this cluster.",
            "Nothing was started: it has one HTTP port for all applications.",
            "Add the application to it: `serve deploy cluster/deploy/serve.yaml`.",
        )
