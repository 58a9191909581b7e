"""Run a function on N gloo processes on this machine and get what each rank returned."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn


def run_ranks(function: Callable[..., Any], ranks: int, folder: Path, *args: Any) -> list[Any]:
    """`function(rank, ranks, *args)` in `ranks` processes; its return values by rank. A failing rank fails all."""
    folder.mkdir(parents=True, exist_ok=True)
    spawn(_main, args=(function, ranks, str(folder), args), nprocs=ranks)  # type: ignore[no-untyped-call]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def _main(rank: int, function: Callable[..., Any], ranks: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    Path(folder, f"{rank}.json").write_text(json.dumps(function(rank, ranks, *args)))
    dist.destroy_process_group()
