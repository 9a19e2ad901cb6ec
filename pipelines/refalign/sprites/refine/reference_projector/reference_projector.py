"""What Refine-by-Align's UNet attends to (arXiv 2412.00306): tokens made of a reference's patches.

A Hub repo carries this file in `reference_projector/` and at its root, so it stands alone. [P], [O] and [Q] are those
of `pipeline_refine_by_align.py`.
"""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn


class ReferenceProjector(ModelMixin, ConfigMixin):
    """
    What the UNet attends to: an MLP of the image encoder's patch tokens [P], here Linear, GELU, Linear, LayerNorm, and
    a learnt null embedding for dropped conditions and classifier-free guidance [O, Q].

    Args:
        image_dim (`int`): width of the image encoder's tokens.
        cross_attention_dim (`int`): width of the UNet's cross-attention.
    """

    @register_to_config
    def __init__(self, image_dim: int = 1024, cross_attention_dim: int = 768) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(image_dim, cross_attention_dim),
            nn.GELU(),
            nn.Linear(cross_attention_dim, cross_attention_dim),
            nn.LayerNorm(cross_attention_dim),
        )
        self.null_embedding = nn.Parameter(torch.randn(1, 1, cross_attention_dim) * 0.02)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, image_dim)` to `(batch, tokens, cross_attention_dim)`."""
        return self.layers(patches)

    def null(self, batch_size: int, tokens: int) -> torch.Tensor:
        """The condition that says nothing, `(batch_size, tokens, cross_attention_dim)`."""
        return self.null_embedding.expand(batch_size, tokens, -1)
