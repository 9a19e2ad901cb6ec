"""`refalign generate`: one video, or a batch of them, from what the command line says.

Nothing heavy is imported before it is needed, so that `--help` answers at once.
"""

import json
import math
import os
import re
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal


if TYPE_CHECKING:
    import torch

    from refalign import RefAlignWanPipeline, RefAlignWanTransformer3DModel


@dataclass(frozen=True)
class Generate:
    """Make a video of the references' subjects acting out a prompt."""

    model: str | None = None
    """A pipeline folder or Hub id; with --base, a native checkpoint: a file, a folder of shards or a Hub id. Without
    it, the tiny model of drawn figures that comes with this package."""
    prompt: str | None = None
    """What happens in the video."""
    reference: tuple[str, ...] = ()
    """Images of the subjects and the place: paths or URLs. None: text-to-video."""
    output: Path | None = None
    """The mp4 to write."""
    batch: Path | None = None
    """Many videos: a JSONL file, each line an object with prompt, reference, output and any of the settings below."""
    base: str | None = None
    """The Wan 2.1 pipeline (folder or Hub id) that a native checkpoint lacks: VAE, text encoder, tokenizer."""
    height: int | None = None
    """The video's height in pixels, a multiple of 16; by default the model's own, 480 for the published ones."""
    width: int | None = None
    """The video's width in pixels, a multiple of 16; by default the model's own, 832 for the published ones."""
    num_frames: int | None = None
    """The video's frames, 4k + 1, shown at 16 per second; by default the model's own, 81 for the published ones."""
    steps: int | None = None
    """The number of denoising steps; by default the model's own, 50 for the published ones."""
    seed: int = 0
    """The same seed gives the same video."""
    guidance_scale: float | None = None
    """How closely the prompt is followed; by default the model's own, 7.5 for the published ones."""
    image_guidance_scale: float | None = None
    """How closely the references are followed; by default the model's own, 5 for the published ones. With both scales
    at 1 a step takes one pass (distilled LoRAs)."""
    negative_prompt: str | None = None
    """What should not be seen; by default the model's own, Wan's for the published ones."""
    cut_out: tuple[Literal["auto", "true", "false"], ...] = ("auto",)
    """Whether subjects are cut out: one word for all references, or one each. auto: if BiRefNet is on this machine."""
    lora: tuple[str, ...] = ()
    """LoRA files (.safetensors) or Hub ids, each with an optional :SCALE behind it."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """The dtype of text encoder and transformer; auto is bfloat16 on a GPU and float32 on a CPU. The VAE runs in
    float32."""
    device: str = "auto"
    """cuda, mps, cpu; auto takes the first there is."""
    offload: Literal["none", "model", "group"] = "none"
    """How to need less GPU memory: model moves one part at a time to the GPU, group a few layers."""
    preview: bool = False
    """Also write the references as the model sees them, beside the video."""
    overwrite: bool = False
    """Replace videos that exist."""


# What a line of a batch may set, each with its type
JOB_SETTINGS: dict[str, type | tuple[type, ...]] = {
    "prompt": str,
    "reference": (str, list),
    "output": str,
    "height": int,
    "width": int,
    "num_frames": int,
    "steps": int,
    "seed": int,
    "guidance_scale": (int, float),
    "image_guidance_scale": (int, float),
    "negative_prompt": str,
    "cut_out": (bool, str, list),
}
CUT_OUT = {"auto": "auto", "true": True, "false": False}
NOT_KEPT = ("output", "batch", "preview", "overwrite", "device", "offload")  # they do not change the video
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Job:
    """One video to make: the command with one line of the batch put in, and what to call it in messages."""

    command: Generate
    name: str


def run(command: Generate) -> int:
    """Makes the videos and returns the exit code. Of a batch, a job that fails is told and the others go on."""
    if command.model is None:
        command = _take_sprites(command)
    jobs = _jobs(command)
    for job in jobs:
        _check_job(job)
    defaults = _read_defaults(command)
    command = _filled(command, defaults)
    if command.batch is None:
        references = _prepare_references(command)  # first of all, so that a mistake shows before the model is loaded
        _generate_one(_load_pipeline(command), command, references)
        return 0
    left = []
    for job in jobs:
        if job.command.output.exists() and not command.overwrite:
            print(f"{job.name}: {job.command.output} exists, passed over (--overwrite makes it again)")
        else:
            left.append(Job(_filled(job.command, defaults), job.name))
    return _run_batch(command, left) if left else 0


def _take_sprites(command: Generate) -> Generate:
    from refalign.sprites import FOLDER

    if command.base is not None:
        raise ValueError("--base goes with --model, a native checkpoint.")
    print("No --model: taking the tiny one of this package, which knows drawn figures alone (see refalign demo).")
    return replace(command, model=str(FOLDER))


def _read_defaults(command: Generate) -> dict[str, Any]:
    """What the model's repo, or else the published models, take for settings that are not given."""
    from refalign.pipeline_refalign_wan import CALL_DEFAULTS, RefAlignWanPipeline

    name = command.model if command.base is None else command.base
    if command.base is None and not Path(name).is_dir() and not HUB_ID.fullmatch(name):
        return CALL_DEFAULTS  # that it is not a model is told when it is loaded
    return CALL_DEFAULTS | (RefAlignWanPipeline.load_config(name).get("call_defaults") or {})


