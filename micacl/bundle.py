"""What inference needs, in one folder; the only thing that predict and serve load.

<bundle>/model.safetensors   weights
<bundle>/bundle.json         config, labels, preprocessing, where it came from; put last, names the weights' hash

The weights are those of training. What is changed of the classifier afterwards (micacl.posthoc) stands in bundle.json,
and `Bundle.build` does it: for predict, serve and evaluate alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from micacl.config import RunConfig, from_dict, to_dict
from micacl.model.micacl import MICACL, build_model
from micacl.posthoc import PostHoc, apply, posthoc_of
from micacl.train.checkpoint import Checkpoint, load_tensors, read_checkpoint
from pipeline.contract import (
    SCHEMA_VERSION,
    CropConfig,
    MicaclError,
    canonical_json,
    digest,
    expecting,
    json_object,
    require_schema,
)
from pipeline.storage import Store, open_store

BUNDLE = "bundle.json"
WEIGHTS = "model.safetensors"
_RUN = "config.json"
"""What every run has and no bundle."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A model ready for inference."""

    url: str
    config: RunConfig
    crop: CropConfig
    """How raw videos become bags: the same as in training."""
    weights: Mapping[str, Tensor]
    origin: Mapping[str, Any]
    """`run`, `step`, `dataset`: where it came from."""
    id: str
    """12 hex digits of bundle.json's sha256; stands in every prediction."""
    posthoc: PostHoc = field(default_factory=PostHoc)
    """What `build` changes of the classifier."""
    class_counts: Mapping[str, Any] = field(default_factory=dict)
    """Clips of each class of training: `dataset` as there were, `seen` as drawn."""
    temperature: float = 1.0
    """Class scores are divided by it before the softmax; 1 leaves them (micacl.calibration)."""

    @property
    def labels(self) -> tuple[str, ...]:
        return self.config.model.classes

    def build(self) -> MICACL:
        """The model in evaluation mode, weights loaded strictly, classifier changed as `posthoc` says."""
        model = build_model(self.config.model, seed=0)
        model.load_state_dict(dict(self.weights), strict=True)
        return apply(model, self.posthoc).eval()

    def changed(self, tau_norm: float, adjust: float) -> Bundle:
        """The same with these changes of the classifier instead of its own. Raises MicaclError."""
        posthoc = posthoc_of(tau_norm, adjust, self.config.loss.name, self.class_counts)
        name = digest(canonical_json({"bundle": self.id, "posthoc": dataclasses.asdict(posthoc)}).encode())[:12]
        return dataclasses.replace(self, posthoc=posthoc, id=name)


def crop_from(values: Mapping[str, Any]) -> CropConfig:
    """The preprocessing that a version or a bundle names; its hash must be what we compute. Raises MicaclError."""
    config: CropConfig = from_dict(CropConfig, {k: v for k, v in values.items() if k != "hash"}, "crop")
    if values.get("hash") != config.hash:
        raise MicaclError(
            f"The preprocessing has the hash {values.get('hash')!r}, this release computes {config.hash!r}.",
            "Crops would not be the ones that the model was trained on.",
            "Use the release that wrote it.",
        )
    return config


def export_bundle(
    run_url: str,
    bundle_url: str,
    step: int | None = None,
    *,
    temperature: float = 1.0,
    tau_norm: float = 0.0,
    adjust: float = 0.0,
) -> Bundle:
    """Checkpoint -> bundle, the newest by default. Raises MicaclError if there is none, or it cannot be changed so."""
    run = open_store(run_url)
    checkpoint = read_checkpoint(run, step)
    changed = as_bundle(checkpoint, run).changed(tau_norm, adjust)
    if changed.posthoc:
        changed.build()  # refuses what this model cannot be given
    store = open_store(bundle_url)
    store.check()
    if store.exists(_RUN):
        raise MicaclError(
            f"{bundle_url} is a run.",
            "No bundle was written: what reads that folder would take the bundle for all of the run's checkpoints.",
            f"Give another folder, such as {bundle_url.rstrip('/')}-bundle.",
        )
    weights = safetensors.torch.save(dict(checkpoint.weights))
    body = {
        "schema": SCHEMA_VERSION,
        "config": checkpoint.state["config"],
        "crop": checkpoint.state["crop"],
        "weights": {"path": WEIGHTS, "bytes": len(weights), "sha256": digest(weights)},
        "temperature": temperature,
        "origin": {"run": run_url, "step": checkpoint.step, "dataset": checkpoint.state["dataset"]},
        "class_counts": dict(changed.class_counts),
        "posthoc": dataclasses.asdict(changed.posthoc),
    }
    store.put(WEIGHTS, weights)
    store.put(BUNDLE, canonical_json(body).encode())
    return load_bundle(bundle_url)


