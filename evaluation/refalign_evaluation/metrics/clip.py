"""CLIP's embeddings of images, by transformers' own classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from refalign.files import naming_component
from refalign.transformer_refalign_wan import check_finite
from refalign_evaluation.metrics.weights import check_loaded, without_reports


class Clip:
    """
    The image half of a CLIP, in evaluation mode.

    Args:
        folder (`Path`): the model in transformers' format, with `preprocessor_config.json`.
        name (`str`): what errors name.
        device (`torch.device`): where it runs.

    Attributes:
        dim (`int`): size of an embedding.

    Raises:
        ValueError: if it is not whole, of another kind, or not safetensors.
    """

    def __init__(self, folder: Path, name: str, device: torch.device | str = "cpu") -> None:
        from transformers import CLIPVisionModelWithProjection
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        with naming_component("CLIP model", name), without_reports():
            self._processor = CLIPImageProcessorPil.from_pretrained(folder)
            loaded: Any = CLIPVisionModelWithProjection.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
        model, info = loaded
        check_loaded(name, info)
        check_finite(model.named_parameters(), f"The CLIP model of {name}")
        self._model, self.dim = model.to(device).eval(), model.config.projection_dim

    @torch.no_grad()
    def __call__(self, images: Sequence[Any]) -> torch.Tensor:
        """The embeddings, float32 `(images, dim)`, of RGB images: PIL's, or uint8 `(height, width, 3)`."""
        pixels = self._processor(list(images), return_tensors="pt")["pixel_values"]
        return self._model(pixel_values=pixels.to(self._model.device)).image_embeds
