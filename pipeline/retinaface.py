"""The second opinion: RetinaFace (MobileNet-0.25, MIT) for clips in which YuNet follows nobody.

Some ten times dearer than YuNet and better at what YuNet misses: faces that lie on their side, in the dark, or fill the
frame. Its weights and their origin lie in pipeline/weights. The outputs are read as the network's authors do it: two
anchors a cell at strides 8, 16, 32, offsets scaled by 0.1, log sizes by 0.2.
"""

from __future__ import annotations

import functools
import importlib.resources

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from pipeline.contract import CropConfig, MicaclError, digest
from pipeline.detector import Face, best_faces, net_input, open_session

RETINAFACE_SHA256 = "b7a7acab55e104dce6f32cdfff929bd83946da5cd869b9e2e9bdffafd1b7e4a5"
_ANCHORS = ((8, (16, 32)), (16, (64, 128)), (32, (256, 512)))
_MEAN_BGR = (104.0, 117.0, 123.0)
_LEAST_SCORE = 0.8
"""Its scores are nearer to 1 than YuNet's; below this it sees faces where none are."""


def retinaface_weights() -> bytes:
    """The ONNX file. Raises MicaclError if it is another one."""
    data = (importlib.resources.files("pipeline") / "weights" / "retinaface_mobilenet025.onnx").read_bytes()
    if digest(data) != RETINAFACE_SHA256:
        raise MicaclError(
            f"pipeline/weights/retinaface_mobilenet025.onnx has sha256 {digest(data)}.",
            "Crops would differ from all others.",
            "Install micacl again.",
        )
    return data


@functools.lru_cache(maxsize=1)
def _session() -> onnxruntime.InferenceSession:
    return open_session(retinaface_weights())


def detect(rgb_HWC: NDArray[np.uint8], config: CropConfig, least_score: float | None = None) -> list[Face]:
    """Faces in a frame, best score first. Boxes are in pixels of `rgb_HWC`.

    Args:
        least_score: of a face; default 0.8, or `config.detect_score` if that is more.
    """
    least = max(_LEAST_SCORE, config.detect_score) if least_score is None else least_score
    blob_1CHW, scale = net_input(rgb_HWC, config.detect_side, _MEAN_BGR)
    loc, conf, points = _session().run(None, {"input": blob_1CHW})
    anchors = _anchors(*blob_1CHW.shape[2:])
    scores = conf[0, :, 1]
    at = np.flatnonzero(scores >= least)
    anchor, offset = anchors[at], loc[0, at]
    centre, extent = anchor[:, :2] + offset[:, :2] * 0.1 * anchor[:, 2:], anchor[:, 2:] * np.exp(offset[:, 2:] * 0.2)
    marks = anchor[:, None, :2] + points[0, at].reshape(-1, 5, 2) * 0.1 * anchor[:, None, 2:]
    boxes = np.concatenate([centre - extent / 2, extent], 1)
    return best_faces(boxes, scores[at], marks.reshape(-1, 10), scale)


@functools.lru_cache(maxsize=8)
def _anchors(height: int, width: int) -> NDArray[np.float32]:
    """(n, 4): centre x, y and sides of every anchor, pixels, in the order of the outputs."""
    out = []
    for stride, sides in _ANCHORS:
        rows, columns = np.mgrid[: -(-height // stride), : -(-width // stride)]
        centres = (np.stack([columns.ravel(), rows.ravel()], 1) + 0.5) * stride
        for_each = np.repeat(centres, len(sides), axis=0)
        sizes = np.tile(np.array(sides, np.float32)[:, None], (len(centres), 2))
        out.append(np.concatenate([for_each, sizes], 1))
    return np.concatenate(out).astype(np.float32)
