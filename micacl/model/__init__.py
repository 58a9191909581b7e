"""The model: backbone, instance interaction (GEIIM), aggregation (WIAN), class scores, and MICACL, which joins them."""

from __future__ import annotations

from micacl.model.backbone import Backbone, BackboneConfig, VideoMAEConfig, build_backbone
from micacl.model.geiim import GEIIM, GEIIMConfig
from micacl.model.micacl import MICACL, ModelConfig, Output, build_model, parameter_count
from micacl.model.weights import WeightReport, load_encoder_weights
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
    "VideoMAEConfig",
    "WIANConfig",
    "WeightReport",
    "build_backbone",
    "build_model",
    "load_encoder_weights",
    "parameter_count",
]
