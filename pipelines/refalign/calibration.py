"""How much the transformer's residual changes from step to step, for each guidance pass: the ratios that MagCache
(arXiv 2506.09045) skips by, measured once and kept in the model's folder."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from refalign.files import fetch, new_file, read_json
from refalign.sprites import SUBJECTS
from refalign.video_options import VideoOptions


if TYPE_CHECKING:
    from refalign.pipeline_refalign_wan import RefAlignWanPipeline


RATIOS = "mag_cache.json"
PASSES = ("null", "reference", "full")
KEPT = ("height", "width", "num_frames", "guidance_scale", "image_guidance_scale")


@dataclass(frozen=True)
class Calibrate(VideoOptions):
    """Measure once what `--cache mag` needs of a model, and keep it in the model's folder."""

    prompt: str = "On the left one hops up and down, on the right one spins around, in a meadow."
    """A description of a video such as you make."""
    reference: Annotated[tuple[str, ...], arg(aliases=["--references"])] = (
        str(SUBJECTS / "crowned-star.png"),
        str(SUBJECTS / "yellow-heart.png"),
    )
    """References such as you use. By default they are two drawn figures."""
    overwrite: bool = False
    """Measure again a model that has ratios."""


def run(command: Calibrate) -> int:
    """
    Makes one video's latents, writes the ratios and returns the exit code.

    Raises:
        ValueError: if options do not fit, or the model's folder cannot be written to.
    """
    from refalign.generate import Generate, Job, filled, load_for, prepare
    from refalign.loading import read_defaults

    file = _file_of(command)
    options = {option.name: getattr(command, option.name) for option in fields(VideoOptions)}
    asked = Generate(**options, prompt=command.prompt, reference=command.reference)
    job = filled(Job("calibrate", file, asked), read_defaults(str(command.model)))
    arguments = prepare(job.command)
    ratios = measure_ratios(load_for(job.command), arguments, command.seed)
    kept = {name: arguments[name] for name in KEPT}
    content = {"steps": arguments["num_inference_steps"], **kept, "ratios": ratios}
    with new_file(file, overwrite=True) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    print(f"Wrote {file}: `refalign generate --model {command.model} --cache mag` reads it.")
    return 0


def _file_of(command: Calibrate) -> Path:
    """Where the ratios are to be written."""
    if command.model is None or command.base is not None or not Path(command.model).is_dir():
        raise ValueError(
            "`refalign calibrate` writes into the folder of a pipeline: pass one as --model. A native checkpoint "
            "becomes one by `refalign convert`, a Hub repo by `hf download ORG/NAME --local-dir FOLDER`."
        )
    for option in ("cache", "guidance_gate", "fast"):
        if getattr(command, option) is not None:
            name = option.replace("_", "-")
            raise ValueError(f"--{name} leaves out passes or blocks, all of which are measured. Leave it out here.")
    if not command.reference:
        raise ValueError("A calibration needs a reference: without one there are not all guidance passes.")
    if command.guidance_scale == 0:
        raise ValueError("--guidance-scale is 0, which leaves the prompt's pass out. Calibrate with another.")
    file = Path(command.model) / RATIOS
    if file.exists() and not command.overwrite:
        raise ValueError(f"{file} exists already. Pass --overwrite to measure again.")
    return file


def measure_ratios(pipeline: "RefAlignWanPipeline", arguments: dict[str, Any], seed: int) -> dict[str, list[float]]:
    """
    The ratios of each guidance pass, one for each step, by diffusers' own calibration.

    Args:
        pipeline ([`RefAlignWanPipeline`]): without a cache.
        arguments (`dict`): of its call, with references.
        seed (`int`): of the noise.
    """
    import torch
    from diffusers.hooks import MagCacheConfig

    # A thousandth more, so that all three passes are made where equal scales would leave one out
    arguments = {**arguments, "image_guidance_scale": arguments["image_guidance_scale"] + 0.001}
    steps = arguments["num_inference_steps"]
    ratios: dict[str, list[float]] = {}

    def keep(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == steps - 1:
            ratios.update(_measured(pipeline.transformer))
        return {}

    # One step more than there are: at the last one diffusers prints what it measured and forgets it
    pipeline.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=steps + 1))
    try:
        generator = torch.Generator().manual_seed(seed)
        pipeline(**arguments, generator=generator, output_type="latent", callback_on_step_end=keep)
    finally:
        pipeline.transformer.disable_cache()
    return {name: ratios[name] for name in PASSES}


def _measured(transformer: Any) -> dict[str, list[float]]:
    # diffusers/hooks/mag_cache.py: gives its results to nobody, and prints them without the pass
    hook = transformer.blocks[0]._diffusers_hook.get_hook("mag_cache_leader_block_hook")
    states = hook.state_manager._state_cache
    return {name: list(state.calibration_ratios) for name, state in states.items()}


def read_ratios(model: str, base: str | None = None) -> dict[str, list[float]]:
    """
    The ratios of each guidance pass of a pipeline, a folder or Hub id, as `refalign calibrate` measured them.

    Raises:
        ValueError: if there are none, or they are not what they should be.
    """
    if base is not None:
        raise ValueError(
            f"--cache mag reads {RATIOS} of a pipeline's folder, and {model} is a native checkpoint. Make it a folder "
            "with `refalign convert`, and call `refalign calibrate --model FOLDER`."
        )
    file = fetch(model, [RATIOS]) / RATIOS
    if not file.is_file():
        raise ValueError(
            f"--cache mag needs {RATIOS} in {model}, which is not there. Call `refalign calibrate --model {model}` "
            "once, or take --cache first-block."
        )
    ratios = read_json(file).get("ratios")
    if not _are_ratios(ratios):
        raise ValueError(f"{file} does not hold ratios of {', '.join(PASSES)}. Call `refalign calibrate` again.")
    return ratios


def _are_ratios(ratios: object) -> bool:
    if not isinstance(ratios, dict) or set(ratios) != set(PASSES):
        return False
    return all(isinstance(one, list) and one and all(map(_is_ratio, one)) for one in ratios.values())


def _is_ratio(value: object) -> bool:
    return isinstance(value, (int, float)) and value > 0
