"""On how many and which machines a run trains: flags, and what can be seen to be wrong about them."""

from __future__ import annotations

from dataclasses import dataclass, field

import ray

from cluster.deepspeed_engine import DeepSpeedConfig
from micacl.train.precision import ComputeConfig
from pipeline.contract import MicaclError


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingConfig:
    """On how many and which machines."""

    workers: int = 2
    """Ranks. plan.global_batch must be a multiple."""
    gpu: bool = False
    """One GPU a worker (NCCL); else CPU (gloo)."""
    cpus_per_worker: int = 1
    max_failures: int = 2
    """Times that the group of workers is started again after one died."""
    decoders: int = 0
    """Ray Data actors per worker, of one CPU each, that read and decode for it; 0: threads of the worker itself."""
    engine: str = "deepspeed"
    """deepspeed | plain"""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        if self.engine not in ("deepspeed", "plain") or min(self.workers, self.cpus_per_worker, self.decoders + 1) < 1:
            raise MicaclError(
                f"--scaling has engine {self.engine!r}, {self.workers} workers, {self.cpus_per_worker} CPUs and "
                f"{self.decoders} decoders each.",
                "The run was not started.",
                "Use engine deepspeed or plain, 1 or more workers and CPUs, 0 or more decoders.",
            )
        if self.engine == "deepspeed" and self.compute != ComputeConfig():
            raise MicaclError(
                "--scaling.compute is set with --scaling.engine deepspeed.",
                "Those settings are the plain engine's.",
                "Add --scaling.engine plain, or use --scaling.deepspeed.bf16 True for DeepSpeed's own bfloat16.",
            )


def require_cpus(scaling: ScalingConfig) -> None:
    """Ray Data waits without end for CPUs that the workers hold."""
    there, wanted = (
        ray.cluster_resources().get("CPU", 0),
        scaling.workers * (scaling.cpus_per_worker + scaling.decoders),
    )
    if scaling.decoders and there < wanted:
        raise MicaclError(
            f"{scaling.workers} workers with {scaling.cpus_per_worker} CPUs and {scaling.decoders} decoders each want "
            f"{wanted} CPUs, the Ray cluster has {there:g}.",
            "The decoders would wait for ever, and training with them.",
            "Add CPU machines, lower --scaling.decoders, or leave it out: then each rank decodes in its own threads.",
        )
