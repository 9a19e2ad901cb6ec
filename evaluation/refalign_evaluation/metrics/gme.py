"""
GmeScore: how well frames fit the prompt, as GME says (arXiv 2412.16855).

- Source: `eval/get_gmescore.py` of OpenS2V-Nexus, and `gme_inference.py` of `Alibaba-NLP/gme-Qwen2-VL-7B-Instruct`,
  built from transformers' Qwen2-VL: no code of the model's folder is run.
- Raw score: the cosine of the prompt's embedding and a frame's, the mean of 32 frames.
- Score: each video's raw score is clipped to 1; the mean is the score.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from refalign.files import naming_component
from refalign_evaluation.benchmark import BenchmarkSample
from refalign_evaluation.metrics.frames import FRAMES, spread_frames
from refalign_evaluation.metrics.weights import check_loaded, fetch_model, without_reports


if TYPE_CHECKING:
    from transformers import Qwen2VLModel

QUERY = "Find an image that matches the given text."
DEFAULT = "You are a helpful assistant."
# The embedding is the last token's hidden state
TEMPLATE = (
    "<|im_start|>system\n{instruction}<|im_end|>\n<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
    "<|endoftext|>"
)
IMAGE_TOKEN = "<|image_pad|>"
LONGEST = 1800  # tokens
CELL = 28  # pixels of a token's side
FIRST_SIZES = (4 * CELL**2, 16384 * CELL**2)  # least and most pixels as an image is read
SIZES = (256 * CELL**2, 1280 * CELL**2)  # and as it is then given to the model
BATCH = 8


class Gme:
    """Measures videos, by GME (a folder or Hub id)."""

    def __init__(self, model: str, device: torch.device) -> None:
        self._name, self._device = model, device
        self._folder, weights = fetch_model(model)
        # In 16 bits, as the official tool has it, but on a CPU, which is slow at these
        self._dtype = torch.float32 if device.type == "cpu" else torch.float16
        dtype = str(self._dtype).removeprefix("torch.")
        self.settings: dict[str, Any] = {"frames": FRAMES, "model": weights, "dtype": dtype}

    def load(self) -> None:
        """Loads the model; ValueError if it is another than that which is needed."""
        _ = self._model, self._processors

    @cached_property
    def _model(self) -> "Qwen2VLModel":
        from transformers import Qwen2VLConfig, Qwen2VLModel

        with naming_component("GME model", self._name), without_reports():
            config = Qwen2VLConfig.from_pretrained(self._folder)  # its own class is remote code, with the same fields
            loaded: Any = Qwen2VLModel.from_pretrained(
                self._folder, config=config, use_safetensors=True, dtype=self._dtype, output_loading_info=True
            )
        model, info = loaded
        check_loaded(self._name, info)
        return model.to(self._device).eval()

    @cached_property
    def _processors(self) -> tuple[Any, Any]:
        from transformers import AutoTokenizer, Qwen2VLConfig
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        least, most = SIZES
        with naming_component("GME model", self._name):
            # With a class of its own in the folder, transformers would ask at the terminal whether to run its code
            config = Qwen2VLConfig.from_pretrained(self._folder)
            tokenizer = AutoTokenizer.from_pretrained(self._folder, config=config, trust_remote_code=False)
            images = Qwen2VLImageProcessorPil.from_pretrained(self._folder, min_pixels=least, max_pixels=most)
        return tokenizer, images

    def measure(self, video: Path, sample: BenchmarkSample) -> float:
        """
        The raw score of a video.

        Raises:
            Unusable: if the video cannot be read.
        """
        return self.measure_frames(spread_frames(video), sample.prompt)

    def measure_frames(self, frames: Sequence[np.ndarray], prompt: str) -> float:
        """The mean cosine of frames, each RGB, uint8 `(height, width, 3)`, and a prompt."""
        embeddings = torch.cat(list(self.embed_frames(frames)))
        return (embeddings @ self.embed_text(prompt)).mean().item()

    @torch.no_grad()
    def embed_text(self, text: str, instruction: str = QUERY) -> torch.Tensor:
        """The embedding `(dim,)` of a text that asks for something, of length 1."""
        tokens = self._tokens(TEMPLATE.format(instruction=instruction, content=text))
        return self._last(self._model.language_model.embed_tokens(tokens))[0]

    @torch.no_grad()
    def embed_frames(self, frames: Sequence[np.ndarray]) -> Iterator[torch.Tensor]:
        """The embeddings `(batch, dim)` of images of one size, each of length 1."""
        _, processor = self._processors
        for start in range(0, len(frames), BATCH):
            images = list(map(_resize, frames[start : start + BATCH]))
            inputs = processor(images, return_tensors="pt")
            yield self._embed_images(inputs["pixel_values"], inputs["image_grid_thw"])

    def _embed_images(self, pixels: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        model, (_, processor) = self._model, self._processors
        count = int(grids[0].prod()) // processor.merge_size**2
        content = f"<|vision_start|>{IMAGE_TOKEN * count}<|vision_end|>"
        tokens = self._tokens(TEMPLATE.format(instruction=DEFAULT, content=content)).repeat(len(grids), 1)
        embedded = model.language_model.embed_tokens(tokens)
        features = model.visual(pixels.to(self._device, self._dtype), grid_thw=grids.to(self._device)).pooler_output
        embedded[tokens == model.config.image_token_id] = features.to(embedded.dtype)
        return self._last(embedded)

    def _last(self, embedded: torch.Tensor) -> torch.Tensor:
        # GME was made with positions that count through an image's tokens, not with Qwen2-VL's rows and columns:
        # the language model alone does so
        hidden = self._model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state[:, -1]
        return torch.nn.functional.normalize(hidden.float(), dim=-1).cpu()

    def _tokens(self, text: str) -> torch.Tensor:
        tokenizer, _ = self._processors
        return tokenizer(text, truncation=True, max_length=LONGEST, return_tensors="pt").input_ids.to(self._device)


def _resize(frame: np.ndarray) -> Image.Image:
    """A frame in sides that are multiples of 28, as GME reads images."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    image = Image.fromarray(frame)
    least, most = FIRST_SIZES
    height, width = smart_resize(image.height, image.width, CELL, least, most)
    return image.resize((width, height))
