"""Raw videos -> face tracks -> bags -> shards -> a balanced stream. No torch here; ray only in prepare.py."""

import os

# onnxruntime's wheel for Linux (1.32) makes a device id in the home folder when it is imported, and knows a server to
# report to. Faces are worked on here: nothing is reported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.dataset import open_dataset
    from pipeline.decode import StreamConfig
    from pipeline.policies import PlanConfig

__all__ = ["PlanConfig", "StreamConfig", "open_dataset"]
_HOMES = {"open_dataset": "pipeline.dataset", "PlanConfig": "pipeline.policies", "StreamConfig": "pipeline.decode"}


def __getattr__(name: str) -> Any:
    """What a user of the stream needs, loaded when it is asked for: the command's help should not wait for Arrow."""
    if name not in _HOMES:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
