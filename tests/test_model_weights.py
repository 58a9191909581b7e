"""Weight files from elsewhere: what loads, what is said, and every refusal, after which nothing has changed."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cluster.scaling import ScalingConfig
from cluster.train import check_run, train
from micacl.config import RunConfig
from micacl.model import Backbone, BackboneConfig, VideoMAEConfig, build_backbone, build_model
from micacl.model.weights import begin_with_weights, check_encoder_weights, load_encoder_weights, read_tensors
from micacl.recipes import tiny_cpu
from micacl.train.checkpoint import read_checkpoint
from pipeline.contract import DFEW_LABELS, MicaclError, digest
from pipeline.ray_local import ray_session
from pipeline.storage import open_store
from tests.tiny_dataset import make_dataset

torch.set_num_threads(1)

SMALL = BackboneConfig(name="r3d_18", width=2)
State = dict[str, Tensor]


def state_of(config: BackboneConfig = SMALL, seed: int = 1) -> State:
    """Weights of a network, batch norm's statistics too, that are not those it starts with."""
    torch.manual_seed(seed)
    state = build_backbone(config).state_dict()
    return {n: torch.rand_like(t) if t.is_floating_point() else torch.tensor(7) for n, t in state.items()}


def pth(value: object) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def file_of(folder: Path, data: bytes, name: str = "weights.pth") -> str:
    path = folder / name
    path.write_bytes(data)
    return str(path)


def assert_loaded(backbone: Backbone, state: Mapping[str, Tensor]) -> None:
    own = backbone.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(value, own[name]) for name, value in state.items())


# ---- what loads

