"""GGUF files of small transformers, as converters for ComfyUI write them."""

from collections.abc import Mapping
from pathlib import Path

import gguf
import torch


def write_gguf(
    file: Path, tensors: Mapping[str, torch.Tensor], kind: str = "Q8_0", architecture: str | None = "wan"
) -> Path:
    """Matrices whose rows can be divided are quantised; the rest is in float16 or, where it is small, float32."""
    quantized = gguf.GGMLQuantizationType[kind]
    block, _ = gguf.GGML_QUANT_SIZES[quantized]
    writer = gguf.GGUFWriter(file, architecture)
    for name, tensor in tensors.items():
        array = tensor.detach().float().numpy()
        if array.ndim == 2 and array.shape[1] % block == 0:
            writer.add_tensor(name, gguf.quants.quantize(array, quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(name, array.astype("float16") if array.ndim > 1 else array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
