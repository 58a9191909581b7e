"""A weight file from elsewhere -> the backbone of a new model, or a refusal that says what does not fit.

Files: torch's (`.pth`, `.pt`, `.bin`; read with `weights_only`, so that no code in them runs) or safetensors, told
apart by their content. From wherever the storage layer opens: a path, s3://..., https://...

The names in the file are those of the publisher: torchvision's for the ResNets, transformers' for VideoMAE. They may
stand below a prefix that all encoder tensors share (`module.`, `model.`, `videomae.`, `backbone.`; it is found, not
listed), and inside a dict `state_dict`, `model` or `module`. Left aside: classification layers, a VideoMAE's decoder
and the norm before it (fine-tuning has one of its own, after the mean), and everything outside the prefix. Every tensor
of the backbone must then be there in its shape; only batch counters and VideoMAE's last norm may be missing, and no
tensor may be left over. A training run calls this once, before its first step; a checkpoint or a bundle has all weights
itself and never comes here.
"""

from __future__ import annotations

import io
import pickle
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from micacl.model.backbone import Backbone, BackboneConfig, build_backbone
from pipeline.contract import MicaclError, digest
from pipeline.storage import open_store, split_url

_ASIDE = re.compile(r"fc\.|classifier\.|layernorm\.|decoder\.|encoder_to_decoder\.|mask_token$|.*position_embeddings$")
_MAY_MISS = re.compile(r".*num_batches_tracked$|norm\.(weight|bias)$")
_VIDEOMAE_NAMES = (
    (re.compile(r"attention\.attention\.q_bias$"), "attention.attention.query.bias"),
    (re.compile(r"attention\.attention\.v_bias$"), "attention.attention.value.bias"),
    (re.compile(r"^fc_norm\."), "norm."),
)
"""From earlier releases of transformers, and from its classification model, to what micacl.model.videomae has."""
_CONTAINERS = ("state_dict", "model", "module")
_SHOWN = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightReport:
    """What of a weight file went where, in the backbone's names."""

    url: str
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    """In the backbone, not in the file."""
    unexpected: tuple[str, ...]
    """In the file, not in the backbone."""
    aside: tuple[str, ...]
    """In the file and known not to be of the encoder, such as fc.weight."""
    other_shapes: tuple[str, ...]
    """In both: `name: (file's shape), wanted (backbone's)`."""

    @property
    def fits(self) -> bool:
        """Nothing that matters is missing, left over or of another shape."""
        missing = [name for name in self.missing if not _MAY_MISS.fullmatch(name)]
        return bool(self.matched) and not (missing or self.unexpected or self.other_shapes)

    def to_text(self) -> str:
        """One line a kind of finding, for people."""
        lines = [f"weights {self.url}: {len(self.matched)} tensors of the backbone matched"]
        for what, names in (
            ("missing in the file", self.missing),
            ("unknown to the backbone", self.unexpected),
            ("of another shape", self.other_shapes),
            ("left aside", self.aside),
        ):
            if names:
                more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                lines.append(f"  {len(names)} {what}: {', '.join(names[:_SHOWN])}{more}")
        return "\n".join(lines)


def load_encoder_weights(backbone: Backbone, url: str, sha256: str = "") -> WeightReport:
    """Load the file into the backbone. Raises MicaclError, and changes nothing, when it does not fit."""
    tensors, report = _fitting(backbone, url, sha256)
    backbone.load_state_dict(tensors, strict=False)
    return report


def check_encoder_weights(config: BackboneConfig) -> WeightReport | None:
    """Read the config's weight file and compare, without building a network. Raises MicaclError; None: none named."""
    if not config.weights:
        return None
    with torch.device("meta"):
        backbone = build_backbone(config)
    return _fitting(backbone, config.weights, config.weights_sha256)[1]


def begin_with_weights(backbone: Backbone) -> WeightReport | None:
    """Load the file that the backbone's config names, if it names one. Raises MicaclError."""
    config = backbone.config
    return load_encoder_weights(backbone, config.weights, config.weights_sha256) if config.weights else None


def compare(backbone: Backbone, tensors: Mapping[str, Tensor], url: str) -> tuple[dict[str, Tensor], WeightReport]:
    """(the tensors that fit, in the backbone's names; what was found). Loads nothing."""
    own = backbone.state_dict()
    given, aside = _in_our_names(tensors, own)
    matched = {n: t for n, t in given.items() if n in own and t.shape == own[n].shape}
    odd = [n for n in given if n in own and n not in matched]
    shapes = (f"{n}: {tuple(given[n].shape)}, wanted {tuple(own[n].shape)}" for n in sorted(odd))
    return matched, WeightReport(
        url=url,
        matched=tuple(sorted(matched)),
        missing=tuple(sorted(own.keys() - given.keys())),
        unexpected=tuple(sorted(given.keys() - own.keys())),
        aside=tuple(sorted(aside)),
        other_shapes=tuple(shapes),
    )


