"""Tiny models of the classes that metrics use, and videos for them; no network is needed."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from refalign.video import write_video
from refalign_evaluation.metrics.aesthetics import Head
from refalign_evaluation.metrics.curricular_face import CurricularFace


RED, MAGENTA = (230, 20, 20), (230, 20, 230)
FACE_NETWORK = {"blocks": (1, 1, 1, 1), "widths": (4, 4, 8, 8)}


def texture(height: int = 96, width: int = 128, seed: int = 0) -> np.ndarray:
    """A smooth random picture, whose motion can be seen."""
    import cv2

    noise = np.random.default_rng(seed).uniform(0, 255, (height, width, 3))
    smooth = cv2.GaussianBlur(noise, (0, 0), 3)
    low, high = smooth.min(), smooth.max()
    return ((smooth - low) / (high - low) * 255).astype(np.uint8)


def write_noise(path: Path, frames: int = 5, seed: int = 0) -> Path:
    """A small video of other noise in each frame."""
    generator = np.random.default_rng(seed)
    return write_video(list(generator.integers(0, 255, (frames, 48, 64, 3), dtype=np.uint8)), path)


# -- Aesthetics -------------------------------------------------------------------------------------------------------


def write_clip(folder: Path, dim: int = 768) -> Path:
    """A random CLIP with a tiny image model, text model and all, as the Hub has it."""
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(1)
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**tiny, "image_size": 224, "patch_size": 56, "projection_dim": dim}
    text = {**tiny, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "projection_dim": dim}
    CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=dim)).save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)
    return folder


def write_head(file: Path) -> Path:
    torch.manual_seed(2)
    save_file(Head().state_dict(), file)
    return file


# -- Faces ------------------------------------------------------------------------------------------------------------


def write_detector(folder: Path) -> Path:
    """
    A detector in insightface's SCRFD format for 320x320 pixels: it takes red and magenta cells of 32x32 for faces;
    those of magenta ones are twice as large.
    """
    from onnx import TensorProto, helper, numpy_helper, save

    def constant(name: str, value: np.ndarray) -> None:
        nodes.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value)))

    def pooled(name: str, weights: tuple[float, float, float], bias: float) -> None:
        constant(f"{name}_w", np.array(weights, np.float32).reshape(1, 3, 1, 1))
        constant(f"{name}_b", np.array([bias], np.float32))
        nodes.append(helper.make_node("Conv", ["image", f"{name}_w", f"{name}_b"], [f"{name}_all"]))
        nodes.append(
            helper.make_node("AveragePool", [f"{name}_all"], [f"{name}_p"], kernel_shape=[32, 32], strides=[32, 32])
        )
        nodes.append(helper.make_node("Reshape", [f"{name}_p", "column"], [name]))

    nodes: list = []
    constant("column", np.array([100, 1]))
    pooled("red", (0.5, -0.5, 0.0), 0.0)
    pooled("reach", (0.0, 0.0, 0.5), 1.5)
    constant("none", np.zeros((100, 1), np.float32))
    constant("cells", np.array([200, 1]))
    constant("boxes", np.array([200, 4]))
    nodes.append(helper.make_node("Concat", ["red", "none"], ["pairs"], axis=1))
    nodes.append(helper.make_node("Reshape", ["pairs", "cells"], ["score_32"]))
    nodes.append(helper.make_node("Concat", ["reach"] * 8, ["reaches"], axis=1))
    nodes.append(helper.make_node("Reshape", ["reaches", "boxes"], ["box_32"]))
    points = [-0.35, -0.3, 0.35, -0.3, 0, 0, -0.25, 0.35, 0.25, 0.35]
    constant("points_32", np.tile(np.array(points, np.float32), (200, 1)))
    for stride, count in ((8, 3200), (16, 800)):
        for name, size in (("score", 1), ("box", 4), ("points", 10)):
            constant(f"{name}_{stride}", np.zeros((count, size), np.float32))
    outputs = []
    for name, size in (("score", 1), ("box", 4), ("points", 10)):
        for stride, count in ((8, 3200), (16, 800), (32, 200)):
            outputs.append(helper.make_tensor_value_info(f"{name}_{stride}", TensorProto.FLOAT, [count, size]))
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 320, 320])
    graph = helper.make_graph(nodes, "detector", [image], outputs)
    folder.mkdir(parents=True)
    save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9),
        str(folder / "det_tiny.onnx"),
    )
    return folder


def write_face_network(file: Path) -> Path:
    torch.manual_seed(3)
    save_file(CurricularFace(**FACE_NETWORK).state_dict(), file)
    return file


def draw(*faces: tuple[int, int, tuple[int, int, int]], side: int = 320, size: int = 64) -> np.ndarray:
    """A grey picture with faces for the tiny detector: squares of a colour at (row, column)."""
    picture = np.full((side, side, 3), 128, np.uint8)
    for row, column, colour in faces:
        picture[row : row + size, column : column + size] = colour
    return picture


# -- GME --------------------------------------------------------------------------------------------------------------

MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


def write_gme(folder: Path) -> Path:
    """A random Qwen2-VL with a tokenizer of bytes, in the layout of GME's repo on the Hub."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"additional_special_tokens": list(MARKS), "pad_token": "<|endoftext|>"})
    fast.save_pretrained(folder)
    torch.manual_seed(4)
    text = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": len(fast),
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
        "bos_token_id": None,
        "eos_token_id": fast.convert_tokens_to_ids("<|im_end|>"),
    }
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    image = fast.convert_tokens_to_ids("<|image_pad|>")
    config = Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=image, video_token_id=1)
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12845056).save_pretrained(folder)
    return folder
