"""The model: shapes, names, masks, switches, gradients, and that it can learn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from micacl.loss import LossConfig, Objective
from micacl.model import (
    MICACL,
    BackboneConfig,
    GEIIMConfig,
    ModelConfig,
    WIANConfig,
    build_model,
    parameter_count,
)
from micacl.model.head import CosineHead
from pipeline.contract import MicaclError
from tests.model_inputs import BATCH_NORM, GEIIMS, TINY, WIANS, a_mask, generator, random_clips, spoilt, variant

torch.set_num_threads(1)


@pytest.mark.parametrize("frames", range(1, 9))
def test_any_number_of_frames(frames: int) -> None:
    model = build_model(TINY, seed=0)
    assert model(random_clips(2, frames=frames)).logits_BK.shape == (2, 7)


# ---- building


def test_build_model_is_deterministic_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = build_model(TINY, seed=7)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    two, other = build_model(TINY, seed=7), build_model(TINY, seed=8)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.head.weight, other.head.weight)


def test_configs_refuse_in_words() -> None:
    with pytest.raises(MicaclError, match=r"model\.head is 'mlp'"):
        ModelConfig(head="mlp")
    with pytest.raises(MicaclError, match=r"model\.cosine-scale is 0"):
        ModelConfig(cosine_scale=0)
    with pytest.raises(MicaclError, match=r"model\.instances is 0"):
        ModelConfig(instances=0)
    with pytest.raises(MicaclError, match=r"model\.classes"):
        ModelConfig(classes=("happy", "happy"))


# ---- the whole model


@pytest.mark.parametrize("instances", range(1, 6))
def test_shapes(instances: int) -> None:
    model = build_model(replace(TINY, instances=instances), seed=0)
    out = model(random_clips(2, instances))
    assert out.logits_BK.shape == (2, 7)
    assert out.bag_BD.shape == (2, 32)
    assert out.instances_BND.shape == (2, instances, 32)
    assert out.weights_BN.shape == (2, instances)
    assert {scale: tuple(z.shape) for scale, z in out.projections.items()} == {
        "bag": (2, 8),
        "instance": (2, instances, 8),
    }
    torch.testing.assert_close(out.weights_BN.sum(1), torch.ones(2))
    for z in out.projections.values():
        torch.testing.assert_close(z.norm(dim=-1), torch.ones(z.shape[:-1]))


MASKED = [replace(TINY, geiim=geiim) for geiim in [*GEIIMS, GEIIMConfig(enabled=False)]]
MASKED += [replace(base, wian=wian, head="cosine") for wian in WIANS for base in (TINY, BATCH_NORM)]
MASKED += [replace(BATCH_NORM, projection_scales=("bag", "instance", "frame"))]


@pytest.mark.parametrize("config", MASKED)
def test_pixels_of_missing_instances_reach_nothing(config: ModelConfig) -> None:
    """Not the scores, not the gradients, not the running statistics; in training mode."""
    clips, valid = random_clips(4), a_mask()
    results = []
    for given in (clips, spoilt(clips, valid)):
        model = build_model(config, seed=0).train()
        out = model(given, valid)
        (out.logits_BK.square().sum() + sum(z[..., 0].sum() for z in out.projections.values())).backward()
        buffers = [b for b in model.buffers() if b.is_floating_point()]
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([out.logits_BK, out.weights_BN, *out.projections.values(), *grads, *buffers])
        assert (out.weights_BN[~valid] == 0).all()
        assert (out.instances_BND[~valid] == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_valid_pixels_do_reach_the_scores() -> None:
    model = build_model(TINY, seed=0)
    clips, valid = random_clips(4), a_mask()
    changed = clips.clone()
    changed[:, 2, :, :, :8] = 0.0
    moved = (model(changed, valid).logits_BK - model(clips, valid).logits_BK).abs().amax(1)
    assert (moved[:3] > 1e-6).all()
    assert moved[3] < 1e-6  # its third instance is missing


def test_a_full_mask_is_no_mask() -> None:
    model = build_model(TINY, seed=0)
    clips = random_clips(2)
    torch.testing.assert_close(model(clips).logits_BK, model(clips, torch.ones(2, 3, dtype=torch.bool)).logits_BK)


@pytest.mark.parametrize("masked", [False, True])
def test_permuting_the_batch_permutes_the_output(masked: bool) -> None:
    model = build_model(BATCH_NORM, seed=0).eval()
    clips, valid, order = random_clips(4), a_mask() if masked else None, torch.tensor([2, 0, 3, 1])
    one, two = model(clips, valid), model(clips[order], None if valid is None else valid[order])
    torch.testing.assert_close(one.logits_BK[order], two.logits_BK)
    torch.testing.assert_close(one.weights_BN[order], two.weights_BN)
    torch.testing.assert_close(one.projections["instance"][order], two.projections["instance"])


SSM = GEIIMConfig(mixer="ssm", adjacency="static+dynamic", query_dim=4, state=2)


@pytest.mark.parametrize("base", [TINY, BATCH_NORM, replace(TINY, geiim=SSM), *(replace(TINY, wian=w) for w in WIANS)])
def test_half_precision_trains_and_embeddings_stay_float32(base: ModelConfig) -> None:
    model = build_model(base, seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(random_clips(4), a_mask())
        total = Objective(LossConfig(), [1] * 7)(out, torch.tensor([0, 0, 1, 1])).total
    total.backward()
    assert out.logits_BK.dtype == torch.bfloat16
    assert {z.dtype for z in out.projections.values()} == {torch.float32}
    assert total.dtype == torch.float32
    torch.testing.assert_close(out.projections["bag"].norm(dim=1), torch.ones(4))
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_bad_input_is_refused_in_words() -> None:
    model = build_model(TINY, seed=0)
    with pytest.raises(MicaclError, match="Bags have 4 instances, and the model is built for 3"):
        model(random_clips(2, instances=4))
    with pytest.raises(MicaclError, match="Bags have 0 instances"):
        model(random_clips(2, instances=0))
    with pytest.raises(MicaclError, match="Clips have 0 frames of 16 x 16 pixels"):
        model(random_clips(2, frames=0))
    with pytest.raises(MicaclError, match="Clips have shape"):
        model(random_clips(2)[:, :, :1])
    with pytest.raises(MicaclError, match="uint8"):
        model(random_clips(2).to(torch.uint8))
    with pytest.raises(MicaclError, match="1 of 2 bags have no valid instance"):
        model(random_clips(2), torch.tensor([[True, True, True], [False, False, False]]))
    with pytest.raises(MicaclError, match="mask"):
        model(random_clips(2), torch.ones(2, 3))


@pytest.mark.parametrize("wian", WIANS, ids=variant)
@pytest.mark.parametrize("adjacency", ["static", "dynamic", "static+dynamic"])
def test_which_models_take_bags_of_another_size(wian: WIANConfig, adjacency: str) -> None:
    config = replace(TINY, wian=wian, geiim=GEIIMConfig(adjacency=adjacency, query_dim=4))
    model = build_model(config, seed=0).eval()
    assert config.any_instances == (adjacency == "dynamic" and wian.kind != "dliam")
    for instances in (1, 2, 5):
        if config.any_instances:
            assert model(random_clips(2, instances)).weights_BN.shape == (2, instances)
        else:
            with pytest.raises(MicaclError, match=f"Bags have {instances} instances"):
                model(random_clips(2, instances))


VARIANTS = [
    *(replace(TINY, geiim=geiim) for geiim in GEIIMS),
    *(replace(TINY, wian=wian) for wian in WIANS),
    replace(TINY, head="cosine", prototypes="classifier"),
    replace(TINY, wian=WIANS[-1], head="cosine", prototypes="classifier"),
    replace(BATCH_NORM, wian=WIANS[-1], prototypes="learned"),
]


@pytest.mark.parametrize("config", VARIANTS)
def test_every_variant_is_the_same_for_a_seed_learns_everywhere_and_takes_one_bag(config: ModelConfig) -> None:
    model, twin = build_model(config, seed=5), build_model(config, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    clips, labels = random_clips(4), torch.tensor([0, 0, 1, 1])
    out = model(clips)
    spread = sum(p_KP[:, 0].sum() for p_KP in out.prototypes.values())
    (Objective(LossConfig(), [1] * 7)(out, labels).total + spread).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == []
    model.eval()
    whole, alone = model(clips), model(clips[1:2])
    torch.testing.assert_close(alone.logits_BK, whole.logits_BK[1:2])
    torch.testing.assert_close(alone.weights_BN, whole.weights_BN[1:2])
    assert model.class_weights_KD().shape == (7, whole.bag_BD.shape[1])


def test_each_switch_saves_parameters_and_the_rest_still_trains() -> None:
    full = parameter_count(build_model(TINY, seed=0))
    without_geiim = replace(TINY, geiim=GEIIMConfig(enabled=False))
    without_wian = replace(TINY, wian=WIANConfig(kind="mean"))
    without_all = replace(without_geiim, wian=WIANConfig(kind="mean"), projection_dim=0)
    for config in (without_geiim, without_wian, replace(TINY, projection_dim=0), without_all):
        model = build_model(config, seed=0)
        assert parameter_count(model) < full
        assert_every_parameter_learns(model, Objective(LossConfig(mccl=config.projection_dim > 0), [1] * 7))


def assert_every_parameter_learns(model: MICACL, objective: Objective) -> None:
    objective(model(random_clips(4)), torch.tensor([0, 0, 1, 1])).total.backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == []


# ---- heads


def test_the_class_weights_are_the_heads_and_have_gradients() -> None:
    model = build_model(TINY, seed=0)
    out = model(random_clips(2))
    assert isinstance(model.head, torch.nn.Linear)
    torch.testing.assert_close(out.logits_BK, out.bag_BD @ model.class_weights_KD().T + model.head.bias)
    model.class_weights_KD().sum().backward()
    assert model.head.weight.grad is not None


@pytest.mark.parametrize("learned", [False, True])
def test_cosine_scores_are_scaled_cosines(learned: bool) -> None:
    torch.manual_seed(0)
    head = CosineHead(5, 3, scale=16.0, learned=learned)
    x = torch.randn(4, 5, generator=generator())
    logits = head(x)
    for b in range(4):
        for k in range(3):
            want = 16.0 * torch.cosine_similarity(x[b], head.weight[k], dim=0)
            torch.testing.assert_close(logits[b, k], want)
    torch.testing.assert_close(head(3 * x), logits)
    assert len(list(head.parameters())) == 1 + learned
    head.weight.data.mul_(torch.tensor([[0.1], [1.0], [10.0]]))
    torch.testing.assert_close(head(x), logits)


def test_cosine_gradients_and_float32_under_autocast() -> None:
    torch.manual_seed(0)
    head = CosineHead(4, 3, scale=8.0, learned=True)
    x = torch.randn(2, 4, generator=generator())
    plain = head(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head(x), plain)
    torch.testing.assert_close(head(x), torch.nn.functional.linear(unit_rows(x), unit_rows(head.weight)) * 8)
    x64 = x.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x_BD, *_: head(x_BD), (x64, *head.double().parameters()))


def unit_rows(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


# ---- behaviour


def moving_blobs(bags_per_class: int, side: int = 24, frames: int = 4, instances: int = 2) -> tuple[Tensor, Tensor]:
    """(clips, labels): a bright blob that moves in one of seven directions, one a class, over noise."""
    rng = generator(3)
    labels = torch.arange(7).repeat_interleave(bags_per_class)
    angle = labels * (2 * torch.pi / 7)
    step = torch.arange(frames * instances).view(instances, frames) - (frames * instances - 1) / 2
    start = torch.rand(len(labels), 2, generator=rng) * 4 + side / 2 - 2
    x = start[:, 0, None, None] + 1.2 * step * angle.cos()[:, None, None]
    y = start[:, 1, None, None] + 1.2 * step * angle.sin()[:, None, None]
    grid = torch.arange(side)
    far = (grid[:, None] - y[..., None, None]) ** 2 + (grid - x[..., None, None]) ** 2
    blob = torch.exp(-far / 8)[:, :, None].expand(-1, -1, 3, -1, -1, -1)
    return blob + 0.05 * torch.rand(blob.shape, generator=rng), labels


def test_the_tiny_model_learns_fourteen_bags_by_heart() -> None:
    clips, labels = moving_blobs(bags_per_class=2)
    config = ModelConfig(backbone=BackboneConfig.tiny(width=8), instances=2, projection_dim=32)
    model = build_model(config, seed=0)
    objective = Objective(LossConfig(label_smoothing=0.0), [2] * 7)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = objective(model(clips), labels).total
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] > 1.5
    assert (model.eval()(clips).logits_BK.argmax(1) == labels).all(), losses[::5]
