"""Parameters and multiply-accumulates: against torchvision's published numbers and against sums by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from cluster.cli import VERBS
from micacl.model import BackboneConfig, GEIIMConfig, ModelConfig, WIANConfig, build_model, parameter_count
from micacl.model.count import PARTS, count_model
from pipeline.cli import run
from pipeline.contract import MicaclError
from tests.model_inputs import BATCH_NORM, TINY, WIANS, variant


@pytest.mark.parametrize(
    ("name", "parameters", "giga_macs"),
    [("r3d_18", 33_371_472, 40.697), ("mc3_18", 11_695_440, 43.343), ("r2plus1d_18", 31_505_325, 40.519)],
)
def test_the_backbones_are_what_torchvision_publishes(name: str, parameters: int, giga_macs: float) -> None:
    """`num_params` and `_ops` of its weights: one clip of 16 frames of 112 pixels, a layer of 400 classes."""
    count = count_model(ModelConfig(backbone=BackboneConfig(name=name), instances=1), frames=16, side=112)
    assert count.parameters["backbone"] + 512 * 400 + 400 == parameters
    assert round((count.macs["backbone"] + 512 * 400) / 1e9, 3) == giga_macs


@pytest.mark.parametrize("wian", WIANS, ids=variant)
@pytest.mark.parametrize("prototypes", ["none", "learned", "classifier"])
def test_the_parts_are_the_whole_model(wian: WIANConfig, prototypes: str) -> None:
    config = replace(BATCH_NORM, wian=wian, prototypes=prototypes, projection_scales=("bag", "instance", "frame"))
    count = count_model(config, frames=2, side=16)
    assert sum(count.parameters.values()) == parameter_count(build_model(config, seed=0))
    assert count.parameters.keys() == count.macs.keys() == PARTS.keys()


def test_macs_by_hand() -> None:
    """3 instances of D = 32 features, 7 classes, projections of 8; GEIIM with kernels 1 and 3."""
    d, n = 32, 3
    macs = count_model(TINY, frames=4, side=32).macs
    conv = n * d * d * (1 + 3) + n * (2 * d) * d
    assert macs["geiim"] == n * n * 10 + n * d * d + n * n * d + conv
    assert macs["wian"] == n * d * 8 + n * 8
    assert macs["head"] == d * 7
    assert macs["projections"] == (1 + n) * (d * d + d * 8)


def test_macs_of_dliam_by_hand() -> None:
    """M3DFEL's: 2 bidirectional LSTM layers, qkv, attention, one convolution; 3 instances of 32 features."""
    d, n = 32, 3
    macs = count_model(replace(TINY, wian=WIANConfig(kind="dliam", heads=4)), frames=4, side=32).macs
    lstm = n * 2 * 4 * (d * d + d * d) + n * 2 * 4 * (2 * d * d + d * d)
    attention = n * (2 * d) * (6 * d) + 2 * n * n * (2 * d)
    assert macs["wian"] == lstm + attention + 2 * d * 3 * n


def test_a_part_that_is_off_costs_nothing() -> None:
    config = replace(TINY, geiim=GEIIMConfig(enabled=False), wian=WIANConfig(kind="mean"), projection_dim=0)
    count = count_model(config, frames=2, side=16)
    for part in ("geiim", "wian", "projections"):
        assert count.parameters[part] == count.macs[part] == 0
    assert count.extra_macs == pytest.approx(32 * 7 / sum(count.macs.values()))


def test_a_size_that_the_model_cannot_take() -> None:
    with pytest.raises(MicaclError, match="Clips have 0 frames"):
        count_model(TINY, frames=0, side=16)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """At the recipe's size, or another one by flags; the table's numbers are the JSON's."""
    assert run(VERBS, "micacl", ["model", "tiny-cpu", "--stream.frames", "8", "--model.wian.kind", "dliam"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert result["recipe"] == "tiny-cpu"
    assert f"{result['parameters']['total']:,}" in err
    assert "one clip: 4 instances x 8 frames x 48 x 48 pixels" in err
    macs = result["macs_per_clip"]
    assert result["share_beside_backbone"]["macs"] == pytest.approx(1 - macs["backbone"] / macs["total"])


def test_the_command_refuses_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["tiny"], "Choose one of: tiny-cpu"),
        ([], "'Nothing' is no recipe"),
        (["tiny-cpu", "--model.wian.heads", "0"], "wian.heads is 0"),
        (["tiny-cpu", "--model.wian.heads", "3", "--model.wian.kind", "dliam"], "wian.heads is 3"),
    ):
        assert run(VERBS, "micacl", ["model", *arguments]) == 2
        assert said in capsys.readouterr().err
