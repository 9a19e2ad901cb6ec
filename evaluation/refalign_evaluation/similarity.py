"""What says how similar two squares of images are: the cosine of what a vision model makes of each."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from refalign.files import fetch, read_json
from refalign_evaluation.alignment import encode
from refalign_evaluation.metrics.clip import Clip
from refalign_training.method.teachers import load_teacher


if TYPE_CHECKING:
    from refalign.pipeline_refine_by_align import RefineByAlignPipeline

Features = Callable[[Sequence[Image.Image]], torch.Tensor]
CLIPS = ("clip", "clip_vision_model")  # a configuration's `model_type`
CLIP_FILES = ("config.json", "preprocessor_config.json", "model.safetensors*", "model-*.safetensors")


def load_features(name: str | None, pipeline: "RefineByAlignPipeline") -> Features:
    """
    What gives a feature of length 1 of each RGB square, `(images, dim)`: of CLIP its embedding of the image, of others
    the mean of their patch tokens.

    Args:
        name (`str`, *optional*): a CLIP, or a teacher of [`load_teacher`], as a folder or a Hub id; by default the
            pipeline's own image encoder.

    Raises:
        ValueError: if there is no such model, it is of another kind, or it is not whole.
    """
    find = _own_features(pipeline)
    if name is not None:
        config = fetch(name, ("config.json",)) / "config.json"
        is_clip = config.is_file() and read_json(config).get("model_type") in CLIPS
        find = Clip(fetch(name, CLIP_FILES), name) if is_clip else _teacher_features(name)
    return lambda images: F.normalize(find(images), dim=-1)


def _own_features(pipeline: "RefineByAlignPipeline") -> Features:
    size = pipeline.config["reference_size"]
    return lambda images: encode(pipeline, [image.resize((size, size)) for image in images]).mean(dim=1)


def _teacher_features(name: str) -> Features:
    teacher = load_teacher(name)

    def features(images: Sequence[Image.Image]) -> torch.Tensor:
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
        return teacher(pixels, grid=(14, 14)).flatten(1, 2).mean(dim=1)

    return features
