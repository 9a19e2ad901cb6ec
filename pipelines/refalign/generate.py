"""`refalign generate`: one video, or a batch of them, from what the command line says.

Nothing heavy is imported before it is needed, so that `--help` answers at once.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from refalign.jobs import CUT_OUT, Generate, Job, read_jobs
from refalign.owner import owned
from refalign.presets import PRESETS, check_preset, with_preset
from refalign.privacy import shown, source_name
from refalign.processes import ALONE, Processes, together
from refalign.sprites import FOLDER
from refalign.video_options import SpeedOptions


if TYPE_CHECKING:
    from refalign.pipeline_refalign_wan import RefAlignWanPipeline
    from refalign.reference_images import CutOut


SPEED = {option.name: option.default for option in fields(SpeedOptions)}
# They do not change the video, or (`fast`) by other options alone
NOT_KEPT = ("output", "batch", "preview", "overwrite", "device", "offload", "trust_kernels", "fast", "parallel")


def run(command: Generate) -> int:
    """Makes the videos and returns the exit code. Of a batch, a job that fails is told and the others go on."""
    with together(command.device) as processes:
        with processes.only_first_speaks():
            jobs = _filled_jobs(command)
            parallel = _parallel(command, len(jobs), processes)
        if command.batch is not None:
            return _run_batch(command, jobs, processes, parallel)
        (job,) = jobs
        owns = owned(job.output, *job.previews) if processes.is_first else nullcontext()
        with processes.only_first_speaks(), owns:
            arguments = prepare(job.command)  # first of all, so that a mistake shows before the model is loaded
            _generate_one(_load(jobs, processes), job, arguments, processes)
    return 0


def _filled_jobs(command: Generate) -> list[Job]:
    """What is asked for, with the model's defaults."""
    if command.model is None:
        if command.base is not None:
            raise ValueError("--base goes with --model, a native checkpoint.")
        print("No --model: taking the tiny one of this package, which knows drawn figures alone (see refalign demo).")
    check_preset(command.fast)
    jobs = read_jobs(command)
    from refalign.loading import read_defaults  # takes seconds, in which mistakes have been told

    defaults = read_defaults(command.base or command.model or str(FOLDER), command.lora)
    defaults = with_preset(command.fast, command.device, defaults)
    jobs = [filled(job, defaults) for job in jobs]
    tell_other_scales(command.lora, jobs)
    return jobs


def _parallel(command: Generate, jobs: int, processes: Processes) -> str:
    """What processes share, jobs or passes."""
    if command.parallel is not None and processes.count == 1:
        example = "torchrun --nproc_per_node 3 -m refalign.cli generate"
        raise ValueError(f"--parallel {command.parallel} goes with many processes: start them by {example} ...")
    if command.parallel == "jobs" and command.batch is None:
        raise ValueError("--parallel jobs goes with --batch. The processes share one video's passes without it.")
    return command.parallel or ("jobs" if jobs > 1 else "passes")


def _run_batch(command: Generate, jobs: list[Job], processes: Processes, parallel: str) -> int:
    failed: list[Job] = []
    with processes.only_first_speaks():
        left = _without_finished(jobs, command.overwrite)
        # As the first process saw it: it may make the first video before another one looks
        names = processes.gather({job.name for job in left})[0]
        left = [job for job in jobs if job.name in names]
        for job in left:
            try:
                check_options(job.command)  # before the model is loaded, which may be for none
            except ValueError as error:
                _tell_failed(job, error, failed)
    good = [job for job in left if job not in failed]
    partners = processes
    if parallel == "jobs":
        good, partners = good[processes.rank :: processes.count], Processes()
    with partners.only_first_speaks():
        for job, error in generate_all(_load(good, partners), good, partners) if good else ():
            if error is not None:
                _tell_failed(job, error, failed)
    all_failed = set().union(*processes.gather({job.name for job in failed}))
    if not all_failed or not processes.is_first:
        return 0
    told = ", ".join(shown(job.name) for job in left if job.name in all_failed)
    print(f"refalign: {len(all_failed)} of {len(left)} videos failed: {told}", file=sys.stderr)
    return 1


def _without_finished(jobs: list[Job], overwrite: bool) -> list[Job]:
    from refalign.owner import remove_dead_lock

    left: list[Job] = []
    for job in jobs:
        if job.output.exists() and not overwrite:
            remove_dead_lock(job.output)
            print(f"{job.name}: {job.output} exists, passed over (--overwrite makes it again)")
        else:
            left.append(job)
    return left


