"""ray_cluster.yaml and serve.yaml against Ray's own parsers, pyproject.toml and a few rules of the house. Offline."""

from __future__ import annotations

import copy
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from pydantic import BaseModel
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import (
    DeploymentSchema,
    HTTPOptionsSchema,
    LoggingConfig,
    RayActorOptionsSchema,
    ServeApplicationSchema,
    ServeDeploySchema,
)

ROOT = Path(__file__).resolve().parents[1]
CLUSTER, SERVE = ROOT / "ray_cluster.yaml", ROOT / "cluster" / "deploy" / "serve.yaml"
SECRETS = (
    r"\b(AKIA|ASIA)[A-Z0-9]{16}\b",  # AWS access keys
    r"(?<![A-Za-z0-9/+])[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+])",  # AWS secret keys
    r"\b[0-9a-f]{32,}\b",  # hex tokens
    r"-----BEGIN",
    r"(?i)(password|secret|(?<!http)token|access_key)[\w-]*\s*[:=]\s*['\"]?[A-Za-z0-9+_-]{8,}['\"]?\s*$",
)


@pytest.fixture
def cluster() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(CLUSTER.read_text())
    return loaded


@pytest.fixture
def serve() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(SERVE.read_text())
    return loaded


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    loaded: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return loaded


def images(cluster: dict[str, Any]) -> list[str]:
    blocks = [cluster["docker"], *(kind.get("docker", {}) for kind in cluster["available_node_types"].values())]
    return [value for block in blocks for key, value in block.items() if key.endswith("image")]


def strings(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from strings(item)
            yield f"{key}: {item}"
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)
    else:
        yield str(value)


def is_secret(text: str) -> bool:
    return any(re.search(pattern, text) for pattern in SECRETS)


def test_the_cluster_file_passes_rays_own_preparation_and_schema(cluster: dict[str, Any]) -> None:
    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    assert set(prepared["available_node_types"]) == {"head", "prepare", "train"}
    # Ray lays the file over its defaults: a list that we forget would bring Ray's, which install another Ray.
    assert prepared["worker_setup_commands"] == cluster["setup_commands"] == prepared["head_setup_commands"]
    assert set(prepared) == set(cluster), "a top-level field is left to Ray's defaults"


def test_rays_schema_refuses_an_unknown_field(cluster: dict[str, Any]) -> None:
    cluster["available_node_types"]["train"]["max_worker"] = 3
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(prepare_config(cluster))


def test_no_pool_is_larger_than_the_cluster_and_both_start_empty(cluster: dict[str, Any]) -> None:
    kinds = cluster["available_node_types"]
    for name, kind in kinds.items():
        assert kind["min_workers"] == 0, name
        assert kind["max_workers"] <= cluster["max_workers"], name
    assert cluster["max_workers"] <= sum(kind["max_workers"] for kind in kinds.values())
    assert 0 < cluster["idle_timeout_minutes"] <= 30


def test_the_head_takes_no_work(cluster: dict[str, Any]) -> None:
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert head["max_workers"] == 0
    assert "--num-cpus=0" in cluster["head_start_ray_commands"][-1].split()


def test_prepare_is_spot_and_the_others_are_not(cluster: dict[str, Any]) -> None:
    market = {
        name: kind["node_config"].get("InstanceMarketOptions", {}).get("MarketType")
        for name, kind in cluster["available_node_types"].items()
    }
    assert market == {"head": None, "prepare": "spot", "train": None}


def test_every_disk_is_encrypted_and_ends_with_its_machine(cluster: dict[str, Any]) -> None:
    for kind in cluster["available_node_types"].values():
        for disk in kind["node_config"]["BlockDeviceMappings"]:
            assert disk["Ebs"]["Encrypted"] is True
            assert disk["Ebs"]["DeleteOnTermination"] is True
        assert kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required"


