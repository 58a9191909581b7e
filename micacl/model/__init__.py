"""The model: backbone, instance interaction (GEIIM), aggregation (WIAN), and MICACL, which joins them."""

from __future__ import annotations

from micacl.model.backbone import Backbone, BackboneConfig, load_torchvision_weights
from micacl.model.geiim import GEIIM, GEIIMConfig
from micacl.model.micacl import MICACL, ModelConfig, Output, build_model, parameter_count
from micacl.model.wian import WIAN, WIANConfig

__all__ = [
    "GEIIM",
    "MICACL",
    "WIAN",
    "Backbone",
    "BackboneConfig",
    "GEIIMConfig",
    "ModelConfig",
    "Output",
    "WIANConfig",
    "build_model",
    "load_torchvision_weights",
    "parameter_count",
]
