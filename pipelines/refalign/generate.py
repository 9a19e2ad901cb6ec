"""`refalign generate`: one video, or a batch of them, from what the command line says.

Nothing heavy is imported before it is needed, so that `--help` answers at once.
"""

import json
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Generate:
    """Make a video of the references' subjects acting out a prompt."""

    model: str
    """A pipeline folder, a Hub id, or a native checkpoint (.safetensors; needs --base)."""
    prompt: str | None = None
    """What happens in the video."""
    reference: tuple[str, ...] = ()
    """Images of the subjects and the place: paths or URLs. None: text-to-video."""
    output: Path | None = None
    """The mp4 to write."""
    batch: Path | None = None
    """Many videos: a JSONL file, each line an object with prompt, reference and output, and any of the settings from
    height to cut_out. Videos that exist already are passed over."""
    base: str | None = None
    """The Wan 2.1 pipeline (folder or Hub id) that a native checkpoint lacks: VAE, text encoder, tokenizer."""
    height: int = 480
    """In pixels, a multiple of 16."""
    width: int = 832
    """In pixels, a multiple of 16."""
    num_frames: int = 81
    """4k + 1; shown at 16 a second."""
    steps: int = 50
    """Denoising steps."""
    seed: int = 0
    """The same seed gives the same video."""
    guidance_scale: float = 7.5
    """How closely the prompt is followed."""
    image_guidance_scale: float = 5.0
    """How closely the references are followed. With both scales at 1 a step takes one pass (distilled LoRAs)."""
    negative_prompt: str | None = None
    """What should not be seen; by default Wan's own negative prompt."""
    cut_out: tuple[Literal["auto", "true", "false"], ...] = ("auto",)
    """Whether subjects are cut out and put on white: one word for all references, or one each. auto uses an image's
    transparency, else BiRefNet where it is installed."""
    lora: tuple[str, ...] = ()
    """LoRA files (.safetensors) or Hub ids, each with an optional :SCALE behind it."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Of text encoder and transformer; auto is bfloat16 on a GPU and float32 on a CPU. The VAE runs in float32."""
    device: str = "auto"
    """cuda, mps, cpu; auto takes the first there is."""
    offload: Literal["none", "model", "group"] = "none"
    """To need less GPU memory: model moves one part at a time to the GPU, group a few layers."""
    preview: bool = False
    """Also write the references as the model sees them, beside the video."""
    overwrite: bool = False
    """Replace videos that exist."""


# What a line of a batch may set
JOB_SETTINGS = (
    "prompt",
    "reference",
    "output",
    "height",
    "width",
    "num_frames",
    "steps",
    "seed",
    "guidance_scale",
    "image_guidance_scale",
    "negative_prompt",
    "cut_out",
)


@dataclass(frozen=True)
class Job:
    """One video to make: the command with one line of the batch put in, and what to call it in messages."""

    command: Generate
    name: str


