"""A recipe is a function that returns a complete RunConfig. `micacl train NAME` starts from it; flags change it.

    micacl train tiny-cpu ...                  a recipe
    micacl train tiny-cpu+baseline ...         the same with a change; changes are applied from left to right
    micacl crossval dfew+ablation ...          a set: one recipe for each of its changes, one table

A change is a function too, RunConfig -> RunConfig, and touches only what it is named after, so that two recipes of a
set differ in nothing else. None of them is the paper's: its settings are unknown to us (docs/model.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from micacl.batch import BatchConfig
from micacl.config import RunConfig, TrainConfig
from micacl.loss.config import LossConfig
from micacl.model.backbone import BackboneConfig
from micacl.model.geiim import GEIIMConfig
from micacl.model.micacl import ModelConfig
from micacl.model.wian import WIANConfig
from pipeline.contract import MicaclError
from pipeline.plan import PlanConfig
from pipeline.stream import StreamConfig

Change = Callable[[RunConfig], RunConfig]

_COSINE_SCALE = 30.0
"""Of LDAM's cosine head; its margin of 0.5 is in cosines, the loss takes it in logits."""


def tiny_cpu() -> RunConfig:
    """R3D-18's shape with 16 channels at 48 px: a minute on two cores. For the demo and the tests (docs/lab.md)."""
    return RunConfig(
        model=ModelConfig(backbone=BackboneConfig.tiny(), projection_dim=32),
        plan=PlanConfig(policy="uniform", global_batch=16),
        stream=StreamConfig(frames=4),
        batch=BatchConfig(side=48, crop_share=0.9, jitter=0.1),
        train=TrainConfig(epochs=30, lr=1e-3, min_lr=2e-5, checkpoint_every=50, log_every=10),
    )


def dfew() -> RunConfig:
    """MICACL on DFEW, after M3DFEL's shape: 4 instances x 4 frames, 112 px, R3D-18. Give --train.fold 1 to 5, and
    --model.backbone.weights with torchvision's Kinetics-400 file. For GPUs; not run on DFEW by us, which is gated.
    """
    return RunConfig(
        plan=PlanConfig(policy="uniform", global_batch=256),
        stream=StreamConfig(frames=4, lookahead=256, processes=8),
        batch=BatchConfig(crop_share=0.5, crop_ratio=4 / 3, jitter=0.4, saturation=0.4, hue=0.1),
        train=TrainConfig(epochs=100, lr=5e-4, log_every=20),
    )


def ferv39k() -> RunConfig:
    """MICACL on FERV39k: as `dfew`, with half the epochs, for 2.5 times the clips and one split. Not run by us."""
    config = dfew()
    return replace(config, train=replace(config.train, epochs=50))