def _filled(command: Generate, defaults: dict[str, Any]) -> Generate:
    """The command with defaults where it says nothing."""
    filled = {}
    for field in fields(command):
        name = "num_inference_steps" if field.name == "steps" else field.name
        if getattr(command, field.name) is None and name in defaults:
            filled[field.name] = defaults[name]
    return replace(command, **filled)


def _run_batch(command: Generate, jobs: list[Job]) -> int:
    pipeline = _load_pipeline(command)
    failed = []
    for job in jobs:
        try:
            _generate_one(pipeline, job.command, _prepare_references(job.command))
        except (ValueError, OSError, ImportError, RuntimeError) as error:  # RuntimeError: out of memory, for one
            print(f"refalign: {job.name}: {error}", file=sys.stderr)
            failed.append(job.name)
    if failed:
        print(f"refalign: {len(failed)} of {len(jobs)} videos failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


# -- What is asked for ------------------------------------------------------------------------------------------------


def _jobs(command: Generate) -> list[Job]:
    if command.batch is None:
        return [Job(command, "generate")]
    if command.prompt is not None or command.output is not None or command.reference:
        raise ValueError("With --batch, prompt, reference and output stand in the file's lines. Leave them out here.")
    try:
        lines = command.batch.read_text("utf-8-sig").split("\n")  # not splitlines: JSON may hold other line breaks
    except UnicodeDecodeError as error:
        raise ValueError(f"{command.batch} is not UTF-8: {error}") from error
    jobs = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            name = f"{command.batch.name}:{number}"
            jobs.append(Job(replace(command, **_read_job(name, line)), name))
    if not jobs:
        raise ValueError(f"{command.batch} has no lines.")
    outputs = [job.command.output for job in jobs]
    if twice := {str(output) for output in outputs if output is not None and outputs.count(output) > 1}:
        raise ValueError(f"{command.batch} writes the same output more than once: {', '.join(sorted(twice))}.")
    return jobs


def _read_job(name: str, line: str) -> dict[str, Any]:
    try:
        job = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    if not isinstance(job, dict):
        raise ValueError(f'{name} must be an object such as {{"prompt": "...", "output": "a.mp4"}}.')
    if unknown := sorted(job.keys() - JOB_SETTINGS.keys()):
        raise ValueError(f"{name} has unknown settings {unknown}. Known are: {', '.join(JOB_SETTINGS)}.")
    for key, value in job.items():
        is_bool = isinstance(value, bool) and key != "cut_out"  # which Python takes for a number
        if is_bool or not isinstance(value, JOB_SETTINGS[key]):
            raise ValueError(f"{name}: {key} is {json.dumps(value)}, of a wrong type.")
    if "reference" in job:
        job["reference"] = _as_tuple(job["reference"])
    if "cut_out" in job:
        job["cut_out"] = tuple(str(word).lower() for word in _as_tuple(job["cut_out"]))  # JSON's true is True
    if "output" in job:
        job["output"] = Path(job["output"])
    return job


def _as_tuple(value: Any) -> tuple:
    return tuple(value) if isinstance(value, list) else (value,)


def _check_job(job: Job) -> None:
    command = job.command
    for name in ("prompt", "output"):
        if getattr(command, name) is None:
            raise ValueError(f"{job.name}: the {name} is missing.")
    _check_output(job)
    if not all(isinstance(reference, str) for reference in command.reference):
        raise ValueError(f"{job.name}: references are paths or URLs, not {command.reference}.")
    if unknown := set(command.cut_out) - CUT_OUT.keys():
        raise ValueError(f"{job.name}: cut_out is {', '.join(sorted(unknown))}; known are auto, true and false.")
    if len(command.cut_out) not in (1, len(command.reference)):
        raise ValueError(
            f"{job.name}: cut_out has {len(command.cut_out)} words for {len(command.reference)} references. Give one "
            "for all, or one each."
        )
    if not -(2**63) <= command.seed < 2**64:
        raise ValueError(f"{job.name}: the seed is {command.seed}, more than 64 bits.")


def _check_output(job: Job) -> None:
    command = job.command
    if command.output.suffix != ".mp4":
        raise ValueError(f"{job.name}: the output is {command.output}, but must end in .mp4.")
    place = next(parent for parent in command.output.absolute().parents if parent.exists())
    if command.output.is_dir() or not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(f"{job.name}: {command.output} cannot be written. Name another output.")
    if command.batch is None and not command.overwrite:
        outputs = [command.output]
        if command.preview:
            outputs += [_preview_path(command, number) for number in range(len(command.reference))]
        if existing := [str(output) for output in outputs if output.exists()]:
            raise ValueError(f"{', '.join(existing)} exists already. Name another output, or pass --overwrite.")


def _prepare_references(command: Generate) -> list:
    from refalign.pipeline_refalign_wan import check_size
    from refalign.reference_images import prepare_reference_images

    check_size(command.height, command.width, command.num_frames)
    cut_out = [CUT_OUT[word] for word in command.cut_out]
    cut_out = cut_out * len(command.reference) if len(cut_out) == 1 else cut_out
    return prepare_reference_images(list(command.reference), command.height, command.width, cut_out)


# -- The pipeline -----------------------------------------------------------------------------------------------------


def _load_pipeline(command: Generate) -> "RefAlignWanPipeline":
    import torch

    from refalign.devices import find_device

    device = find_device(command.device)
    if command.offload == "model" and device.type == "cpu":
        raise ValueError("--offload model moves parts to a GPU, but the device is cpu. Use --offload none.")
    loras = [_read_lora(lora) for lora in command.lora]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if command.dtype != "auto":
        dtype = getattr(torch, command.dtype)
    pipeline = _load_parts(command, dtype)
    _load_loras(pipeline, loras)
    if command.offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif command.offload == "group":
        pipeline.enable_group_offload(device, offload_type="leaf_level", use_stream=device.type == "cuda")
    else:
        pipeline.to(device)
    return pipeline


def _load_parts(command: Generate, dtype: "torch.dtype") -> "RefAlignWanPipeline":
    """The pipeline, with text encoder and transformer in `dtype`."""
    import torch

    from refalign.files import PICKLES
    from refalign.pipeline_refalign_wan import RefAlignWanPipeline, paper_scheduler

    parts = {"dtype": {"default": dtype, "vae": torch.float32}}
    if command.base is not None:
        base = _folder_or_hub_id(command.base)
        parts["transformer"] = _load_native(command, dtype)
        parts["scheduler"] = paper_scheduler()  # as `convert` writes it
        return RefAlignWanPipeline.from_pretrained(base, **parts)
    if Path(command.model).suffix in (".safetensors", *PICKLES):
        raise ValueError(
            f"{command.model} is a native checkpoint: only the transformer. Pass --base with the Wan 2.1 pipeline for "
            "the rest, such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers."
        )
    name = _folder_or_hub_id(command.model)
    if RefAlignWanPipeline.load_config(name)["_class_name"] == "WanPipeline":
        # Plain Wan, which with a LoRA is a RefAlign model: it takes the schedule that LoRAs are trained with
        parts["scheduler"] = paper_scheduler()
    return RefAlignWanPipeline.from_pretrained(name, **parts)


def _folder_or_hub_id(name: str) -> str:
    if not Path(name).is_dir() and not HUB_ID.fullmatch(name):
        raise ValueError(f"{name} is neither a folder here nor a Hub id (ORG/NAME).")
    return name


def _load_native(command: Generate, dtype: "torch.dtype") -> "RefAlignWanTransformer3DModel":
    from refalign import RefAlignWanTransformer3DModel
    from refalign.convert import check_shapes
    from refalign.files import find_safetensors, read, read_headers
    from refalign.keys import native_to_diffusers

    tensors, _ = native_to_diffusers(read_headers(find_safetensors(command.model)))
    config = RefAlignWanTransformer3DModel.load_config(_folder_or_hub_id(command.base), subfolder="transformer")
    check_shapes(tensors, config, command.model)
    return RefAlignWanTransformer3DModel.from_single_file(
        read(tensors), config=command.base, subfolder="transformer", dtype=dtype
    )


def _read_lora(lora: str) -> tuple[str, float]:
    """A LoRA's file or Hub id, and its scale, from FILE[:SCALE]."""
    from refalign.files import PICKLES

    source, separator, scale = lora.rpartition(":")
    try:
        source, scale = (source, float(scale)) if separator else (lora, 1.0)
    except ValueError:
        source, scale = lora, 1.0
    path = Path(source)
    if not math.isfinite(scale) or ".safetensors:" in path.name:
        raise ValueError(f"--lora {lora}: the scale behind the colon is not a number.")
    if path.suffix in PICKLES or (path.is_file() and path.suffix != ".safetensors"):
        raise ValueError(f"LoRA {source} is not a .safetensors file.")
    may_be_on_hub = HUB_ID.fullmatch(source) and path.suffix != ".safetensors"
    if not path.exists() and not may_be_on_hub:
        raise ValueError(f"LoRA {source} does not exist.")
    return source, scale


def _load_loras(pipeline: "RefAlignWanPipeline", loras: list[tuple[str, float]]) -> None:
    scales = {}
    for number, (source, scale) in enumerate(loras):
        name = f"lora_{number}"
        pipeline.load_lora_weights(source, adapter_name=name, use_safetensors=True)
        if name not in pipeline.get_list_adapters().get("transformer", ()):
            raise ValueError(f"LoRA {source} holds no weights for Wan's transformer.")
        scales[name] = scale
        print(f"LoRA {source}, scale {scale:g}")
    if scales:
        pipeline.set_adapters(list(scales), list(scales.values()))


# -- One video --------------------------------------------------------------------------------------------------------


def _generate_one(pipeline: "RefAlignWanPipeline", command: Generate, references: list) -> None:
    import torch

    from refalign.video import write_video

    arguments = {
        "prompt": command.prompt,
        "negative_prompt": command.negative_prompt,
        "reference_images": references or None,
        "height": command.height,
        "width": command.width,
        "num_frames": command.num_frames,
        "num_inference_steps": command.steps,
        "guidance_scale": command.guidance_scale,
        "image_guidance_scale": command.image_guidance_scale,
    }
    pipeline.check_inputs(**arguments)
    print(_plan(pipeline, command, len(references)), flush=True)
    if command.preview:
        _write_previews(references, command)
    generator = torch.Generator().manual_seed(command.seed)
    frames = pipeline(**arguments, generator=generator, output_type="pil").frames[0]
    write_video(frames, command.output, settings=_settings(command), overwrite=command.overwrite)
    print(f"Wrote {command.output}", flush=True)


def _plan(pipeline: "RefAlignWanPipeline", command: Generate, num_references: int) -> str:
    from refalign.pipeline_refalign_wan import guidance_passes

    _, patch_height, patch_width = pipeline.transformer.config.patch_size
    rows = command.height // pipeline.vae_scale_factor_spatial // patch_height
    columns = command.width // pipeline.vae_scale_factor_spatial // patch_width
    per_frame = rows * columns
    references = num_references * per_frame
    video = ((command.num_frames - 1) // pipeline.vae_scale_factor_temporal + 1) * per_frame
    passes = guidance_passes(command.guidance_scale, command.image_guidance_scale, num_references > 0)
    return (
        f"{command.output}: frames: {command.num_frames} of {command.width}x{command.height}, references: "
        f"{num_references}, tokens: {video + references:,} ({video:,} of the video, {references:,} of references), "
        f"steps: {command.steps}, passes per step: {len(passes)}"
    )


def _settings(command: Generate) -> dict[str, Any]:
    """What it takes to make the video again, without folders of this machine and secrets of URLs."""
    from refalign import __version__

    settings = dict(vars(command))
    for name in NOT_KEPT:
        del settings[name]
    for name in ("model", "base"):
        settings[name] = settings[name] and _public_name(settings[name])
    settings["reference"] = [_public_name(reference) for reference in command.reference]
    settings["lora"] = [f"{_public_name(source)}:{scale:g}" for source, scale in map(_read_lora, command.lora)]
    return {"refalign": __version__, **settings}


def _public_name(source: str) -> str:
    from refalign.reference_images import redacted_url

    if "://" in source:
        return redacted_url(source)
    return Path(source).name if Path(source).exists() else source


def _write_previews(references: list, command: Generate) -> None:
    from refalign.files import new_file

    may_replace = command.overwrite or command.batch is not None
    for number, image in enumerate(references):
        with new_file(_preview_path(command, number), overwrite=may_replace) as file:
            image.save(file)


def _preview_path(command: Generate, number: int) -> Path:
    return command.output.with_name(f"{command.output.stem}.reference_{number + 1}.png")
