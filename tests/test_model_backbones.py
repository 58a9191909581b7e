"""Encoders: torchvision's names and shapes, strides, norms; VideoMAE against transformers, where that is installed."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from micacl.bundle import Bundle, load_bundle
from micacl.model import BackboneConfig, ModelConfig, VideoMAEConfig, build_backbone, build_model, parameter_count
from micacl.model.backbone import RESNETS, require_clip
from micacl.model.resnet3d import VideoResNet
from micacl.model.videomae import position_table
from micacl.recipes import tiny_cpu
from pipeline.contract import MicaclError
from tests.model_inputs import generator, random_clips
from tests.tiny_bundle import make_bundle

torch.set_num_threads(1)

NAMES = Path(__file__).with_name("torchvision_video_names.txt")
"""Written by torchvision 0.28.0: network, name and shape of each tensor of its state dict."""
VIDEOMAE = BackboneConfig(name="videomae", videomae=VideoMAEConfig(hidden=12, layers=1, heads=2, mlp=16, patch=8))


def published(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of torchvision's network, without its class layer."""
    rows = (line.split(" ") for line in NAMES.read_text().splitlines())
    shapes = {n: tuple(int(k) for k in s.split("x")) if s != "scalar" else () for net, n, s in rows if net == name}
    return {n: shape for n, shape in shapes.items() if not n.startswith("fc.")}


@pytest.mark.parametrize(
    ("name", "parameters"), [("r3d_18", 33_371_472), ("mc3_18", 11_695_440), ("r2plus1d_18", 31_505_325)]
)
def test_names_shapes_and_number_are_torchvisions(name: str, parameters: int) -> None:
    """The numbers are those that torchvision publishes, with its layer for 400 classes."""
    with torch.device("meta"):
        backbone = build_backbone(BackboneConfig(name=name))
    assert {n: tuple(t.shape) for n, t in backbone.state_dict().items()} == published(name)
    assert parameter_count(backbone) + 512 * 400 + 400 == parameters


def test_tiny_is_r3d_18_with_one_block_a_stage() -> None:
    with torch.device("meta"):
        tiny = build_backbone(BackboneConfig(name="tiny"))
    want = {
        n: shape for n, shape in published("r3d_18").items() if not n.startswith(tuple(f"layer{i}.1" for i in "1234"))
    }
    assert {n: tuple(t.shape) for n, t in tiny.state_dict().items()} == want


@pytest.mark.parametrize("name", RESNETS)
@pytest.mark.parametrize("frames", [1, 4, 9])
@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_features_and_places_in_time(name: str, frames: int, stage: int) -> None:
    """Stages 2 to 4 halve time, rounding up; MC3 leaves it as it is."""
    config = BackboneConfig(name=name, width=4, norm="group", frame_stage=stage)
    features, per_place = build_backbone(config)(torch.zeros(2, 3, frames, 20, 12))
    places = frames if name == "mc3_18" else -(-frames // 2 ** (stage - 1))
    assert features.shape == (2, config.features)
    assert per_place.shape == (2, places, config.frame_features)


@pytest.mark.parametrize("name", RESNETS)
def test_group_norm_does_not_look_at_the_other_clips(name: str) -> None:
    backbone = build_model(ModelConfig(backbone=BackboneConfig(name=name, width=4, norm="group")), seed=0).backbone
    backbone.double().train()
    clips = random_clips(3)[:, 0].double()
    torch.testing.assert_close(backbone(clips)[0][1:2], backbone(clips[1:2])[0])
    assert not any(isinstance(m, nn.BatchNorm3d) for m in backbone.modules())


@pytest.mark.parametrize("name", ["mc3_18", "r2plus1d_18"])
def test_mixed_and_factored_networks_train(name: str) -> None:
    model = build_model(ModelConfig(backbone=BackboneConfig(name=name, width=4), instances=3, projection_dim=0), seed=0)
    model(random_clips(2, frames=4)).logits_BK.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_r2plus1d_looks_at_space_and_at_time_in_turn() -> None:
    backbone = build_backbone(BackboneConfig(name="r2plus1d_18", width=4))
    kernels = {m.kernel_size for m in backbone.modules() if isinstance(m, nn.Conv3d)}
    assert kernels == {(1, 7, 7), (1, 3, 3), (3, 1, 1), (1, 1, 1)}


def test_mc3_does_not_look_along_time_after_the_first_stage() -> None:
    backbone = build_backbone(BackboneConfig(name="mc3_18", width=4))
    assert isinstance(backbone, VideoResNet)
    later = [backbone.layer2, backbone.layer3, backbone.layer4]
    assert {m.kernel_size[0] for part in later for m in part.modules() if isinstance(m, nn.Conv3d)} == {1}
    assert {m.stride[0] for m in backbone.modules() if isinstance(m, nn.Conv3d)} == {1}


def test_configs_refuse_in_words() -> None:
    for field, value in (("name", "resnet"), ("norm", "none"), ("width", 0), ("groups", 0), ("frame_stage", 5)):
        with pytest.raises(MicaclError, match=rf"backbone\.{field.replace('_', '-')} is "):
            BackboneConfig(**{field: value})
    for weights, sha256 in (("", "b3b3357e"), ("w.pth", "b3b"), ("w.pth", "B3B3357E")):
        with pytest.raises(MicaclError, match=r"backbone\.weights-sha256 is"):
            BackboneConfig(weights=weights, weights_sha256=sha256)
    with pytest.raises(MicaclError, match=r"backbone\.videomae\.layers is 0"):
        VideoMAEConfig(layers=0)
    with pytest.raises(MicaclError, match=r"hidden 10 is no multiple of heads 3"):
        VideoMAEConfig(hidden=10, heads=3)


def test_clips_that_a_backbone_cannot_take() -> None:
    require_clip(BackboneConfig(), 1, 1, 1)
    require_clip(VIDEOMAE, 2, 8, 16)
    for config, size in (
        (BackboneConfig(), (0, 8, 8)),
        (BackboneConfig(), (1, 0, 8)),
        (VIDEOMAE, (3, 8, 8)),
        (VIDEOMAE, (0, 8, 8)),
        (VIDEOMAE, (2, 12, 8)),
        (VIDEOMAE, (2, 8, 4)),
    ):
        with pytest.raises(MicaclError, match=f"Clips have {size[0]} frames of {size[1]} x {size[2]} pixels"):
            require_clip(config, *size)


# ---- VideoMAE


@pytest.fixture
def transformers() -> object:
    return pytest.importorskip("transformers", reason="transformers is not installed (the extra videomae)")


def test_without_transformers_videomae_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MicaclError, match="the package transformers is not installed"):
        build_backbone(VIDEOMAE)


