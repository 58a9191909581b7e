"""The model: shapes, names, masks, switches, gradients, and that it can learn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from micacl.loss import LossConfig, Objective
from micacl.model import (
    GEIIM,
    MICACL,
    WIAN,
    Backbone,
    BackboneConfig,
    GEIIMConfig,
    ModelConfig,
    WIANConfig,
    build_model,
    load_torchvision_weights,
    parameter_count,
)
from micacl.model.geiim import AdaptiveAdjacency
from pipeline.contract import MicaclError

torch.set_num_threads(1)

TINY = ModelConfig(backbone=BackboneConfig.tiny(width=4), instances=3, projection_dim=8, wian=WIANConfig(hidden=8))
BATCH_NORM = replace(TINY, backbone=BackboneConfig(name="tiny", width=4, norm="batch"))
GEIIMS = [
    GEIIMConfig(order=order, residual=residual, norm=norm, kernels=kernels)
    for order, residual, norm, kernels in [
        ("graph_first", True, True, (1, 3)),
        ("conv_first", True, True, (1, 3)),
        ("graph_first", False, False, (3,)),
        ("conv_first", False, True, (1, 3, 5)),
    ]
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_clips(bags: int, instances: int = 3, frames: int = 2, side: int = 16) -> Tensor:
    return torch.rand(bags, instances, 3, frames, side, side, generator=generator())


def a_mask() -> Tensor:
    return torch.tensor([[True, True, True], [True, False, True], [False, False, True], [True, True, False]])


# ---- backbone


def test_r3d_18_has_torchvisions_parameters() -> None:
    """torchvision documents 33,371,472 parameters for r3d_18 with its layer for 400 classes."""
    with torch.device("meta"):
        backbone = Backbone(BackboneConfig())
    assert parameter_count(backbone) + 512 * 400 + 400 == 33_371_472
    shapes = {name: tuple(p.shape) for name, p in backbone.named_parameters()}
    assert shapes["stem.0.weight"] == (64, 3, 3, 7, 7)
    assert shapes["stem.1.bias"] == (64,)
    assert shapes["layer1.0.conv1.0.weight"] == (64, 64, 3, 3, 3)
    assert shapes["layer1.1.conv2.1.weight"] == (64,)
    assert shapes["layer2.0.conv1.0.weight"] == (128, 64, 3, 3, 3)
    assert shapes["layer2.0.downsample.0.weight"] == (128, 64, 1, 1, 1)
    assert shapes["layer4.0.downsample.1.bias"] == (512,)
    assert "layer1.0.downsample.0.weight" not in shapes
    assert len(shapes) == 60  # 20 convolutions, each with the scale and shift of its norm


def test_torchvision_weights_load_without_fc() -> None:
    config = BackboneConfig(width=4)
    source, target = Backbone(config), Backbone(config)
    load_torchvision_weights(target, {**source.state_dict(), "fc.weight": torch.zeros(400, 32)})
    assert all(torch.equal(value, target.state_dict()[name]) for name, value in source.state_dict().items())


def test_weights_that_do_not_fit_are_refused_and_nothing_changes() -> None:
    target = Backbone(BackboneConfig(width=4))
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(MicaclError, match=r"stem\.0\.weight"):
        load_torchvision_weights(target, {**before, "stem.0.weight": torch.zeros(1)})
    assert all(torch.equal(value, target.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("frames", range(1, 9))
def test_any_number_of_frames(frames: int) -> None:
    model = build_model(TINY, seed=0)
    assert model(random_clips(2, frames=frames)).logits_BK.shape == (2, 7)


def test_temporal_stride_is_eight() -> None:
    backbone = Backbone(BackboneConfig.tiny(width=4))
    sizes: list[torch.Size] = []
    backbone.layer4.register_forward_hook(lambda *args: sizes.append(args[2].shape[2:]))
    for frames in (1, 4, 8, 9, 16):
        backbone(torch.zeros(1, 3, frames, 32, 32))
    assert [tuple(size) for size in sizes] == [(1, 2, 2), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2)]


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
    with pytest.raises(MicaclError, match=r"backbone\.name is 'resnet'"):
        BackboneConfig(name="resnet")
    with pytest.raises(MicaclError, match=r"geiim\.kernels is \(2,\)"):
        GEIIMConfig(kernels=(2,))
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


@pytest.mark.parametrize("geiim", [*GEIIMS, GEIIMConfig(enabled=False)])
@pytest.mark.parametrize("base", [TINY, BATCH_NORM])
def test_pixels_of_missing_instances_reach_nothing(base: ModelConfig, geiim: GEIIMConfig) -> None:
    """Not the scores, not the gradients, not the running statistics; in training mode."""
    clips, valid = random_clips(4), a_mask()
    spoilt = clips.masked_fill(~valid[:, :, None, None, None, None], torch.nan)
    results = []
    for given in (clips, spoilt):
        model = build_model(replace(base, geiim=geiim), seed=0).train()
        out = model(given, valid)
        out.logits_BK.square().sum().backward()
        buffers = [b for b in model.buffers() if b.is_floating_point()]
        results.append(
            [out.logits_BK, out.weights_BN, *(p.grad for p in model.parameters() if p.grad is not None), *buffers]
        )
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


@pytest.mark.parametrize("base", [TINY, BATCH_NORM])
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
    with pytest.raises(MicaclError, match="3 instances"):
        model(random_clips(2, instances=4))
    with pytest.raises(MicaclError, match="uint8"):
        model(random_clips(2).to(torch.uint8))
    with pytest.raises(MicaclError, match="1 of 2 bags have no valid instance"):
        model(random_clips(2), torch.tensor([[True, True, True], [False, False, False]]))
    with pytest.raises(MicaclError, match="mask"):
        model(random_clips(2), torch.ones(2, 3))


def test_each_switch_saves_parameters_and_the_rest_still_trains() -> None:
    full = parameter_count(build_model(TINY, seed=0))
    without_geiim = replace(TINY, geiim=GEIIMConfig(enabled=False))
    without_wian = replace(TINY, wian=WIANConfig(enabled=False))
    without_all = replace(without_geiim, wian=WIANConfig(enabled=False), projection_dim=0)
    for config in (without_geiim, without_wian, replace(TINY, projection_dim=0), without_all):
        model = build_model(config, seed=0)
        assert parameter_count(model) < full
        assert_every_parameter_learns(model, Objective(LossConfig(mccl=config.projection_dim > 0), [1] * 7))


def assert_every_parameter_learns(model: MICACL, objective: Objective) -> None:
    objective(model(random_clips(4)), torch.tensor([0, 0, 1, 1])).total.backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == []


def test_every_parameter_of_the_full_model_learns() -> None:
    model = build_model(replace(TINY, wian=WIANConfig(hidden=8, gated=True)), seed=0)
    assert_every_parameter_learns(model, Objective(LossConfig(), [1] * 7))


# ---- GEIIM


@pytest.mark.parametrize("instances", range(1, 6))
def test_adjacency_rows_sum_to_one_and_no_entry_is_zero(instances: int) -> None:
    """Softmax after ReLU: an entry that ReLU sets to 0 still weighs e^0."""
    torch.manual_seed(0)
    adjacency = AdaptiveAdjacency(instances, 10)
    a_NN = adjacency()
    torch.testing.assert_close(a_NN.sum(1), torch.ones(instances))
    assert (a_NN > 0).all()
    scores = adjacency.source_Nd @ adjacency.target_dN
    floor = 1 / functional.relu(scores).exp().sum(1, keepdim=True).expand_as(scores)
    torch.testing.assert_close(a_NN[scores < 0], floor[scores < 0])


def test_masked_adjacency_leaves_columns_out_and_rows_still_sum_to_one() -> None:
    torch.manual_seed(0)
    a_BNN = AdaptiveAdjacency(3, 10)(a_mask())
    torch.testing.assert_close(a_BNN.sum(2), torch.ones(4, 3))
    assert torch.equal(a_BNN == 0, ~a_mask()[:, None, :].expand_as(a_BNN))


def test_graph_step_is_a_x_w() -> None:
    """Written out with loops: graph_first, no residual, no norm, and scales that do nothing but gelu."""
    torch.manual_seed(0)
    geiim = GEIIM(GEIIMConfig(residual=False, norm=False, kernels=(1,)), instances=3, features=2)
    x = torch.rand(1, 3, 2, generator=generator())
    for name, p in geiim.scales.named_parameters():
        (torch.nn.init.dirac_ if name.endswith("weight") else torch.nn.init.zeros_)(p)
    a, w = geiim.adjacency(), geiim.graph.weight.T
    want = torch.stack([sum((a[n, m] * (x[0, m] @ w) for m in range(3)), torch.zeros(2)) for n in range(3)])
    torch.testing.assert_close(geiim(x)[0], functional.gelu(functional.gelu(want)))


@pytest.mark.parametrize("config", GEIIMS)
def test_missing_instances_at_the_end_make_a_shorter_bag(config: GEIIMConfig) -> None:
    """Missing instances are the zeros of the padding at every step, not only at the first."""
    torch.manual_seed(0)
    long, short = GEIIM(config, instances=4, features=3), GEIIM(config, instances=2, features=3)
    weights = long.state_dict()
    weights["adjacency.source_Nd"] = weights["adjacency.source_Nd"][:2]
    weights["adjacency.target_dN"] = weights["adjacency.target_dN"][:, :2]
    short.load_state_dict(weights)
    x = torch.randn(1, 4, 3, generator=generator())
    out = long(x, torch.tensor([[True, True, False, False]]))
    torch.testing.assert_close(out[:, :2], short(x[:, :2]))


@pytest.mark.parametrize("config", GEIIMS)
@pytest.mark.parametrize("masked", [False, True])
def test_geiim_gradients(config: GEIIMConfig, masked: bool) -> None:
    torch.manual_seed(0)
    geiim = GEIIM(config, instances=3, features=2).double()
    x = torch.randn(4, 3, 2, dtype=torch.float64, generator=generator(), requires_grad=True)
    valid = a_mask() if masked else None
    assert torch.autograd.gradcheck(lambda x_BND, *_: geiim(x_BND, valid), (x, *geiim.parameters()))


# ---- WIAN


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_wian_gradients(gated: bool, masked: bool) -> None:
    torch.manual_seed(0)
    wian = WIAN(WIANConfig(hidden=4, gated=gated), features=3).double()
    h = torch.randn(4, 3, 3, dtype=torch.float64, generator=generator(), requires_grad=True)
    valid = a_mask() if masked else None
    assert torch.autograd.gradcheck(lambda h_BND, *_: wian(h_BND, valid), (h, *wian.parameters()))


@pytest.mark.parametrize("gated", [False, True])
def test_wian_formula_with_loops(gated: bool) -> None:
    torch.manual_seed(0)
    wian = WIAN(WIANConfig(hidden=4, gated=gated), features=3)
    h = torch.randn(2, 3, 3, generator=generator())
    bag, weights = wian(h)
    for b in range(2):
        scores = []
        for n in range(3):
            units = torch.tanh(wian.units.weight @ h[b, n] + wian.units.bias)
            if gated:
                assert wian.gates is not None
                units = units * torch.sigmoid(wian.gates.weight @ h[b, n] + wian.gates.bias)
            scores.append((wian.score.weight @ units)[0].exp().item())
        want = [score / sum(scores) for score in scores]
        torch.testing.assert_close(weights[b], torch.tensor(want))
        torch.testing.assert_close(bag[b], sum((want[n] * h[b, n] for n in range(3)), torch.zeros(3)))


def test_wian_off_is_the_mean_over_valid_instances() -> None:
    wian = WIAN(WIANConfig(enabled=False), features=3)
    h, valid = torch.randn(4, 3, 3, generator=generator()), a_mask()
    bag, weights = wian(h, valid)
    torch.testing.assert_close(bag, torch.stack([h[b][valid[b]].mean(0) for b in range(4)]))
    torch.testing.assert_close(weights, valid / valid.sum(1, keepdim=True))
    assert parameter_count(wian) == 0


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