def _fitting(backbone: Backbone, url: str, sha256: str) -> tuple[dict[str, Tensor], WeightReport]:
    tensors, report = compare(backbone, read_tensors(url, sha256), url)
    if not report.fits:
        raise MicaclError(
            f"The weights do not fit the backbone {backbone.config.name}.\n{report.to_text()}",
            "No weight was loaded.",
            "Use the file of the same network: for torchvision's files --model.backbone.name r3d_18, mc3_18 or "
            "r2plus1d_18 with width 64 and norm batch; for VideoMAE the sizes of its config.json.",
        )
    return tensors, report


def _in_our_names(tensors: Mapping[str, Tensor], own: Iterable[str]) -> tuple[dict[str, Tensor], list[str]]:
    """(tensors below the encoder's prefix, renamed; the names of the others)."""
    prefix = _prefix(tensors, set(own))
    given, aside = {}, []
    for full, tensor in tensors.items():
        name = full.removeprefix(prefix)
        below = full.startswith(prefix) or name.startswith("fc_norm.")  # the last norm stands beside the encoder
        for old, new in _VIDEOMAE_NAMES:
            name = old.sub(new, name)
        if below and not _ASIDE.match(name):
            given[name] = tensor
        else:
            aside.append(full)
    return given, aside


def _prefix(names: Iterable[str], own: set[str]) -> str:
    """What stands before the backbone's names in most of the names that end with one; the shortest if several do."""
    votes: Counter[str] = Counter()
    for full in names:
        parts = full.split(".")
        tails = (".".join(parts[i:]) for i in range(len(parts)))
        votes.update(full.removesuffix(tail) for tail in tails if tail in own)
    return min(votes, key=lambda prefix: (-votes[prefix], len(prefix)), default="")


def read_tensors(url: str, sha256: str = "") -> dict[str, Tensor]:
    """The tensors of a weight file by name, on the CPU. Raises MicaclError.

    Refused: no such file, another hash, code in a pickle, something that is no state dict, tensors that are not plain
    or are larger than the file, numbers that are not finite.
    """
    root, key = split_url(url)
    store = open_store(root)
    store.check()
    try:
        data = store.get(key)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise _refused(url, "is not there", "Correct --model.backbone.weights.") from error
    found = digest(data)
    if not found.startswith(sha256):
        raise _refused(
            url, f"has the sha256 {found}, not {sha256}", "Fetch it again, or correct --model.backbone.weights-sha256."
        )
    tensors = _parsed(data, url)
    odd = [name for name, t in tensors.items() if not _is_plain(t, len(data))]
    if odd:
        raise _refused(url, f"has in {odd[0]!r} no plain tensor of real numbers", "Save it dense and dequantised.")
    bad = [name for name, t in tensors.items() if not torch.isfinite(t).all()]
    if bad:
        raise _refused(url, f"has numbers that are not finite in {bad[0]!r}", "Use another file.")
    return tensors


def _is_plain(tensor: Tensor, most_bytes: int) -> bool:
    """Dense real numbers, each of which the file holds: a repeated one (stride 0) can stand for terabytes."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested or tensor.device.type != "cpu":
        return False
    return not tensor.is_complex() and tensor.numel() * tensor.element_size() <= most_bytes


def _parsed(data: bytes, url: str) -> dict[str, Tensor]:
    remedy = "Use a state dict that torch.save or safetensors wrote."
    try:
        loaded = _unpickled(data) if data[8:9] != b"{" else safetensors.torch.load(data)
    except pickle.UnpicklingError as error:
        raise _refused(url, "holds more than tensors, or is damaged", f"No code of it was run. {remedy}") from error
    except Exception as error:  # bytes that are not its own make torch.load raise whatever its parser meets
        raise _refused(url, f"cannot be read as tensors ({type(error).__name__})", remedy) from error
    if not isinstance(loaded, Mapping) or not loaded:
        raise _refused(url, "is no state dict: no names with tensors", remedy)
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in loaded.items()):
        raise _refused(url, "is no state dict: not all of it is names with tensors", remedy)
    return dict(loaded)


def _unpickled(data: bytes) -> Any:
    """What is in the file, out of the dicts that trainers put around it."""
    loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    for name in _CONTAINERS * 2:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping):
            loaded = loaded[name]
    return loaded


def _refused(url: str, what: str, remedy: str) -> MicaclError:
    return MicaclError(f"The weight file {url} {what}.", "No weight was loaded.", remedy)
