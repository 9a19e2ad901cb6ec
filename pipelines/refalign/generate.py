"""`refalign generate`: one video, or a batch of them, from what the command line says.

Nothing heavy is imported before it is needed, so that `--help` answers at once.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from refalign.presets import with_preset
from refalign.privacy import shown, source_name
from refalign.sprites import FOLDER
from refalign.video_options import SpeedOptions, VideoOptions


if TYPE_CHECKING:
    from refalign.pipeline_refalign_wan import RefAlignWanPipeline
    from refalign.reference_images import CutOut


@dataclass(frozen=True)
class Generate(VideoOptions):
    """Make a video of the references' subjects acting out a prompt."""

    prompt: str | None = None
    """A description of what happens in the video."""
    reference: Annotated[tuple[str, ...], arg(aliases=["--references"])] = ()
    """The images of the subjects and of the place, as paths or URLs. Without any, the prompt alone makes the video."""
    output: Path | None = None
    """The mp4 file to write."""
    batch: Path | None = None
    """A JSONL file that describes many videos. Each line is an object with prompt, references, output and any of
    the settings from height to cut_out."""
    preview: bool = False
    """Write the references beside the video too, as the model sees them."""
    overwrite: bool = False
    """Replace videos that exist."""


# What a line of a batch may set, each with its type
JOB_SETTINGS: dict[str, type | tuple[type, ...]] = {
    "prompt": str,
    "references": (str, list),
    "reference": (str, list),  # the same
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
SPEED = tuple(option.name for option in fields(SpeedOptions))
CUT_OUT: dict[str, "CutOut"] = {"auto": "auto", "true": True, "false": False}
# They do not change the video, or (`fast`) by other options alone
NOT_KEPT = ("output", "batch", "preview", "overwrite", "device", "offload", "trust_kernels", "fast")


@dataclass(frozen=True)
class Job:
    """One video to make: what to call it in messages, its file, and the command with a line of the batch put in."""

    name: str
    output: Path
    command: Generate

    @property
    def previews(self) -> list[Path]:
        """Where the references are written, if the command asks for it."""
        count = len(self.command.reference) if self.command.preview else 0
        return [self.output.with_name(f"{self.output.stem}.reference_{i + 1}.png") for i in range(count)]


def run(command: Generate) -> int:
    """Makes the videos and returns the exit code. Of a batch, a job that fails is told and the others go on."""
    if command.model is None:
        if command.base is not None:
            raise ValueError("--base goes with --model, a native checkpoint.")
        print("No --model: taking the tiny one of this package, which knows drawn figures alone (see refalign demo).")
    jobs = _read_jobs(command)
    from refalign.loading import read_defaults  # takes seconds, in which mistakes have been told

    defaults = read_defaults(command.base or command.model or str(FOLDER), command.lora)
    defaults = with_preset(command.fast, command.device, defaults)
    jobs = [filled(job, defaults) for job in jobs]
    tell_other_scales(command.lora, jobs)
    if command.batch is not None:
        return _run_batch(command, jobs)
    (job,) = jobs
    with _owned(job):
        arguments = prepare(job.command)  # first of all, so that a mistake shows before the model is loaded
        _generate_one(load_for(job.command), job, arguments)
    return 0


def _run_batch(command: Generate, jobs: list[Job]) -> int:
    from refalign.owner import remove_dead_lock

    left: list[Job] = []
    failed: list[Job] = []
    for job in jobs:
        if job.output.exists() and not command.overwrite:
            remove_dead_lock(job.output)
            print(f"{job.name}: {job.output} exists, passed over (--overwrite makes it again)")
        else:
            left.append(job)
    for job in left:
        try:
            check_options(job.command)  # before the model is loaded, which may be for none
        except ValueError as error:
            _tell_failed(job, error, failed)
    if good := [job for job in left if job not in failed]:
        for job, error in generate_all(load_for(good[0].command), good):
            if error is not None:
                _tell_failed(job, error, failed)
    if failed:
        names = ", ".join(shown(job.name) for job in failed)
        print(f"refalign: {len(failed)} of {len(left)} videos failed: {names}", file=sys.stderr)
    return 1 if failed else 0


def generate_all(pipeline: "RefAlignWanPipeline", jobs: Sequence[Job]) -> Iterator[tuple[Job, Exception | None]]:
    """Makes the videos, and gives each job when its turn is over, with the error that it ended with if it failed."""
    for number, job in enumerate(jobs, 1):
        try:
            with _owned(job):
                _generate_one(pipeline, job, prepare(job.command), place=f"{number} of {len(jobs)}: ")
        except Exception as error:  # whatever it is, it must not end the others
            yield job, error
        else:
            yield job, None


def _tell_failed(job: Job, error: Exception, failed: list[Job]) -> None:
    from refalign.command_line import one_line

    print(f"refalign: {shown(job.name)}: {shown(one_line(error))}", file=sys.stderr)
    failed.append(job)


@contextmanager
def _owned(job: Job) -> Iterator[None]:
    """Within it, the files that a job writes are its alone."""
    from refalign.owner import owned

    with ExitStack() as stack:
        for path in (job.output, *job.previews):
            stack.enter_context(owned(path))
        yield


def load_for(command: Generate) -> "RefAlignWanPipeline":
    from refalign.loading import load_pipeline, parse_lora

    loras = [parse_lora(lora) for lora in command.lora]
    pipeline = load_pipeline(
        command.model or str(FOLDER),
        base=command.base,
        loras=loras,
        dtype=command.dtype,
        device=command.device,
        offload=command.offload,
        speed=command,
    )
    for source, scale in loras:
        print(f"LoRA {source}, scale {scale:g}")
    return pipeline


# -- What is asked for ------------------------------------------------------------------------------------------------


def _read_jobs(command: Generate) -> list[Job]:
    if command.batch is None:
        job = checked("generate", command)
        existing = [str(path) for path in (job.output, *job.previews) if path.exists()]
        if existing and not command.overwrite:
            raise ValueError(f"{', '.join(existing)} exists already. Name another output, or pass --overwrite.")
        return [job]
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
            jobs.append(checked(name, replace(command, **_read_line(name, line))))
    if not jobs:
        raise ValueError(f"{command.batch} has no lines.")
    outputs = Counter(str(job.output) for job in jobs)
    if twice := sorted(output for output, count in outputs.items() if count > 1):
        raise ValueError(f"{command.batch} writes the same output more than once: {', '.join(twice)}.")
    return jobs


def _read_line(name: str, line: str) -> dict[str, Any]:
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
    if "references" in job and "reference" in job:
        raise ValueError(f"{name} has both references and reference, which are the same. Leave one out.")
    if references := job.keys() & {"references", "reference"}:
        job["reference"] = _as_tuple(job.pop(references.pop()))
    if "cut_out" in job:
        job["cut_out"] = tuple(str(word).lower() for word in _as_tuple(job["cut_out"]))  # JSON's true is True
    if "output" in job:
        job["output"] = Path(job["output"])
    return job


def _as_tuple(value: Any) -> tuple:
    return tuple(value) if isinstance(value, list) else (value,)


def checked(name: str, command: Generate) -> Job:
    if command.prompt is None:
        raise ValueError(f"{name}: the prompt is missing.")
    if command.output is None:
        raise ValueError(f"{name}: the output is missing.")
    job = Job(name, command.output, command)
    _check_output(job)
    if not all(isinstance(reference, str) for reference in command.reference):
        raise ValueError(f"{name}: references are paths or URLs, not {command.reference}.")
    if unknown := set(command.cut_out) - CUT_OUT.keys():
        raise ValueError(f"{name}: cut_out is {', '.join(sorted(unknown))}; known are auto, true and false.")
    if len(command.cut_out) not in (1, len(command.reference)):
        raise ValueError(
            f"{name}: cut_out has {len(command.cut_out)} words for {len(command.reference)} references. Give one "
            "for all, or one each."
        )
    if not -(2**63) <= command.seed < 2**64:
        raise ValueError(f"{name}: the seed is {command.seed}, more than 64 bits.")
    return job


def _check_output(job: Job) -> None:
    output = job.output
    if output.is_symlink():
        raise ValueError(f"{job.name}: the output {output} is a symbolic link: name {output.resolve()} instead.")
    if output.suffix != ".mp4":
        raise ValueError(f"{job.name}: the output is {output}, but must end in .mp4.")
    place = next(parent for parent in output.absolute().parents if parent.exists())
    if output.is_dir() or not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(f"{job.name}: {output} cannot be written. Name another output.")


def filled(job: Job, defaults: dict[str, Any]) -> Job:
    """The job with defaults where it says nothing."""
    settings = vars(job.command)
    defaults = {**defaults, "steps": defaults["num_inference_steps"]}
    missing = {}
    for name in defaults.keys() & settings.keys():
        if settings[name] is None or settings[name] is False:  # a switch that is not given
            missing[name] = defaults[name]
    return replace(job, command=replace(job.command, **missing))


def tell_other_scales(loras: Sequence[str], jobs: Sequence[Job]) -> None:
    """Prints in a line for each LoRA which guidance scales it was made for, and which jobs have others."""
    from refalign.loading import parse_lora
    from refalign.lora_defaults import read_lora_defaults, told

    for source, _ in map(parse_lora, loras):
        if wanted := read_lora_defaults(source):
            others = [job.name for job in jobs if wanted.items() - vars(job.command).items()]
            exception = f", but others were given for {', '.join(map(shown, others))}" if others else ""
            print(f"LoRA {source} is distilled for {told(wanted)}{exception}.")


def prepare(command: Generate) -> dict[str, Any]:
    """The arguments of the pipeline's call, the references among them as the model sees them."""
    from refalign.reference_images import prepare_reference_images

    arguments = check_options(command)
    cut_out: list[CutOut] = [CUT_OUT[word] for word in command.cut_out]
    if len(cut_out) == 1:
        cut_out *= len(command.reference)
    height, width = arguments["height"], arguments["width"]
    references = prepare_reference_images(
        list(command.reference), height, width, cut_out, arguments["reference_long_edge"]
    )
    return arguments | {"reference_images": references or None}


def check_options(command: Generate) -> dict[str, Any]:
    """The arguments of the pipeline's call without the references, checked."""
    from refalign.pipeline_refalign_wan import check_projection, check_settings, check_size

    arguments: dict[str, Any] = {
        "prompt": command.prompt,
        "negative_prompt": command.negative_prompt,
        "height": command.height,
        "width": command.width,
        "num_frames": command.num_frames,
        "num_inference_steps": command.steps,
        "guidance_scale": command.guidance_scale,
        "image_guidance_scale": command.image_guidance_scale,
        "guidance_gate": command.guidance_gate,
        "guidance_projection": read_projection(command.guidance_projection),
        "reference_long_edge": command.reference_long_edge,
    }
    check_size(arguments["height"], arguments["width"], arguments["num_frames"])
    scales = (arguments["guidance_scale"], arguments["image_guidance_scale"])
    check_settings(arguments["num_inference_steps"], *scales, arguments["guidance_gate"])
    check_projection(arguments["guidance_projection"])
    return arguments


def read_projection(projection: Any) -> dict[str, Any] | None:
    """`--guidance-projection` as the pipeline takes it; a model's own default is so already."""
    if projection is None or isinstance(projection, dict):
        return projection
    eta, *thresholds = projection
    return {"eta": eta, "thresholds": thresholds}


# -- One video --------------------------------------------------------------------------------------------------------


def _generate_one(pipeline: "RefAlignWanPipeline", job: Job, arguments: dict[str, Any], place: str = "") -> None:
    """`place` says which one of a batch it is."""
    import torch
    from tqdm import tqdm

    from refalign.files import new_file
    from refalign.levers import set_cache
    from refalign.progress import showing_stages
    from refalign.video import write_video

    pipeline.check_inputs(**arguments)
    set_cache(pipeline, job.command.cache, job.command.model or str(FOLDER), arguments["num_inference_steps"])
    print(f"{place}{job.output}: {_plan(arguments)}", flush=True)
    command = job.command
    may_replace = command.overwrite or command.batch is not None
    for path, image in zip(job.previews, arguments["reference_images"] or (), strict=False):
        with new_file(path, overwrite=may_replace) as file:
            image.save(file)
    generator = torch.Generator().manual_seed(command.seed)
    pipeline.set_progress_bar_config(desc="Denoising")
    with showing_stages(pipeline, arguments):
        frames = pipeline(**arguments, generator=generator, output_type="pil", return_dict=False)[0][0]
    with tqdm(frames, desc="Writing") as written:
        write_video(written, job.output, settings=kept_settings(command), overwrite=command.overwrite)
    print(f"Wrote {job.output}", flush=True)


def _plan(arguments: dict[str, Any]) -> str:
    from refalign.pipeline_refalign_wan import FRAMES_PER_LATENT, TOKEN_PIXELS

    height, width, num_frames = arguments["height"], arguments["width"], arguments["num_frames"]
    images = arguments["reference_images"] or ()
    per_frame = (height // TOKEN_PIXELS) * (width // TOKEN_PIXELS)
    references = sum((image.height // TOKEN_PIXELS) * (image.width // TOKEN_PIXELS) for image in images)
    video = ((num_frames - 1) // FRAMES_PER_LATENT + 1) * per_frame
    return (
        f"frames: {num_frames} of {width}x{height}, references: {len(images)}, tokens: {video + references:,} "
        f"({video:,} of the video, {references:,} of references), steps: {arguments['num_inference_steps']}, "
        f"passes per step: {_passes(arguments)}"
    )


def _passes(arguments: dict[str, Any]) -> str:
    """How many passes a step makes, and from which step on it makes fewer."""
    from refalign.pipeline_refalign_wan import guidance_passes, passes_made

    scales = (arguments["guidance_scale"], arguments["image_guidance_scale"])
    is_projected = bool(arguments["guidance_projection"])
    names = [name for name, _ in guidance_passes(*scales, bool(arguments["reference_images"]), is_projected)]
    steps, told, last = arguments["num_inference_steps"], str(len(names)), len(names)
    for step in range(steps):
        count = len(passes_made(names, arguments["guidance_gate"], step, steps))
        if count != last:
            told += f", {count} from step {step + 1}"
            last = count
    return told


def kept_settings(command: Generate) -> dict[str, Any]:
    """What it takes to make the video again, without folders of this machine and secrets of URLs."""
    from refalign import __version__
    from refalign.loading import parse_lora

    settings = dict(vars(command))
    for name in NOT_KEPT:
        del settings[name]
    for name in (*SPEED, "guidance_projection", "reference_long_edge"):
        if not settings.get(name):
            settings.pop(name, None)  # as videos were made before there were these options
    settings["model"] = source_name(command.model or str(FOLDER))
    if command.quantize is not None:
        settings["quantize"] = source_name(command.quantize)
    settings["base"] = command.base and source_name(command.base)
    settings["reference"] = [source_name(reference) for reference in command.reference]
    settings["lora"] = [f"{source_name(source)}:{scale:g}" for source, scale in map(parse_lora, command.lora)]
    return {"refalign": __version__, **settings}