def test_images_carry_the_ray_and_python_that_the_project_declares(
    cluster: dict[str, Any], project: dict[str, Any]
) -> None:
    pin = next(r.specifier for r in map(Requirement, project["dependencies"]) if r.name == "ray")
    found = images(cluster)
    assert len(found) == 2
    for image in found:
        match = re.fullmatch(r"rayproject/ray:(\d+\.\d+\.\d+)-py3(\d+)-(cpu|gpu)", image)
        assert match, image
        assert pin.contains(match[1]), f"{image} is not ray{pin}"
        assert SpecifierSet(project["requires-python"]).contains(f"3.{match[2]}")
    assert len({image.rpartition("-")[0] for image in found}) == 1, "head and workers must run the same Ray and python"
    assert cluster["available_node_types"]["train"]["docker"]["worker_image"].endswith("-gpu")


def test_ray_asks_for_a_token_and_the_token_is_a_file(cluster: dict[str, Any]) -> None:
    options = " ".join(cluster["docker"]["run_options"])
    path = re.search(r"-e RAY_AUTH_TOKEN_PATH=(\S+)", options)
    assert "-e RAY_AUTH_MODE=token" in options
    assert path
    assert str(Path(path[1]).parent) in cluster["file_mounts"]
    assert "RAY_AUTH_TOKEN=" not in options


def test_the_checkout_is_not_mounted(cluster: dict[str, Any]) -> None:
    local = [Path(path).expanduser() for path in cluster["file_mounts"].values()]
    for path in local:
        full = path if path.is_absolute() else ROOT / path
        assert not ROOT.is_relative_to(full), f"{path} holds the whole checkout"
    mounted = tuple(cluster["file_mounts"])
    for command in cluster["setup_commands"]:
        assert all(word.startswith(mounted) for word in command.split() if word.startswith("/"))
    assert "constraints.txt" in cluster["setup_commands"][0]


@pytest.mark.parametrize("file", [CLUSTER, SERVE], ids=lambda path: path.name)
def test_nothing_looks_like_a_secret(file: Path) -> None:
    text = file.read_text()
    found = [line for line in (*strings(yaml.safe_load(text)), *text.splitlines()) if is_secret(line)]
    assert found == []


def test_the_secret_patterns_find_secrets() -> None:
    key, secret = "AKIA" + "A" * 16, "aws_secret_access_key: " + "x" * 40
    for text in (key, secret, "RAY_AUTH_TOKEN=" + "c0ffee" * 8, "password: hunter22"):
        assert is_secret(text), text


def test_the_serve_file_passes_rays_schema(serve: dict[str, Any]) -> None:
    schema = ServeDeploySchema.model_validate(serve)
    (application,) = schema.applications
    assert application.import_path == "cluster.serve.app:build"
    assert set(application.args) == {"bundle"}
    assert [deployment.name for deployment in application.deployments] == ["Ingress", "Classifier"]
    for deployment in application.deployments:
        assert isinstance(deployment.max_queued_requests, int)
        assert deployment.max_queued_requests > 0, "an unbounded queue"
        assert isinstance(deployment.num_replicas, int)
    assert str(schema.http_options.host) == "127.0.0.1"


def test_serve_knows_every_field(serve: dict[str, Any]) -> None:
    """Serve's schema drops a deployment's unknown fields without a word, so a misspelt limit would be no limit."""
    (application,) = serve["applications"]
    levels: list[tuple[type[BaseModel], dict[str, Any]]] = [
        (ServeDeploySchema, serve),
        (HTTPOptionsSchema, serve["http_options"]),
        (LoggingConfig, serve["logging_config"]),
        (ServeApplicationSchema, application),
        *((DeploymentSchema, deployment) for deployment in application["deployments"]),
        *((RayActorOptionsSchema, deployment["ray_actor_options"]) for deployment in application["deployments"]),
    ]
    for schema, block in levels:
        assert set(block) <= set(schema.model_fields), schema.__name__
