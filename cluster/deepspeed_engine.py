"""The DeepSpeed engine: ZeRO-1 by default. The only file that imports deepspeed.

Two places reach into DeepSpeed 0.19.8 (pinned for that reason), both tested against the plain engine:

* on CPU it would compile `deepspeed_shm_comm` at start (a minute, a C++ compiler, ninja) for an operation that
  training does not use; the table of ops is told that it is not there;
* optimiser moments come and go whole, by parameter name, through its fragment API, so that a checkpoint is plain
  safetensors and fits any number of ranks. Its own checkpoints are pickle and fit one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from micacl.loss.gather import gather_with_gradient
from micacl.model.micacl import MICACL, Output
from micacl.train.engine import MOMENTS, Staged, Tensors, mean_over_ranks
from micacl.train.optim import OptimConfig, make_optimizer, of_head, set_lr
from pipeline.contract import MicaclError


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepSpeedConfig:
    """What of DeepSpeed is ours to choose. The rest follows from the run."""

    stage: int = 1
    """ZeRO stage, 0 or 1: at 36 M parameters there is little to shard and stage 2 and up cost time."""
    bf16: bool = False
    """Weights and activations in bfloat16 with fp32 masters; for GPUs."""

    def __post_init__(self) -> None:
        if self.stage not in (0, 1):
            raise MicaclError(
                f"--deepspeed.stage is {self.stage}.",
                "Checkpoints of that stage are not tested here.",
                "Use 1 (or 0 for plain data parallel).",
            )


class DeepSpeedEngine:
    """One rank of a DeepSpeed run on the process group that is up. See micacl.train.engine.Engine."""

    def __init__(
        self,
        model: MICACL,
        config: OptimConfig,
        *,
        clips_per_rank: int,
        deepspeed: DeepSpeedConfig,
        device: torch.device,
    ) -> None:
        ds = _import_deepspeed(device)
        self.rank, self.ranks, self.device = dist.get_rank(), dist.get_world_size(), device
        self.model, self.bf16, self.head_only = model.to(device), deepspeed.bf16, False
        self._staged = Staged(self.model)
        self._inner = make_optimizer(self.model, config)
        self._engine: Any = ds.initialize(
            model=self._staged,
            optimizer=self._inner,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": clips_per_rank,
                "gradient_accumulation_steps": 1,
                "zero_optimization": {"stage": deepspeed.stage},
                "zero_allow_untested_optimizer": True,
                "gradient_clipping": config.clip_norm,
                "bf16": {"enabled": deepspeed.bf16},
                "steps_per_print": 10**9,
                "wall_clock_breakdown": False,
            },
        )[0]
        if self._sharded:
            self._make_states()

    def forward(self, clips_BNCTHW: Tensor) -> Output:
        x_BNCTHW = clips_BNCTHW.bfloat16() if self.bf16 else clips_BNCTHW
        self._staged.head_only = self.head_only
        output: Output = self._engine(x_BNCTHW)
        return output

    def step(self, loss: Tensor, lr: float) -> None:
        set_lr(self._inner, lr, head_only=self.head_only)
        self._engine.backward(loss)
        self._engine.step()

    def gather(self, x: Tensor) -> Tensor:
        return gather_with_gradient(x)

    def mean(self, x: Tensor) -> Tensor:
        return mean_over_ranks(x, self.ranks)

    def export_state(self) -> tuple[Tensors, Tensors]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        weights = {name: t.detach().cpu().clone() for name, t in self.model.state_dict().items()}
        moments: Tensors = {}
        for name, p in self.model.named_parameters():
            if not self._sharded:
                state = self._inner.state.get(p, {})
                moments |= {f"{kind}.{name}": state[kind].detach().cpu().clone() for kind in MOMENTS if kind in state}
                continue
            weights[name] = safe_get_full_fp32_param(p).detach().cpu().clone()
            for kind in MOMENTS:
                moments[f"{kind}.{name}"] = safe_get_full_optimizer_state(p, kind).detach().cpu().clone()
        return weights, moments

    def import_state(
        self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], step: int, head_step: int | None = None
    ) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        self.model.load_state_dict(dict(weights), strict=True)
        head_step = step if head_step is None else head_step
        if not self._sharded:
            for name, p in self.model.named_parameters():
                if f"exp_avg.{name}" in moments:
                    state: Tensors = {kind: moments[f"{kind}.{name}"].to(self.device).clone() for kind in MOMENTS}
                    done = head_step if of_head(name) else step
                    self._inner.state[p] = {**state, "step": torch.tensor(float(done))}
            return
        self._set_steps(step, head_step)
        for name, p in self.model.named_parameters():
            safe_set_full_fp32_param(p, weights[name].to(self.device))
            for kind in MOMENTS:
                safe_set_full_optimizer_state(p, moments[f"{kind}.{name}"].to(self.device), kind)

    def restart_head(self) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        self.model.head.load_state_dict(self._staged.first_head)
        if not self._sharded:
            for p in self.model.head.parameters():
                self._inner.state.pop(p, None)
            return
        self._set_steps(None, 0)
        for name, p in self.model.head.named_parameters():
            safe_set_full_fp32_param(p, self._staged.first_head[name].to(self.device).float())
            for kind in MOMENTS:
                safe_set_full_optimizer_state(p, torch.zeros_like(p, dtype=torch.float32), kind)

    def _set_steps(self, step: int | None, head_step: int) -> None:
        """Adam's count of updates: of the head's groups, and of the others unless None."""
        zero = self._engine.optimizer
        for group, flat in zip(self._inner.param_groups, zero.single_partition_of_fp32_groups, strict=True):
            done = head_step if group["head"] else step
            if done is not None:
                zero.optimizer.state[flat]["step"].fill_(float(done))

    @property
    def _sharded(self) -> bool:
        return hasattr(self._engine.optimizer, "single_partition_of_fp32_groups")

    def _make_states(self) -> None:
        """Zero moments for every parameter group, linked to the parameters.

        DeepSpeed links them after the first group's first update, when the other groups have none yet.
        """
        zero = self._engine.optimizer
        for flat in zero.single_partition_of_fp32_groups:
            moments = {kind: torch.zeros_like(flat) for kind in MOMENTS}
            zero.optimizer.state[flat] = {**moments, "step": torch.tensor(0.0)}
        zero._lazy_init_hp_params_optimizer_state()


def _import_deepspeed(device: torch.device) -> Any:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if device.type == "cuda" else "cpu")
    import deepspeed
    import deepspeed.ops

    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
