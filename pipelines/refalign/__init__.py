"""RefAlign for diffusers: reference-to-video generation (arXiv 2603.25743).

Names are imported when they are first used, so that `import refalign` and `refalign --help` answer at once.
"""

import importlib
from typing import Any


__version__ = "0.1.0"

_MODULES = {
    "RefAlignWanPipeline": "refalign.pipeline_refalign_wan",
    "RefAlignWanTransformer3DModel": "refalign.transformer_refalign_wan",
    "RefineByAlignPipeline": "refalign.pipeline_refine_by_align",
    "ReferenceProjector": "refalign.reference_projector",
    "letterbox": "refalign.reference_images",
    "load_reference_image": "refalign.reference_images",
    "prepare_reference_image": "refalign.reference_images",
    "prepare_reference_images": "refalign.reference_images",
    "native_to_diffusers": "refalign.keys",
    "diffusers_to_native": "refalign.keys",
    "write_video": "refalign.video",
    "ModelMixin": "diffusers",  # diffusers looks here for the base class of the components named ["refalign", ...]
}

__all__ = [*_MODULES, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll] (names of __getattr__)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'refalign' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