WITH_CLASSES = {"fc.weight": torch.rand(400, 16), "fc.bias": torch.rand(400)}
WRITERS: dict[str, Callable[[State], bytes]] = {
    "pth": lambda s: pth({**s, **WITH_CLASSES}),
    "safetensors": lambda s: safetensors.torch.save({**s, **WITH_CLASSES}),
    "state_dict": lambda s: pth({"epoch": 3, "state_dict": {**s, **WITH_CLASSES}}),
    "DataParallel": lambda s: pth({"model": {f"module.{n}": t for n, t in {**s, **WITH_CLASSES}.items()}}),
    "MICACL": lambda s: safetensors.torch.save(
        {**{f"backbone.{n}": t for n, t in s.items()}, "head.weight": torch.rand(7, 16), "wian.fc.bias": torch.rand(2)}
    ),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", ["r3d_18", "mc3_18", "r2plus1d_18"])
def test_a_file_loads_and_the_report_says_what(name: str, writer: str, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, name=name)
    state, target = state_of(config), build_backbone(config)
    report = load_encoder_weights(target, file_of(tmp_path, WRITERS[writer](state)))
    assert_loaded(target, state)
    assert set(report.matched) == state.keys()
    assert report.missing == report.unexpected == report.other_shapes == ()
    assert len(report.aside) == 2
    assert f"{len(state)} tensors of the backbone matched" in report.to_text()
    assert f"2 left aside: {', '.join(report.aside)}" in report.to_text()


def test_batch_counters_may_be_missing(tmp_path: Path) -> None:
    state = {n: t for n, t in state_of().items() if not n.endswith("num_batches_tracked")}
    report = load_encoder_weights(build_backbone(SMALL), file_of(tmp_path, pth(state)))
    assert len(report.missing) == 20
    assert "20 missing in the file: layer1.0.conv1.1.num_batches_tracked, " in report.to_text()
    assert "and 15 more" in report.to_text()


def test_half_precision_files_load_into_float32(tmp_path: Path) -> None:
    state = {n: t.half() if t.is_floating_point() else t for n, t in state_of().items()}
    target = build_backbone(SMALL)
    load_encoder_weights(target, file_of(tmp_path, pth(state)))
    assert {p.dtype for p in target.parameters()} == {torch.float32}
    assert torch.equal(target.state_dict()["stem.0.weight"], state["stem.0.weight"].float())


def test_a_file_loads_from_an_fsspec_url_and_by_its_hash() -> None:
    data = pth(state_of())
    open_store("memory://weights-test/models").put("r3d.pth", data)
    for sha256 in (digest(data), digest(data)[:8]):
        config = dataclasses.replace(SMALL, weights="memory://weights-test/models/r3d.pth", weights_sha256=sha256)
        backbone = build_backbone(config)
        assert check_encoder_weights(config) == begin_with_weights(backbone)
        assert_loaded(backbone, state_of())


def test_without_a_url_nothing_is_loaded() -> None:
    assert check_encoder_weights(SMALL) is None
    assert begin_with_weights(build_backbone(SMALL)) is None


def test_a_model_is_built_without_looking_at_the_file() -> None:
    """A bundle is opened where the file is not."""
    model = dataclasses.replace(tiny_cpu().model, backbone=dataclasses.replace(SMALL, weights="/gone.pth"))
    assert build_model(model, seed=0).backbone.config.weights == "/gone.pth"


# ---- refusals


def refused(folder: Path, data: bytes, sha256: str = "") -> str:
    """What is said; the backbone has not changed."""
    target = build_backbone(SMALL)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(MicaclError) as caught:
        load_encoder_weights(target, file_of(folder, data), sha256)
    assert_loaded(target, before)
    assert caught.value.consequence.startswith("No weight was loaded")
    return f"{caught.value.cause} {caught.value.remedy}"


def test_other_shapes_missing_and_unknown_names(tmp_path: Path) -> None:
    state = state_of()
    said = refused(tmp_path, pth({**state, "stem.0.weight": torch.rand(64, 3, 3, 7, 7)}))
    assert "1 of another shape: stem.0.weight: (64, 3, 3, 7, 7), wanted (2, 3, 3, 7, 7)" in said
    said = refused(tmp_path, pth({n: t for n, t in state.items() if n != "layer3.1.conv2.0.weight"}))
    assert "1 missing in the file: layer3.1.conv2.0.weight" in said
    assert "1 unknown to the backbone: head.weight" in refused(tmp_path, pth({**state, "head.weight": torch.rand(2)}))


@pytest.mark.parametrize(
    "config",
    [
        BackboneConfig(name="r3d_18", width=4),
        BackboneConfig(name="mc3_18", width=2),
        BackboneConfig(name="r2plus1d_18", width=2),
        BackboneConfig(name="tiny", width=2),
    ],
    ids=lambda c: f"{c.name}-{c.width}",
)
def test_the_file_of_another_network(config: BackboneConfig, tmp_path: Path) -> None:
    assert "do not fit the backbone r3d_18" in refused(tmp_path, pth(state_of(config)))


class Evil:
    """Runs code when a plain pickle of it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return Path.touch, (Path(self.path),)  # type: ignore[return-value]


def test_pickled_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    said = refused(tmp_path, pth({**state_of(), "extra": Evil(tmp_path / "ran")}))
    assert "holds more than tensors, or is damaged" in said
    assert "No code of it was run" in said
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "value", [torch.rand(3), [torch.rand(3)], {}, {"a": 1}, {"state_dict": {"a": torch.rand(1), "b": 2}}, 3, None]
)
def test_something_that_is_no_state_dict(value: object, tmp_path: Path) -> None:
    assert "is no state dict" in refused(tmp_path, pth(value))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(3).to_sparse(),
        torch.zeros(1).expand(10**12),
        torch.quantize_per_tensor(torch.rand(3), 0.1, 0, torch.qint8),
        torch.rand(3, dtype=torch.complex64),
        torch.empty(3, device="meta"),
        torch.nested.nested_tensor([torch.rand(2), torch.rand(3)]),
    ],
)
def test_tensors_that_are_not_plain(tensor: torch.Tensor, tmp_path: Path) -> None:
    said = refused(tmp_path, pth({"a": tensor}))
    assert "no plain tensor of real numbers" in said or "cannot be read" in said or "holds more than" in said


def test_names_that_are_numbers(tmp_path: Path) -> None:
    assert "not all of it is names" in refused(tmp_path, pth({1: torch.rand(1), "1": torch.rand(1)}))


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for where in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(MicaclError, match="is no file"):
            read_tensors(str(where))


def test_another_hash(tmp_path: Path) -> None:
    data = pth(state_of())
    assert f"has the sha256 {digest(data)}, not 00000000" in refused(tmp_path, data, "00000000")


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    state = state_of()
    state["stem.1.running_var"][0] = torch.nan
    assert "not finite in 'stem.1.running_var'" in refused(tmp_path, pth(state))


def test_no_such_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for where in (tmp_path / "none.pth", tmp_path / "folder", tmp_path / "none" / "w.pth"):
        with pytest.raises(MicaclError, match="is not there"):
            read_tensors(str(where))


def test_a_cut_file(tmp_path: Path) -> None:
    for data in (pth(state_of()), safetensors.torch.save(state_of())):
        for size in (0, 4, 100, len(data) // 2, len(data) - 1):
            assert "The weight file" in refused(tmp_path, data[:size])


@settings(max_examples=150, deadline=None)
@example(data=b"r")
@given(data=st.binary(max_size=64) | st.binary(max_size=64).map(lambda b: b"\x80\x02" + b))
def test_any_bytes_are_refused_in_words(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = file_of(tmp_path_factory.mktemp("fuzz"), data)
    with pytest.raises(MicaclError, match="The weight file"):
        read_tensors(path)


@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, 10**6), value=st.integers(0, 255))
def test_a_changed_byte_is_refused_or_changes_a_number(
    at: int, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Never anything but tensors or a refusal; a hash in the config would have seen it."""
    data = bytearray(pth({"a": torch.arange(4.0)}))
    data[at % len(data)] = value
    path = file_of(tmp_path_factory.mktemp("fuzz"), bytes(data))
    with contextlib.suppress(MicaclError):
        assert all(isinstance(t, Tensor) for t in read_tensors(path).values())


# ---- VideoMAE

SIZES = VideoMAEConfig(hidden=12, layers=1, heads=2, mlp=16, patch=8, grid=(2, 2, 2))
VIDEOMAE = BackboneConfig(name="videomae", videomae=SIZES)


def as_published(state: State, prefix: str, *, old: bool) -> State:
    """As transformers saves its models for pre-training (no fc_norm) or classification."""
    names = {"query.bias": "q_bias", "value.bias": "v_bias"} if old else {}
    out = {}
    for full, t in state.items():
        name = full
        for new, before in names.items():
            name = name.replace(new, before)
        out["fc_" + name if name.startswith("norm.") else prefix + name] = t
    return out


@pytest.mark.parametrize("prefix", ["", "videomae.", "model.videomae."])
@pytest.mark.parametrize("old", [False, True])
def test_videomae_files_load_with_their_prefix(prefix: str, old: bool, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed (the extra videomae)")
    state, target = state_of(VIDEOMAE), build_backbone(VIDEOMAE)
    more = {
        "classifier.weight": torch.rand(3, 12),
        "decoder.head.bias": torch.rand(3),
        "mask_token": torch.rand(1),
        "encoder_to_decoder.weight": torch.rand(2, 2),
    }
    data = safetensors.torch.save({**as_published(state, prefix, old=old), **more})
    report = load_encoder_weights(target, file_of(tmp_path, data))
    assert_loaded(target, state)
    assert set(report.aside) == more.keys()


def test_a_pre_trained_videomae_has_no_last_norm(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed (the extra videomae)")
    state, target = state_of(VIDEOMAE), build_backbone(VIDEOMAE)
    encoder = {n: t for n, t in as_published(state, "videomae.", old=True).items() if not n.startswith("fc_norm")}
    encoder |= {"videomae.layernorm.weight": torch.rand(12), "videomae.layernorm.bias": torch.rand(12)}
    report = load_encoder_weights(target, file_of(tmp_path, pth(encoder)))
    assert report.aside == ("videomae.layernorm.bias", "videomae.layernorm.weight")
    assert report.missing == ("norm.bias", "norm.weight")
    assert torch.equal(target.state_dict()["norm.weight"], torch.ones(12))
    assert report.fits


def test_a_videomae_of_another_size_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed (the extra videomae)")
    larger = dataclasses.replace(VIDEOMAE, videomae=dataclasses.replace(SIZES, layers=2))
    url = file_of(tmp_path, pth(state_of(larger)))
    with pytest.raises(MicaclError, match="do not fit the backbone videomae"):
        load_encoder_weights(build_backbone(VIDEOMAE), url)


# ---- a training run


def tiny_with(url: str, **changes: object) -> RunConfig:
    config = tiny_cpu()
    backbone = dataclasses.replace(config.model.backbone, weights=url)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=backbone, **changes))


def test_a_run_is_refused_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_dataset(tmp_path / "ds", {"train": dict.fromkeys(DFEW_LABELS, 4)}, 0)
    file_of(tmp_path, pth(state_of(SMALL)), "other.pth")
    file_of(tmp_path, pth(state_of(tiny_cpu().model.backbone)), "right.pth")
    monkeypatch.chdir(tmp_path)
    for config, said in (
        (tiny_with("other.pth"), "do not fit the backbone tiny"),
        (tiny_with("none.pth"), "is not there"),
        (tiny_with("right.pth", instances=3), "Bags have 4 instances, and the model is built for 3"),
    ):
        with pytest.raises(MicaclError, match=said):
            check_run(dataset, str(tmp_path / "run"), config, ScalingConfig(), None)
        assert not (tmp_path / "run" / "config.json").exists()
    data = check_run(dataset, str(tmp_path / "run"), tiny_with("right.pth"), ScalingConfig(), None)
    assert data.config.model.backbone.weights == str(tmp_path / "right.pth")


@pytest.mark.slow
def test_a_run_begins_with_the_file_and_goes_on_without_it(tmp_path: Path) -> None:
    """At a learning rate of nothing the first checkpoint has the file's weights. The file is not looked at again."""
    dataset, run = make_dataset(tmp_path / "ds", {"train": dict.fromkeys(DFEW_LABELS, 2)}, 0), str(tmp_path / "run")
    state = state_of(tiny_cpu().model.backbone)
    url = file_of(tmp_path, pth(state))
    config = tiny_with(url)
    plan = dataclasses.replace(config.plan, global_batch=14)
    still = dataclasses.replace(config.train, epochs=1, lr=1e-12, min_lr=0.0, weight_decay=0.0)
    config, scaling = dataclasses.replace(config, plan=plan, train=still), ScalingConfig(engine="plain")
    said: list[str] = []
    with ray_session(address=None, num_cpus=2):
        train(check_run(dataset, run, config, scaling, None), dataset, run, scaling, said.append)
    assert "\n".join(said).count(f"weights {url}: {len(state)} tensors of the backbone matched") == 1
    weights = read_checkpoint(open_store(run)).weights
    for name, t in state.items():
        torch.testing.assert_close(weights[f"backbone.{name}"], t, rtol=0, atol=1e-6)
    Path(url).unlink()
    check_run(dataset, run, config, scaling, None)
