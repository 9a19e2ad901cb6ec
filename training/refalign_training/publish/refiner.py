"""A refinement's weights as a whole pipeline."""

from pathlib import Path

import torch

from refalign.files import fetch
from refalign.pipeline_refine_by_align import RefineByAlignPipeline
from refalign_training.method.refinement import Refiner
from refalign_training.run.checkpoint import read_tensors
from refalign_training.run.refine import FILES


def write_refiner(
    folder: Path, checkpoint: Path, base: str, revision: str | None, *, average: bool, dtype: torch.dtype
) -> None:
    """
    Writes a pipeline folder with a checkpoint's UNet and projector, and the base's other parts.

    Args:
        base (`str`): the folder or Hub id of the pipeline that was trained.
        average (`bool`): whether the moving average is taken, or the weights of the last step.
        dtype (`torch.dtype`): of all weights.

    Raises:
        ValueError: if the base cannot be had, the checkpoint does not fit it, or a value is not finite in `dtype`.
    """
    pipeline = RefineByAlignPipeline.from_pretrained(fetch(base, FILES, revision), dtype=torch.float32)
    refiner = Refiner(pipeline.unet, pipeline.reference_projector)
    weights = read_tensors(checkpoint, f"{'average' if average else 'weights'}.refiner.")
    try:
        refiner.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{checkpoint} does not fit {base}: {' '.join(str(error).split())[:200]}") from None
    for name, tensor in refiner.to(dtype).state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has values that are not finite in {dtype}. Pass another --dtype or checkpoint.")
    pipeline.vae.to(dtype=dtype)
    pipeline.image_encoder.to(dtype=dtype)
    pipeline.save_pretrained(folder)