def load_bundle(url: str) -> Bundle:
    """Open and check a bundle. Raises MicaclError: no bundle, another schema, other weights than listed."""
    store = open_store(url)
    store.check()
    try:
        data = store.get(BUNDLE)
    except FileNotFoundError as error:
        raise MicaclError(
            f"{url} has no {BUNDLE}.", "It is no bundle.", "Make one: `micacl export RUN BUNDLE`."
        ) from error
    where = store.url(BUNDLE)
    body = json_object(data, where)
    require_schema(body.get("schema"), where)
    with expecting(where):
        weights = _weights(store, body["weights"]["sha256"])
        bundle = Bundle(
            url=url,
            config=from_dict(RunConfig, body["config"]),
            crop=crop_from(body["crop"]),
            weights=load_tensors(weights, store.url(WEIGHTS)),
            origin=dict(body["origin"]),
            id=digest(data)[:12],
            posthoc=from_dict(PostHoc, body.get("posthoc", dataclasses.asdict(PostHoc())), "posthoc"),
            class_counts=dict(body.get("class_counts", {})),
            temperature=float(body.get("temperature", 1.0)),
        )
    _require_fit(bundle)
    return bundle


def _weights(store: Store, sha256: str) -> bytes:
    try:
        weights = store.get(WEIGHTS)
    except FileNotFoundError:
        weights = b""
    if digest(weights) != sha256:
        raise MicaclError(
            f"{store.url(WEIGHTS)} is missing or not the file that {BUNDLE} lists.",
            "A model of unknown weights is not used.",
            "Export it again: `micacl export RUN BUNDLE`.",
        )
    return weights


def _require_fit(bundle: Bundle) -> None:
    """The weights are those of the model that the config describes, name by name. Raises MicaclError."""
    with torch.device("meta"):
        wanted = {name: tuple(t.shape) for name, t in MICACL(bundle.config.model).state_dict().items()}
    found = {name: tuple(t.shape) for name, t in bundle.weights.items()}
    odd = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
    if odd:
        raise MicaclError(
            f"{bundle.url}: {len(odd)} weights do not fit the config, first {odd[0]}: "
            f"{found.get(odd[0])}, wanted {wanted.get(odd[0])}.",
            "The model cannot be built.",
            "Export it again: `micacl export RUN BUNDLE`.",
        )


def load_model(url: str, step: int | None = None) -> Bundle:
    """A bundle, or a run's checkpoint as if it were exported. For evaluation."""
    store = open_store(url)
    store.check()
    if store.exists(BUNDLE):
        bundle = load_bundle(url)
        if step not in (None, bundle.origin["step"]):
            raise MicaclError(
                f"{url} is the bundle of step {bundle.origin['step']}, not {step}.",
                "Another checkpoint's numbers would stand under that name.",
                "Name the run, or take bundle.json and model.safetensors out of its folder.",
            )
        return bundle
    checkpoint = read_checkpoint(store, step)
    return as_bundle(checkpoint, store)


def as_bundle(checkpoint: Checkpoint, store: Store) -> Bundle:
    """A checkpoint as a bundle in memory."""
    origin = {"run": store.root, "step": checkpoint.step, "dataset": checkpoint.state["dataset"]}
    return Bundle(
        url=store.root,
        config=from_dict(RunConfig, checkpoint.state["config"]),
        crop=crop_from(checkpoint.state["crop"]),
        weights=checkpoint.weights,
        origin=origin,
        id=digest(canonical_json(origin).encode())[:12],
        class_counts=dict(checkpoint.state.get("class_counts", {})),
    )


def run_state(
    config: RunConfig,
    crop: Mapping[str, Any],
    dataset: Mapping[str, Any],
    plan: Any,
    class_counts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The JSON state that a checkpoint carries, so that it can be continued and exported by itself.

    `class_counts`: clips of each class, `dataset` as there are and `seen` as the plan of that epoch draws them.
    """
    return {
        "config": to_dict(config),
        "crop": dict(crop),
        "dataset": dict(dataset),
        "plan": dataclasses.asdict(plan),
        **({"class_counts": dict(class_counts)} if class_counts else {}),
    }