def run(command: Generate) -> int:
    jobs = _jobs(command)
    for job in jobs:
        _check_job(job)
    skipped = [job for job in jobs if command.batch and job.command.output.exists() and not command.overwrite]
    for job in skipped:
        print(f"{job.name}: {job.command.output} exists, passed over (--overwrite makes it again)")
    jobs = [job for job in jobs if job not in skipped]
    if not jobs:
        return 0
    pipeline = _load_pipeline(command)
    failed = []
    for job in jobs:
        try:
            _generate_one(pipeline, job)
        except (ValueError, OSError) as error:
            if not command.batch:
                raise
            print(f"refalign: {job.name}: {error}", file=sys.stderr)
            failed.append(job.name)
    if failed:
        print(f"refalign: {len(failed)} of {len(jobs)} videos failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _jobs(command: Generate) -> list[Job]:
    if command.batch is None:
        return [Job(command, "generate")]
    if command.prompt is not None or command.output is not None or command.reference:
        raise ValueError("With --batch, prompt, reference and output stand in the file's lines. Leave them out here.")
    jobs = []
    for number, line in enumerate(command.batch.read_text("utf-8").splitlines(), start=1):
        if line.strip():
            name = f"{command.batch.name}:{number}"
            jobs.append(Job(replace(command, batch=None, **_read_job(name, line)), name))
    if not jobs:
        raise ValueError(f"{command.batch} has no lines.")
    outputs = [job.command.output for job in jobs]
    if twice := {str(output) for output in outputs if output is not None and outputs.count(output) > 1}:
        raise ValueError(f"{command.batch} writes the same output more than once: {', '.join(sorted(twice))}.")
    return jobs


def _read_job(name: str, line: str) -> dict[str, Any]:
    try:
        job = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    if not isinstance(job, dict):
        raise ValueError(f'{name} has to be an object such as {{"prompt": "...", "output": "a.mp4"}}.')
    if unknown := sorted(job.keys() - set(JOB_SETTINGS)):
        raise ValueError(f"{name} has unknown settings {unknown}. Known are: {', '.join(JOB_SETTINGS)}.")
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
    if command.prompt is None or command.output is None:
        raise ValueError(f"{job.name}: a prompt and an output are needed.")
    if command.output.suffix != ".mp4":
        raise ValueError(f"{job.name}: the output is {command.output}, but has to end in .mp4.")
    if job.name == "generate" and command.output.exists() and not command.overwrite:
        raise ValueError(f"{command.output} exists already. Name another output, or pass --overwrite.")
    if unknown := set(command.cut_out) - {"auto", "true", "false"}:
        raise ValueError(f"{job.name}: cut_out is {', '.join(sorted(unknown))}; known are auto, true and false.")
    if len(command.cut_out) not in (1, len(command.reference)):
        raise ValueError(
            f"{job.name}: cut_out has {len(command.cut_out)} words for {len(command.reference)} references. Give one "
            "for all, or one each."
        )


def _load_pipeline(command: Generate):
    import torch

    from refalign import RefAlignWanPipeline

    device = _device(command.device)
    if command.dtype == "auto":
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    else:
        dtype = getattr(torch, command.dtype)
    dtypes = {"default": dtype, "vae": torch.float32}
    if Path(command.model).suffix in (".safetensors", ".pth", ".pt", ".ckpt", ".bin"):
        transformer = _load_native(command, dtype)
        pipeline = RefAlignWanPipeline.from_pretrained(command.base, transformer=transformer, dtype=dtypes)
    else:
        pipeline = RefAlignWanPipeline.from_pretrained(command.model, dtype=dtypes)
    _load_loras(pipeline, command.lora)
    if command.offload == "model":
        if device.type == "cpu":
            raise ValueError("--offload model moves parts to a GPU, but the device is cpu. Use --offload none.")
        pipeline.enable_model_cpu_offload(device=device)
    elif command.offload == "group":
        pipeline.enable_group_offload(device, offload_type="leaf_level", use_stream=device.type == "cuda")
    else:
        pipeline.to(device)
    return pipeline


def _device(name: str):
    import torch

    if name != "auto":
        try:
            return torch.device(name)
        except RuntimeError:
            raise ValueError(f"--device is {name!r}; known are cuda, cuda:N, mps and cpu.") from None
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _load_native(command: Generate, dtype):
    from refalign import RefAlignWanTransformer3DModel, checkpoints

    if command.base is None:
        raise ValueError(
            f"{command.model} is a native checkpoint: only the transformer. Pass --base with the Wan 2.1 pipeline for "
            "the rest, such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers."
        )
    files = checkpoints.find_safetensors(command.model)
    tensors, _ = checkpoints.native_to_diffusers(checkpoints.read_headers(files))
    config = RefAlignWanTransformer3DModel.load_config(command.base, subfolder="transformer")
    checkpoints.check_shapes(tensors, config, command.model)
    return RefAlignWanTransformer3DModel.from_single_file(
        checkpoints.read(tensors), config=command.base, subfolder="transformer", dtype=dtype
    )


def _load_loras(pipeline, loras: tuple[str, ...]) -> None:
    scales = {}
    for number, lora in enumerate(loras):
        source, scale = _split_scale(lora)
        path = Path(source)
        if path.suffix and path.suffix != ".safetensors":
            raise ValueError(f"LoRA {source} is not a .safetensors file.")
        if path.suffix and not path.is_file():
            raise ValueError(f"LoRA {source} does not exist.")
        name = f"lora_{number}"
        pipeline.load_lora_weights(source, adapter_name=name, use_safetensors=True)
        scales[name] = scale
    if scales:
        pipeline.set_adapters(list(scales), list(scales.values()))


def _split_scale(lora: str) -> tuple[str, float]:
    source, separator, scale = lora.rpartition(":")
    try:
        return (source, float(scale)) if separator else (lora, 1.0)
    except ValueError:
        return lora, 1.0


def _generate_one(pipeline, job: Job) -> None:
    import torch

    from refalign.pipeline_refalign_wan import DEFAULT_NEGATIVE_PROMPT
    from refalign.reference_images import prepare_reference_images
    from refalign.video import write_video

    command = job.command
    cut_out = [{"auto": "auto", "true": True, "false": False}[word] for word in command.cut_out]
    cut_out = cut_out * len(command.reference) if len(cut_out) == 1 else cut_out
    arguments = {
        "prompt": command.prompt,
        "negative_prompt": DEFAULT_NEGATIVE_PROMPT if command.negative_prompt is None else command.negative_prompt,
        "height": command.height,
        "width": command.width,
        "num_frames": command.num_frames,
        "num_inference_steps": command.steps,
        "guidance_scale": command.guidance_scale,
        "image_guidance_scale": command.image_guidance_scale,
    }
    pipeline.check_inputs(**arguments)
    references = prepare_reference_images(list(command.reference), command.height, command.width, cut_out)
    print(_plan(pipeline, command, len(references)))
    frames = pipeline(
        **arguments,
        reference_images=references or None,
        generator=torch.Generator().manual_seed(command.seed),
        output_type="pil",
    ).frames[0]
    write_video(frames, command.output, settings=_settings(command), overwrite=command.overwrite)
    if command.preview:
        _write_previews(references, command.output)
    print(f"Wrote {command.output}")


def _plan(pipeline, command: Generate, num_references: int) -> str:
    from refalign.pipeline_refalign_wan import guidance_passes

    _, patch_height, patch_width = pipeline.transformer.config.patch_size
    per_frame = (command.height // pipeline.vae_scale_factor_spatial // patch_height) * (
        command.width // pipeline.vae_scale_factor_spatial // patch_width
    )
    references = num_references * per_frame
    video = ((command.num_frames - 1) // pipeline.vae_scale_factor_temporal + 1) * per_frame
    passes = guidance_passes(command.guidance_scale, command.image_guidance_scale, num_references > 0)
    return (
        f"{command.output}: {command.num_frames} frames of {command.width}x{command.height} from {num_references} "
        f"references; {command.steps} steps of {len(passes)} passes over {video + references:,} tokens "
        f"({video:,} of the video, {references:,} of references)"
    )


def _settings(command: Generate) -> dict[str, Any]:
    """What it takes to make the video again, without the folders of this machine."""
    settings = {f.name: getattr(command, f.name) for f in fields(command)}
    for name in ("output", "batch", "preview", "overwrite", "device", "offload"):
        del settings[name]
    settings["model"] = Path(command.model).name if Path(command.model).exists() else command.model
    settings["base"] = Path(command.base).name if command.base and Path(command.base).exists() else command.base
    settings["reference"] = [Path(reference).name for reference in command.reference]
    settings["lora"] = [Path(lora).name for lora in command.lora]
    return settings


def _write_previews(references, output: Path) -> None:
    from refalign.checkpoints import new_file

    for number, image in enumerate(references, start=1):
        with new_file(output.with_name(f"{output.stem}.reference_{number}.png"), overwrite=True) as file:
            image.save(file)
