"""What crosses the wire: settings in, answers and refusals out.

Every refusal has one shape, `{"error": {"reason", "detail", "cause", "consequence", "remedy"}}`, whatever refused: the
size, the upload, the video or the load. A reason of a video is a `pipeline.contract.Reason`.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.contract import Quarantined, Reason

MIB: Final = 2**20


class BuildArgs(BaseModel):
    """Settings of the application: `args` in cluster/deploy/serve.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bundle: str = Field(min_length=1)
    """URL of the bundle, readable from every machine of the cluster."""
    faces: Literal["all", "largest"] = "all"
    """Which faces of a video are answered."""
    max_upload_mb: int = Field(default=100, ge=1)
    """Largest body, MiB. The bundle's `crop.max_bytes` holds as well."""
    upload_s: float = Field(default=60.0, gt=0)
    """Seconds that an upload may take."""
    decode_threads: int = Field(default=2, ge=1)
    """Videos that one Ingress replica decodes at the same time."""
    gpus: float = Field(default=0, ge=0)
    """Of a Classifier replica; `ray_actor_options` in serve.yaml goes before it. The model runs where Ray lends one."""


class Face(BaseModel):
    """One face; the fields of micacl.predictor.FacePrediction."""

    track: int
    label: str
    probabilities: dict[str, float]
    seconds: float
    detector_score: float
    box: tuple[float, float, float]
    instance_weights: list[float]


class Seconds(BaseModel):
    """Where the time of a request went."""

    upload: float
    """Reading the body."""
    decode: float
    """Decoding, face search, cropping; with the wait for a free thread."""
    model: float
    """The classifier, with the wait for its batch."""


class Answer(BaseModel):
    """200 of POST /v1/predict."""

    bundle: str
    """Id of the bundle that answered."""
    labels: list[str]
    faces: list[Face]
    """Largest face first."""
    seconds: Seconds


class Health(BaseModel):
    """200 of GET /v1/health."""

    bundle: str
    labels: list[str]
    version: str
    max_upload_mb: int


class Problem(BaseModel):
    """Why there is no answer."""

    reason: str
    """A word for programs."""
    detail: str
    cause: str
    consequence: str
    remedy: str


class Refusal(BaseModel):
    """Body of every 4xx and 5xx that this application makes itself."""

    error: Problem


class Refused(Exception):
    """Ends a request with a status and a Problem."""

    def __init__(self, status: int, reason: str, detail: str, *, cause: str, remedy: str, retry_s: int = 0) -> None:
        super().__init__(status, reason, detail)
        self.status, self.retry_s = status, retry_s
        self.body = Refusal(
            error=Problem(
                reason=reason, detail=detail, cause=cause, consequence="Nothing was predicted.", remedy=remedy
            )
        )


_OTHER: Final = "Convert it, e.g. `ffmpeg -i IN -c:v libx264 OUT.mp4`, and send that."
_REMEDIES: Final = MappingProxyType(
    {
        Reason.TOO_MANY_BYTES: "Send a smaller file, or a shorter part of it.",
        Reason.NO_VIDEO_STREAM: "Send a file that has pictures; this one has sound at most.",
        Reason.TOO_MANY_PIXELS: "Scale it down, e.g. `ffmpeg -i IN -vf scale=1280:-2 OUT.mp4`.",
        Reason.TOO_LONG: "Cut out the part you ask about, e.g. `ffmpeg -ss 10 -t 20 -i IN OUT.mp4`.",
        Reason.TOO_SLOW: "Send a shorter or smaller video.",
        Reason.TOO_SHORT: "Send a longer clip.",
        Reason.NO_FACE: "Send a clip in which one face is seen for a while, from the front and not too small.",
    }
)


def unusable(why: Quarantined) -> Refused:
    """422 for a video that preprocessing cannot use."""
    cause = f"The video cannot be used: {why.detail}."
    return Refused(422, why.reason.value, why.detail, cause=cause, remedy=_REMEDIES.get(why.reason, _OTHER))


def too_large(found: str, cap_bytes: int) -> Refused:
    """413. `found` says how much was seen."""
    detail = f"{found}, the cap is {cap_bytes} bytes"
    cause = f"The upload is larger than {cap_bytes / MIB:g} MiB."
    remedy = "Send a shorter or smaller video; who runs the service can raise `max_upload_mb`."
    return Refused(413, "too_large", detail, cause=cause, remedy=remedy)


def busy(reason: str, cause: str) -> Refused:
    """503: the same request may succeed later."""
    return Refused(503, reason, "", cause=cause, remedy="Send it again in a few seconds.", retry_s=3)
