"""`refalign refine init`: a Refine-by-Align pipeline to be trained, from public weights.

Nothing heavy is imported before it is needed, so that `--help` answers at once.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from refalign.files import check_free, fetch, naming_component, new_folder, read_json


CONFIGS = ("model_index.json", "*/*config.json", "config.json")
TOKENS_PER_SIDE = 16  # of a reference [P]
SEED = 0  # of the projector
CARD = """# Untrained

This Refine-by-Align pipeline (arXiv 2412.00306) was made by `refalign refine init` and **is not trained**: its
reference projector is random, and its UNet has never seen a reference. Train it with `refalign-train run` before it
refines anything.

- UNet, VAE and scheduler: {inpainting}, under its own licence
- Image encoder: {image_encoder}, under its own licence
"""


@dataclass(frozen=True)
class RefineInit:
    """Make a Refine-by-Align pipeline folder to be trained, from an inpainting model and an image encoder. It does not
    refine anything before it is trained."""

    inpainting: str
    """A Stable Diffusion 1.x inpainting pipeline in diffusers' format, as a folder or a Hub id. Its VAE and its UNet,
    which takes 9 channels, are taken."""
    image_encoder: str
    """DINOv2, with or without registers, as a folder or a Hub id."""
    output: Path
    """The pipeline folder to write. It must not exist."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """The type in which weights are stored. Training computes in its own."""


def run(command: RefineInit) -> int:
    init(command.inpainting, command.image_encoder, command.output, command.dtype)
    print(
        f"Wrote {command.output}. It is untrained: its projector is random, so it refines nothing yet. Train it with "
        "`refalign-train run`."
    )
    return 0


def init(inpainting: str, image_encoder: str, output: str | Path, dtype: str = "float16") -> Path:
    """
    Writes an untrained Refine-by-Align pipeline into the new folder `output`.

    Raises:
        ValueError: if a part is of another kind, which is told before weights are downloaded or read.
    """
    check_free(output)
    unet_config = _check_inpainting(inpainting)
    encoder_config = _check_encoder(image_encoder)
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import AutoModel

    from refalign.pipeline_refine_by_align import RefineByAlignPipeline, cross_attention_blocks
    from refalign.reference_projector import ReferenceProjector

    stored = getattr(torch, dtype)
    options: dict[str, Any] = {"dtype": stored, "use_safetensors": True}
    with naming_component("UNet and VAE", inpainting):
        unet = UNet2DConditionModel.from_pretrained(inpainting, subfolder="unet", **options)
        vae = AutoencoderKL.from_pretrained(inpainting, subfolder="vae", **options)
        scheduler: Any = DDIMScheduler.from_pretrained(inpainting, subfolder="scheduler", clip_sample=False)
    with naming_component("image encoder", image_encoder):
        encoder = AutoModel.from_pretrained(image_encoder, **options)
    torch.manual_seed(SEED)
    projector = ReferenceProjector(encoder_config["hidden_size"], unet_config["cross_attention_dim"])
    for parameter in projector.parameters():  # not `to`, of which diffusers warns without a reason
        parameter.data = parameter.data.to(stored)
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    pipeline = RefineByAlignPipeline(
        vae=vae,
        unet=unet,
        image_encoder=encoder,
        reference_projector=projector,
        scheduler=scheduler,
        image_size=unet_config["sample_size"] * factor,
        reference_size=TOKENS_PER_SIDE * encoder_config["patch_size"],
        alignment_block=len(cross_attention_blocks(unet)) * 9 // 16,  # the paper's 9 of 16
    )
    with new_folder(output) as folder:
        pipeline.save_pretrained(folder)
        card = CARD.format(inpainting=_told(inpainting), image_encoder=_told(image_encoder))
        (folder / "README.md").write_text(card, "utf-8")
    return Path(output)


def _check_inpainting(inpainting: str) -> dict[str, Any]:
    """The configuration of the UNet of an inpainting pipeline; ValueError if it is of another kind."""
    folder = fetch(inpainting, CONFIGS)
    file = folder / "unet/config.json"
    if not file.is_file():
        raise ValueError(
            f"{inpainting} is not an inpainting pipeline in diffusers' format: it has no unet/config.json. Pass one "
            "such as stable-diffusion-v1-5/stable-diffusion-inpainting."
        )
    config = read_json(file)
    if config.get("in_channels") != 9 or config.get("addition_embed_type") is not None:
        raise ValueError(
            f"The UNet of {inpainting} takes {config.get('in_channels')} channels. It is not Stable Diffusion 1.x's "
            "for inpainting, which takes 9: pass one such as stable-diffusion-v1-5/stable-diffusion-inpainting."
        )
    return config


def _check_encoder(image_encoder: str) -> dict[str, Any]:
    """The configuration of an image encoder; ValueError unless it is DINOv2."""
    file = fetch(image_encoder, ("config.json",)) / "config.json"
    kind = read_json(file).get("model_type") if file.is_file() else None
    if kind not in ("dinov2", "dinov2_with_registers"):
        raise ValueError(
            f"{image_encoder} is not DINOv2 in transformers' format: its config.json says {kind}. Pass one such as "
            "facebook/dinov2-with-registers-large."
        )
    return read_json(file)


def _told(name: str) -> str:
    """A Hub id as it is; of a folder its own name, for its place is nobody's business."""
    return Path(name).resolve().name if Path(name).is_dir() else name
