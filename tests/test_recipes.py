"""Every recipe builds, trains a step and prints what it resolved to."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from cluster.recipe_args import parse_recipe
from micacl.batch import collate, to_input
from micacl.config import RunConfig, from_dict, to_dict
from micacl.loss.objective import Objective, require_projections
from micacl.loss.progress import Progress
from micacl.model.count import count_model
from micacl.model.micacl import build_model
from micacl.recipes import CHANGES, LONG_TAIL, PARTS, RECIPES, SETS, expand, recipe
from micacl.train.engine import PlainEngine
from pipeline.contract import MicaclError
from pipeline.loader import ClipBatch

CLIPS = 7


def small(config: RunConfig) -> RunConfig:
    """The recipe at a size for a CPU: fewer channels and pixels; all else as it is."""
    backbone = dataclasses.replace(config.model.backbone, width=8, norm="group")
    model = dataclasses.replace(config.model, backbone=backbone)
    return dataclasses.replace(config, model=model, batch=dataclasses.replace(config.batch, side=32))


def clips(config: RunConfig) -> ClipBatch:
    rng = np.random.default_rng(1)
    shape = (CLIPS, config.model.instances, config.stream.frames, 40, 40, 3)
    return ClipBatch(
        frames_BNTHWC=rng.integers(0, 256, shape, dtype=np.uint8),
        labels_B=np.array([0, 0, 0, 1, 1, 2, 6]),
        keys=tuple(f"c{i}" for i in range(CLIPS)),
        rows_B=np.arange(CLIPS),
        positions_B=np.arange(CLIPS),
        rng_keys_B2=rng.integers(0, 2**63, (CLIPS, 2), dtype=np.uint64),
        mask_B=np.ones(CLIPS, bool),
        epoch=0,
        step=0,
        state={},
    )


@pytest.mark.parametrize("name", [*RECIPES, *(f"tiny-cpu+{change}" for change in CHANGES)])
def test_every_recipe_builds_and_takes_a_step(name: str) -> None:
    config = small(recipe(name))
    assert from_dict(RunConfig, to_dict(config)) == config
    require_projections(config.loss, config.model)
    model = build_model(config.model, seed=0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    engine, objective = (
        PlainEngine(model, config.train),
        Objective(config.loss, config.model.classes and (40, 20, 9, 8, 7, 2, 4)),
    )
    batch = collate(clips(config), config.batch, train=True)
    output = engine.forward(to_input(batch, torch.device("cpu")))
    losses = objective(output, batch.labels_B, engine.gather, Progress())
    engine.step(losses.total, 1e-3)
    assert torch.isfinite(losses.total)
    assert ("mccl_bag" in losses.parts) == config.loss.mccl
    assert not torch.equal(before["head.weight"], model.state_dict()["head.weight"])


def test_parts_differ_from_the_baseline_in_one_place() -> None:
    plain = recipe("tiny-cpu+baseline")
    for part in ("geiim", "wian"):
        config = recipe(f"tiny-cpu+{part}")
        assert dataclasses.replace(config.model, **{part: getattr(plain.model, part)}) == plain.model
        assert config != plain
        assert config.loss == plain.loss
    with_mccl = recipe("tiny-cpu+mccl")
    assert with_mccl.loss == dataclasses.replace(plain.loss, mccl=True)
    assert dataclasses.replace(with_mccl.model, projection_dim=0) == plain.model
    assert recipe("tiny-cpu+all") == recipe("tiny-cpu")


def test_long_tail_methods_keep_the_model_and_the_length() -> None:
    base = recipe("tiny-cpu")
    for name in LONG_TAIL:
        config = recipe(f"tiny-cpu+{name}")
        assert (config.model.geiim, config.model.wian, config.model.backbone) == (
            base.model.geiim,
            base.model.wian,
            base.model.backbone,
        )
        assert config.train.epochs == base.train.epochs
        assert config.loss.mccl == name.startswith("mccl")
    assert len({recipe(f"tiny-cpu+{name}").hash for name in LONG_TAIL}) == len(LONG_TAIL)


@pytest.mark.parametrize("base", RECIPES)
@pytest.mark.parametrize("method", ["natural", "oversampling", "balanced-softmax"])
def test_mccl_is_all_that_its_rows_add(base: str, method: str) -> None:
    without = recipe(f"{base}+{'cross-entropy' if method == 'natural' else method}")
    config = recipe(f"{base}+mccl-{method}")
    assert config.loss == dataclasses.replace(without.loss, mccl=True)
    assert dataclasses.replace(config, loss=without.loss, model=without.model) == without
    require_projections(config.loss, config.model)


def test_parts_that_a_recipe_does_without_are_at_their_defaults() -> None:
    assert recipe("m3dfel+geiim").model.geiim.enabled
    require_projections(recipe("m3dfel+mccl").loss, recipe("m3dfel+mccl").model)
    whole = recipe("m3dfel+all")
    assert (whole.model.geiim.enabled, whole.model.wian.kind, whole.loss.mccl) == (True, "dliam", True)
    names = expand("m3dfel+ablation")
    assert len({recipe(name).hash for name in names}) == len(names) == len(CHANGES) - 1
    assert "m3dfel+label-smoothing" not in names  # it is m3dfel+wian


def parsed(name: str, *flags: str) -> RunConfig:
    config: RunConfig = parse_recipe(RunConfig, name, "micacl model", flags, default=lambda config: config)
    return config


def test_changes_see_the_flags_and_flags_have_the_last_word() -> None:
    config = parsed("tiny-cpu+crt", "--train.epochs", "5")
    assert (config.train.retrain_head_from, config.plan.then_from) == (4, 4)
    assert parsed("tiny-cpu+crt", "--train.epochs", "5", "--train.retrain-head-from", "2").train.retrain_head_from == 2
    assert parsed("tiny-cpu+ldam-drw", "--loss.ldam-margin", "3").loss.ldam_margin == 3
    assert parsed("tiny-cpu+ldam-drw") == recipe("tiny-cpu+ldam-drw")
    assert parsed("tiny-cpu", "--train.epochs", "5").train.epochs == 5


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_counted(name: str) -> None:
    config = recipe(f"tiny-cpu+{name}")
    assert count_model(config.model, config.stream.frames, config.batch.side).to_dict()


def test_the_second_stage_and_the_level_plan_begin_together() -> None:
    config = recipe("tiny-cpu+crt")
    assert config.train.retrain_head_from == config.plan.then_from == 24
    assert (config.plan.policy, config.plan.then) == ("natural", "uniform")


def test_sets_and_lists() -> None:
    assert expand("tiny-cpu+parts") == [f"tiny-cpu+{part}" for part in PARTS]
    assert expand("dfew, dfew+crt,dfew") == ["dfew", "dfew+crt"]
    assert len(expand("dfew+ablation")) == len(SETS["ablation"]) == len(CHANGES)
    assert expand("tiny-cpu+baseline+long-tail")[0] == "tiny-cpu+baseline+cross-entropy"


@pytest.mark.parametrize(
    ("name", "near"), [("tiny_cpu", "tiny-cpu"), ("tiny-cpu+oversampel", "oversampling"), ("", "tiny-cpu")]
)
def test_unknown_names_are_refused_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(MicaclError) as caught:
        expand(name)
    assert near in str(caught.value.args)


def test_a_scale_without_a_head_is_refused_before_anything_is_built() -> None:
    config = recipe("tiny-cpu")
    loss = dataclasses.replace(config.loss, scales=("bag", "frame"))
    with pytest.raises(MicaclError, match="frame"):
        require_projections(loss, config.model)
    model = dataclasses.replace(config.model, projection_scales=("bag", "frame"))
    require_projections(loss, model)
    with pytest.raises(MicaclError, match="bag"):
        require_projections(loss, dataclasses.replace(model, projection_dim=0))
