"""
`refalign-train sprites --refine`: the small refining model (Refine-by-Align) from nothing, stage by stage.

    refalign-train sprites --refine --output sprites
"""

import logging

from refalign.files import new_folder
from refalign_training.sprites.recipe import (
    HELD_OUT_CLIPS,
    PRODUCTS,
    SpritesCommand,
    Stages,
    is_main,
    launch,
    train,
    write_measured,
)
from refalign_training.sprites.views import IMAGE_SIDE


logger = logging.getLogger(__name__)

UNET = {
    "sample_size": 16,
    "in_channels": 9,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (32, 48, 80),
    "layers_per_block": 1,
    "cross_attention_dim": 96,
    "attention_head_dim": 4,  # diffusers' name of the number of heads
    "norm_num_groups": 8,
}
# Stable Diffusion 1.x's
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    # but this: the loss of the noise is next to nothing where all is noise, just where references tell the most
    "prediction_type": "v_prediction",
}
HELD_OUT_VIEWS = 200


def _make_vae(command: SpritesCommand) -> None:
    from refalign_training.sprites.refine_parts import draw_views, image_psnr, train_image_vae

    vae = train_image_vae(command.output / "refine-vae-run")
    if is_main():
        views = draw_views(HELD_OUT_VIEWS, held_out=True, purpose="held-out views")
        psnr = image_psnr(vae, views.images)
        logger.info("Image VAE: %.1f dB on %d views of held-out subjects", psnr, HELD_OUT_VIEWS)
        with new_folder(command.output / PRODUCTS["refine-vae"]) as folder:
            vae.half().save_pretrained(folder)
            write_measured(folder, {"psnr": psnr, "images": HELD_OUT_VIEWS})


def _make_encoder(command: SpritesCommand) -> None:
    from refalign_training.sprites.refine_parts import correspondence, train_image_encoder

    encoder = train_image_encoder(command.output / "refine-encoder-run")
    if is_main():
        found, by_chance = correspondence(encoder)
        logger.info("Image encoder: patches are found %.2f radii off, by chance %.2f", found, by_chance)
        with new_folder(command.output / PRODUCTS["refine-encoder"]) as folder:
            encoder.half().save_pretrained(folder)
            write_measured(folder, {"distance": found, "by_chance": by_chance})


def _make_base(command: SpritesCommand) -> None:
    """A pipeline of the parts with an untrained UNet and projector."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import Dinov2WithRegistersModel

    from refalign.pipeline_refine_by_align import RefineByAlignPipeline
    from refalign.reference_projector import ReferenceProjector

    torch.manual_seed(0)
    encoder = Dinov2WithRegistersModel.from_pretrained(command.output / PRODUCTS["refine-encoder"])
    vae = AutoencoderKL.from_pretrained(command.output / PRODUCTS["refine-vae"], torch_dtype=torch.float16)
    pipeline = RefineByAlignPipeline(
        vae=vae,
        unet=UNet2DConditionModel(**UNET),
        image_encoder=encoder,
        reference_projector=ReferenceProjector(encoder.config.hidden_size, UNET["cross_attention_dim"]),
        scheduler=DDIMScheduler(**SCHEDULER),
        image_size=IMAGE_SIDE,
        reference_size=IMAGE_SIDE,
        alignment_block=4,
    )
    with new_folder(command.output / PRODUCTS["refine-base"]) as folder:
        pipeline.save_pretrained(folder)


def _make_data(command: SpritesCommand) -> None:
    from refalign_training.sprites.dataset import write_dataset

    write_dataset(command.output / "refine-data", command.clips // 2)
    write_dataset(command.output / "refine-data-held-out", HELD_OUT_CLIPS, seed=1, held_out=True)


def _make_cache(command: SpritesCommand) -> None:
    for name in ("", "-held-out"):
        data = command.output / f"refine-data{name}"
        arguments = ["--data", "opens2v", "--videos", data / "Videos"]
        arguments += ["--annotations", data / "Jsons/mask_and_bbox/total_part1.json"]
        arguments += ["--cross-pairs", data / "Jsons/cross_video_pairs/pairs.json"]
        arguments += ["--families", "pictures", "--output", command.output / f"refine-cache{name}"]
        # Two draws of each subject, a third of them with its picture from another clip
        arguments += ["--variants", 2, "--cross-probability", 0.3, "--workers", "0"]
        side = ["--height", str(IMAGE_SIDE), "--width", str(IMAGE_SIDE), "--num-frames", "1"]
        launch(["cache", *map(str, arguments), *side], command.processes)


def _train(command: SpritesCommand) -> None:
    steps = ["--steps", str(command.steps)] if command.steps else []
    train(command, command.output / "refine-run", steps, prefix="refine-")


def _make_model(command: SpritesCommand) -> None:
    from refalign_training.sprites.refine_model import make_refine_model

    make_refine_model(command)


REFINE_STAGES: Stages = {
    "refine-vae": _make_vae,
    "refine-encoder": _make_encoder,
    "refine-base": _make_base,
    "refine-data": _make_data,
    "refine-cache": _make_cache,
    "refine-run": _train,
    "refine-model": _make_model,
}