def m3dfel() -> RunConfig:
    """The baseline that MICACL is likely built on, as M3DFEL's released code has it (CVPR 2023, docs/model.md):
    DLIAM over R3D-18, cross entropy with smoothing 0.1, no re-balancing, its augmentation and its frame sampler, no
    colour normalisation, no clipping. Weight decay leaves out norms and biases, which that code decays too.
    """
    return RunConfig(
        model=ModelConfig(geiim=GEIIMConfig(enabled=False), wian=WIANConfig(kind="dliam"), projection_dim=0),
        loss=LossConfig(mccl=False),
        plan=PlanConfig(policy="natural", global_batch=256),
        stream=StreamConfig(frames=4, sampler="m3dfel", lookahead=256, processes=8),
        batch=BatchConfig(
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            crop_share=0.08,
            crop_ratio=4 / 3,
            jitter=0.4,
            saturation=0.4,
            hue=0.4,
        ),
        train=TrainConfig(epochs=300, lr=5e-4, min_lr=5e-6, warmup_share=20 / 300, clip_norm=1e12, log_every=20),
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {
    "tiny-cpu": tiny_cpu,
    "dfew": dfew,
    "ferv39k": ferv39k,
    "m3dfel": m3dfel,
}


def baseline(config: RunConfig) -> RunConfig:
    """Without MICACL's parts: a mean over instances."""
    model = replace(
        config.model,
        geiim=GEIIMConfig(enabled=False),
        wian=WIANConfig(kind="mean"),
        projection_dim=0,
        prototypes="none",
    )
    return replace(config, model=model, loss=replace(config.loss, mccl=False))


def _with_part(name: str) -> Change:
    """`baseline` and one part as the recipe has it; at its defaults if the recipe does without."""

    def change(config: RunConfig) -> RunConfig:
        plain, whole = baseline(config), everything(config)
        if name == "mccl":
            return _with_mccl(plain, whole)
        return replace(plain, model=replace(plain.model, **{name: getattr(whole.model, name)}))

    change.__doc__ = f"`baseline`, and {name.upper()} as the recipe has it."
    return change


def _with_mccl(config: RunConfig, like: RunConfig) -> RunConfig:
    """MCCL as `like` has it; of the loss nothing else changes."""
    model = replace(config.model, projection_dim=like.model.projection_dim, prototypes=like.model.prototypes)
    return replace(config, model=model, loss=replace(config.loss, mccl=True))


def _long_tail(policy: str, **loss: Any) -> Change:
    """Another plan and classification loss, without MCCL; the model stays."""

    def change(config: RunConfig) -> RunConfig:
        model = replace(config.model, projection_dim=0, prototypes="none")
        settings = {"label_smoothing": 0.0, "mccl": False, **loss}
        plan = replace(config.plan, policy=policy)
        return replace(config, model=model, plan=plan, loss=replace(config.loss, **settings))

    change.__doc__ = f"The plan {policy}, the loss {loss or 'cross entropy'}, without MCCL."
    return change


def ldam_drw(config: RunConfig) -> RunConfig:
    """LDAM on a cosine head, clips weighted by class over the last fifth of the epochs (Cao et al., NeurIPS 2019)."""
    config = _long_tail("natural", name="ldam", ldam_margin=0.5 * _COSINE_SCALE, drw_from=0.8)(config)
    # The margin is half the scale, which therefore must not be learned.
    model = replace(config.model, head="cosine", cosine_scale=_COSINE_SCALE, cosine_learned=False)
    return replace(config, model=model)


def crt(config: RunConfig) -> RunConfig:
    """Decoupled training (Kang et al., ICLR 2020): the data as it is, then the classifier anew on level classes."""
    config = _long_tail("natural")(config)
    switch = max(1, round(0.8 * config.train.epochs))
    plan = replace(config.plan, then="uniform", then_from=switch)
    return replace(config, plan=plan, train=replace(config.train, retrain_head_from=switch))


def _mccl_with(policy: str, **loss: Any) -> Change:
    """MCCL as the recipe has it, beside another plan or classification loss."""

    def change(config: RunConfig) -> RunConfig:
        return _with_mccl(_long_tail(policy, **loss)(config), everything(config))

    change.__doc__ = f"MCCL, with the plan {policy} and {loss or 'cross entropy'}."
    return change


def everything(config: RunConfig) -> RunConfig:
    """All parts as the recipe has them; at their defaults those that it does without."""
    model, plain = config.model, ModelConfig()
    changed = replace(
        model,
        geiim=model.geiim if model.geiim.enabled else plain.geiim,
        wian=plain.wian if model.wian.kind == "mean" else model.wian,
        projection_dim=model.projection_dim or plain.projection_dim,
    )
    return replace(config, model=changed, loss=replace(config.loss, mccl=True))


PARTS: dict[str, Change] = {
    "baseline": baseline,
    "geiim": _with_part("geiim"),
    "wian": _with_part("wian"),
    "mccl": _with_part("mccl"),
    "all": everything,
}
LONG_TAIL: dict[str, Change] = {
    "cross-entropy": _long_tail("natural"),
    "label-smoothing": _long_tail("natural", label_smoothing=0.1),
    "oversampling": _long_tail("uniform"),
    "cb-focal": _long_tail("natural", name="cb_focal"),
    "balanced-softmax": _long_tail("natural", name="balanced_softmax"),
    "ldam-drw": ldam_drw,
    "crt": crt,
    "mccl-natural": _mccl_with("natural"),
    "mccl-oversampling": _mccl_with("uniform"),
    "mccl-balanced-softmax": _mccl_with("natural", name="balanced_softmax"),
}
CHANGES: dict[str, Change] = PARTS | LONG_TAIL
SETS: dict[str, tuple[str, ...]] = {
    "ablation": (*PARTS, *LONG_TAIL),
    "parts": tuple(PARTS),
    "long-tail": tuple(LONG_TAIL),
}


def recipe(name: str) -> RunConfig:
    """`BASE` or `BASE+CHANGE+...` to its config. Raises MicaclError for an unknown name, with the nearest ones."""
    base, _, changes = name.partition("+")
    return changed(_known(base, RECIPES, "recipe")(), changes)


def changed(config: RunConfig, changes: str) -> RunConfig:
    """A config after `CHANGE+CHANGE...`; empty changes nothing. Raises MicaclError for an unknown one."""
    for change in changes.split("+") if changes else ():
        config = _known(change, CHANGES, "change of a recipe")(config)
    return config


def about(name: str) -> str:
    """What a recipe is, for its help: its docstring and those of its changes. Raises MicaclError."""
    base, *changes = name.split("+")
    parts = [_known(base, RECIPES, "recipe"), *(_known(change, CHANGES, "change of a recipe") for change in changes)]
    return "\n\n".join(part.__doc__ or "" for part in parts)


def listing() -> str:
    """All names, for the help of a verb."""
    return (
        f"recipes: {', '.join(RECIPES)}\nchanges, as in {next(iter(RECIPES))}+baseline: {', '.join(CHANGES)}\n"
        f"sets of changes, for crossval: {', '.join(SETS)}"
    )


def expand(names: str) -> list[str]:
    """`a,b+set` to the names of single recipes: a set stands for one recipe a change, those that are one config for the
    first of them. Raises MicaclError.
    """
    out: list[str] = []
    for name in names.split(","):
        head, _, last = name.strip().rpartition("+")
        if head and last in SETS:
            of_set = {recipe(f"{head}+{change}").hash: f"{head}+{change}" for change in reversed(SETS[last])}
            out += reversed(of_set.values())
        else:
            recipe(name.strip())
            out.append(name.strip())
    return list(dict.fromkeys(out))


def _known(name: str, table: dict[str, Any], what: str) -> Any:
    if name not in table:
        near = get_close_matches(name, table, n=3)
        raise MicaclError(
            f"{name or 'Nothing'!r} is no {what}.", "No run was started.", f"Choose one of: {', '.join(near or table)}."
        )
    return table[name]
