"""Videos -> probabilities: the one place that does it. Batch, online and tests call this and nothing else.

    bytes ──pipeline.bags.video_to_bags──> bags (encoded, as in a shard) ──decode, eval transform──> model ──> softmax

The bags pass through the codec exactly as training's did, so that a model meets the pixels it was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from micacl.batch import Batch, collate, to_input
from micacl.bundle import Bundle
from micacl.model.micacl import Output
from pipeline.bags import Bag, video_to_bags
from pipeline.contract import Video
from pipeline.loader import batch_of_bags
from pipeline.raw import RawClip

_CLIPS_PER_FORWARD = 16


@dataclass(frozen=True, slots=True)
class FacePrediction:
    """One face of one video."""

    track: int
    """0 is the largest face."""
    label: str
    probabilities: dict[str, float]
    seconds: float
    """Length of the track."""
    detector_score: float
    box: tuple[float, float, float]
    """Of the first instance: centre x, centre y, side; source pixels."""
    instance_weights: tuple[float, ...]
    """WIAN's share of each instance."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "track": self.track,
            "label": self.label,
            "probabilities": {k: round(v, 6) for k, v in self.probabilities.items()},
            "seconds": self.seconds,
            "detector_score": self.detector_score,
            "box": list(self.box),
            "instance_weights": [round(w, 4) for w in self.instance_weights],
        }


class Predictor:
    """A bundle on a device."""

    def __init__(self, bundle: Bundle, device: str = "cpu") -> None:
        self.bundle = bundle
        self.device = torch.device(device)
        self.model = bundle.build().to(self.device)

    def bags(self, data: bytes | RawClip, name: str) -> list[Bag]:
        """Preprocess one clip in this process; plain bytes are a whole video. Raises Quarantined with the Reason."""
        bags, _ = video_to_bags(data, name=name, video_id=Video(url=name, name=name).id, config=self.bundle.crop)
        return bags

    def classify(self, bags: Sequence[Bag]) -> list[FacePrediction]:
        """One prediction a bag, in order."""
        out: list[FacePrediction] = []
        for start in range(0, len(bags), _CLIPS_PER_FORWARD):
            part = bags[start : start + _CLIPS_PER_FORWARD]
            batch = collate(batch_of_bags(part, self.bundle.config.stream), self.bundle.config.batch, train=False)
            probabilities, weights = forward(self.model, batch, self.device, self.bundle.temperature)
            out += [self._face(bag, p, w) for bag, p, w in zip(part, probabilities, weights, strict=True)]
        return out

    def predict(self, data: bytes | RawClip, name: str) -> list[FacePrediction]:
        """Every face of one clip. Raises Quarantined with the Reason."""
        return self.classify(self.bags(data, name))

    def _face(self, bag: Bag, p_K: NDArray[np.float32], w_N: NDArray[np.float32]) -> FacePrediction:
        labels, meta = self.bundle.labels, bag.meta
        return FacePrediction(
            track=meta.track,
            label=labels[int(p_K.argmax())],
            probabilities={label: float(p) for label, p in zip(labels, p_K, strict=True)},
            seconds=meta.seconds,
            detector_score=meta.detector_score,
            box=meta.boxes[0],
            instance_weights=tuple(float(w) for w in w_N),
        )


@torch.inference_mode()
def output_of(model: Callable[[Tensor], Output], batch: Batch, device: torch.device) -> Output:
    """All that the model says about one batch."""
    return model(to_input(batch, device))


def forward(
    model: Callable[[Tensor], Output], batch: Batch, device: torch.device, temperature: float = 1.0
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(probabilities_BK, instance weights_BN) of one batch, on the CPU."""
    output = output_of(model, batch, device)
    probabilities_BK = (output.logits_BK.float() / temperature).softmax(-1).cpu().numpy()
    return probabilities_BK, output.weights_BN.float().cpu().numpy()