def generate_all(
    pipeline: "RefAlignWanPipeline", jobs: Sequence[Job], processes: Processes = ALONE
) -> Iterator[tuple[Job, Exception | None]]:
    """
    Makes the videos, and gives each job when its turn is over, with the error that it ended with if it failed.

    Of many processes that share the passes, an error while a video is made ends them all: the others wait for what
    this one does not do.
    """
    for number, job in enumerate(jobs, 1):
        arguments, error = {}, None
        with ExitStack() as stack:
            try:
                if processes.is_first:
                    stack.enter_context(owned(job.output, *job.previews))
                arguments = prepare(job.command)
                pipeline.check_inputs(**arguments)
            except Exception as own:  # whatever it is, it must not end the others
                error = own
            error = processes.agree(error)
            try:
                if error is None:
                    _generate_one(pipeline, job, arguments, processes, place=f"{number} of {len(jobs)}: ")
            except Exception as own:
                if processes.count > 1:
                    raise
                error = own
        yield job, error


def _load(jobs: Sequence[Job], processes: Processes) -> "RefAlignWanPipeline":
    """The model, whose passes the processes share."""
    if processes.count == 1:
        return load_for(jobs[0].command)
    from refalign.loading import read_defaults
    from refalign.pipeline_refalign_wan import guidance_passes, processes_per_pass

    command, most = jobs[0].command, 1
    is_projected = bool(read_defaults(command.base or command.model or str(FOLDER))["guidance_projection"])
    for job in jobs:
        options = check_options(job.command)
        scales = (options["guidance_scale"], options["image_guidance_scale"])
        most = max(most, len(guidance_passes(*scales, bool(job.command.reference), is_projected)))
    processes_per_pass(processes.count, most)  # so that a mistake shows before the model is loaded
    pipeline = load_for(command)
    pipeline.enable_guidance_parallel(most)
    return pipeline


def _tell_failed(job: Job, error: Exception, failed: list[Job]) -> None:
    from refalign.command_line import one_line

    print(f"refalign: {shown(job.name)}: {shown(one_line(error))}", file=sys.stderr)
    failed.append(job)


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


# -- What the pipeline is called with ---------------------------------------------------------------------------------


def filled(job: Job, defaults: dict[str, Any]) -> Job:
    """The job with defaults where it says nothing."""
    settings = vars(job.command)
    defaults = {**defaults, "steps": defaults["num_inference_steps"]}
    missing = {}
    for name in defaults.keys() & settings.keys():
        if settings[name] is None:
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

    check_preset(command.fast)
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
        "batch_passes": command.batch_passes,
    }
    check_size(arguments["height"], arguments["width"], arguments["num_frames"])
    scales = (arguments["guidance_scale"], arguments["image_guidance_scale"])
    check_settings(arguments["num_inference_steps"], *scales, arguments["guidance_gate"])
    check_projection(arguments["guidance_projection"])
    cache = command.cache or PRESETS[command.fast or "exact"].cache
    if command.batch_passes and cache:
        raise ValueError(
            f"--batch-passes makes all passes at once, but --cache {cache} keeps each by itself: pass one."
        )
    return arguments


def read_projection(projection: Any) -> dict[str, Any] | None:
    """`--guidance-projection` as the pipeline takes it; a model's own default is so already."""
    if projection is None or isinstance(projection, dict):
        return projection
    eta, *thresholds = projection
    return {"eta": eta, "thresholds": thresholds}


# -- One video --------------------------------------------------------------------------------------------------------


def _generate_one(
    pipeline: "RefAlignWanPipeline", job: Job, arguments: dict[str, Any], processes: Processes, place: str = ""
) -> None:
    """`place` says which one of a batch it is. Of many processes, the first one writes."""
    import torch
    from tqdm import tqdm

    from refalign.files import new_file
    from refalign.levers import set_cache
    from refalign.progress import showing_stages
    from refalign.video import write_video

    set_cache(pipeline, job.command.cache, job.command.model or str(FOLDER), arguments["num_inference_steps"])
    pipeline.check_inputs(**arguments)
    print(f"{place}{job.output}: {_plan(arguments)}", flush=True)
    command = job.command
    may_replace = command.overwrite or command.batch is not None
    previews = job.previews if processes.is_first else []
    for path, image in zip(previews, arguments["reference_images"] or (), strict=False):
        with new_file(path, overwrite=may_replace) as file:
            image.save(file)
    generator = torch.Generator().manual_seed(command.seed)
    pipeline.set_progress_bar_config(desc="Denoising")
    with showing_stages(pipeline, arguments):
        frames = pipeline(**arguments, generator=generator, output_type="pil", return_dict=False)[0][0]
    if not processes.is_first:
        return
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
    for name, default in {**SPEED, "guidance_projection": None, "reference_long_edge": None}.items():
        if settings.get(name, default) == default:
            settings.pop(name, None)  # as videos were made before there were these options
    settings["model"] = source_name(command.model or str(FOLDER))
    if command.quantize is not None:
        settings["quantize"] = source_name(command.quantize)
    settings["base"] = command.base and source_name(command.base)
    settings["reference"] = [source_name(reference) for reference in command.reference]
    settings["lora"] = [f"{source_name(source)}:{scale:g}" for source, scale in map(parse_lora, command.lora)]
    return {"refalign": __version__, **settings}