def test_positions_are_sines_and_cosines_of_the_place() -> None:
    config = replace(VIDEOMAE.videomae, grid=(2, 3, 2))
    table = position_table(config, (2, 3, 2))
    assert table.shape == (12, 12)
    assert table[5, 4] == pytest.approx(float(torch.tensor(5 / 10000 ** (4 / 12)).sin()))
    assert table[5, 5] == pytest.approx(float(torch.tensor(5 / 10000 ** (4 / 12)).cos()))


def test_positions_of_another_grid_lie_between_those_of_the_pre_training() -> None:
    config = replace(VIDEOMAE.videomae, grid=(4, 2, 2))
    whole, half = position_table(config, (4, 2, 2)).view(4, 4, -1), position_table(config, (2, 2, 2)).view(2, 4, -1)
    torch.testing.assert_close(half, torch.stack([whole[:2].mean(0), whole[2:].mean(0)]))


def test_videomae_is_transformers_on_the_grid_of_the_pre_training(transformers: object) -> None:
    from micacl.model.videomae import _transformers_model

    config = replace(VIDEOMAE, videomae=replace(VIDEOMAE.videomae, grid=(2, 3, 3)))
    torch.manual_seed(0)
    theirs, ours = _transformers_model(config.videomae).eval(), build_backbone(config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=False)
    clips = torch.randn(2, 3, 4, 24, 24, generator=generator())
    tokens = theirs(clips.transpose(1, 2)).last_hidden_state
    features, frames = ours(clips)
    torch.testing.assert_close(features, nn.functional.layer_norm(tokens.mean(1), (12,)))
    torch.testing.assert_close(frames, tokens.view(2, 2, 9, 12).mean(2))


def test_videomae_takes_any_multiple_of_its_tubelets(transformers: object) -> None:
    backbone = build_backbone(VIDEOMAE)
    for frames, height, width in ((2, 8, 8), (4, 16, 24), (18, 8, 16)):
        features, per_place = backbone(torch.zeros(1, 3, frames, height, width))
        assert features.shape == (1, 12)
        assert per_place.shape == (1, frames // 2, 12)
    with pytest.raises(MicaclError, match="multiple of 2 frames"):
        backbone(torch.zeros(1, 3, 3, 8, 8))


def test_a_model_with_videomae_trains_and_is_the_same_for_a_seed(transformers: object) -> None:
    config = ModelConfig(backbone=VIDEOMAE, instances=3, projection_dim=4, projection_scales=("bag", "frame"))
    one, two = build_model(config, seed=3), build_model(config, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    out = one(random_clips(2))
    (out.logits_BK.square().sum() + sum(z[..., 0].sum() for z in out.projections.values())).backward()
    assert [n for n, p in one.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_a_bundle_with_videomae_opens(transformers: object, tmp_path: Path) -> None:
    config = replace(tiny_cpu(), model=ModelConfig(backbone=VIDEOMAE, projection_dim=0))
    bundle: Bundle = load_bundle(make_bundle(tmp_path / "bundle", config=config))
    assert bundle.build()(random_clips(1, instances=4)).logits_BK.shape == (1, 7)
