"""VideoMAE as a backbone: a vision transformer over tubelets, by the transformers library (the extra `videomae`).

"VideoMAE: Masked Autoencoders are Data-Efficient Learners for Self-Supervised Video Pre-Training" (Tong et al.,
NeurIPS 2022). A clip is cut into tubelets of `tubelet` frames and `patch` x `patch` pixels, each becomes a token, a
fixed sine-cosine position is added, the encoder's blocks follow. The clip's features are the layer norm of the mean of
all tokens (as in transformers' VideoMAEForVideoClassification), a place in time's the mean of the tokens there.

The position table is that of the pre-training grid, `videomae.grid`. On a clip of another grid it is interpolated (our
choice, the usual one for vision transformers): a clip of 4 frames of 112 pixels meets the table of 16 of 224 at every
fourth place in time. transformers' own forward would start a table of the small grid instead, and refuses sides other
than that of its config. On the pre-training grid the two agree; a test holds them together.

Parameters are those of transformers' VideoMAEModel, without its names' prefix, and `norm`, which is its `fc_norm`.

Shape suffixes: M clips, C colour channels, T frames, H height, W width, t h w places of tokens, S tokens (t h w),
D features, F places in time (t).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from micacl.model.backbone import Backbone, BackboneConfig, VideoMAEConfig, require_clip
from pipeline.contract import MicaclError


class VideoMAE(Backbone):
    """Clips of a multiple of `tubelet` frames, with sides that are multiples of `patch`."""

    def __init__(self, config: BackboneConfig) -> None:
        """Raises MicaclError when transformers is not installed."""
        super().__init__()
        self.config = config
        model = _transformers_model(config.videomae)
        self.embeddings = nn.ModuleDict({"patch_embeddings": model.embeddings.patch_embeddings})
        self.encoder = model.encoder
        self.norm = nn.LayerNorm(config.videomae.hidden)

    def forward(self, clips_MCTHW: Tensor) -> tuple[Tensor, Tensor]:
        require_clip(self.config, *clips_MCTHW.shape[2:])
        patches: Any = self.embeddings["patch_embeddings"]
        x_MDthw: Tensor = patches.projection(clips_MCTHW)
        places = (x_MDthw.shape[2], x_MDthw.shape[3], x_MDthw.shape[4])
        positions_SD = position_table(self.config.videomae, places).to(x_MDthw)
        tokens_MSD = x_MDthw.flatten(2).transpose(1, 2) + positions_SD
        out_MSD: Tensor = self.encoder(tokens_MSD).last_hidden_state
        frames_MFD = out_MSD.reshape(len(out_MSD), places[0], -1, out_MSD.shape[-1]).mean(2)
        features_MD: Tensor = self.norm(out_MSD.mean(1))
        return features_MD, frames_MFD


@lru_cache(maxsize=8)
@torch.inference_mode(mode=False)  # what is kept must serve training too
def position_table(config: VideoMAEConfig, places: tuple[int, int, int]) -> Tensor:
    """(S, D) float32: the sine-cosine table of the pre-training grid, interpolated linearly where `places` differ.

    Entry 2i of place s is sin(s / 10000^(2i / D)), entry 2i + 1 the cosine; s counts w fastest, then h, then t. On the
    CPU, whatever the default device is; do not change it.
    """
    count = config.grid[0] * config.grid[1] * config.grid[2]
    place_S1 = torch.arange(count, dtype=torch.float64, device="cpu")[:, None]
    even_D = torch.arange(config.hidden, device="cpu") // 2 * 2
    angle_SD = place_S1 / 10000.0 ** (even_D / config.hidden)
    is_even_D = even_D == torch.arange(config.hidden, device="cpu")
    table_SD = torch.where(is_even_D, angle_SD.sin(), angle_SD.cos()).float()
    if places == config.grid:
        return table_SD
    table_Dthw = table_SD.T.reshape(-1, *config.grid)
    resized = functional.interpolate(table_Dthw[None], size=places, mode="trilinear", align_corners=False)
    return resized[0].flatten(1).T


def _transformers_model(config: VideoMAEConfig) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MicaclError(
            "backbone.name is 'videomae', and the package transformers is not installed.",
            "Nothing was built.",
            "Install it: pip install -c constraints.txt 'micacl[videomae]'.",
        ) from error
    sizes = transformers.VideoMAEConfig(
        image_size=config.grid[1] * config.patch,
        patch_size=config.patch,
        num_frames=config.grid[0] * config.tubelet,
        tubelet_size=config.tubelet,
        hidden_size=config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.mlp,
    )
    return transformers.VideoMAEModel(sizes)
