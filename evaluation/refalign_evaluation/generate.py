"""
`refalign-eval generate`: a model's videos of a benchmark's samples, as `<sample id>.mp4` in one folder.

A call that is started again goes on: a video that exists is done. Processes of torchrun take every so many'th sample.
"""

import hashlib
import importlib.metadata
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refalign.generate import check_options, filled, generate_all, kept_settings, load_for
from refalign.jobs import Generate as VideoCommand
from refalign.jobs import Job, checked
from refalign.presets import with_preset
from refalign.privacy import shown, source_name
from refalign.sprites import FOLDER
from refalign.video_options import VideoOptions
from refalign_evaluation.benchmark import BenchmarkSample, Split


if TYPE_CHECKING:
    from refalign.pipeline_refalign_wan import RefAlignWanPipeline
    from refalign_evaluation.run_folder import Run


PACKAGES = ("refalign", "torch", "diffusers", "transformers")
NOT_SETTINGS = ("refalign", "model", "prompt", "reference")  # of what a video's file keeps


@dataclass(frozen=True, kw_only=True)
class Generate(VideoOptions):
    """Make the videos of OpenS2V-Eval that a model is judged by. Called again, it goes on."""

    benchmark: Path
    """The folder of the benchmark: a copy of the dataset BestWishYsh/OpenS2V-Eval."""
    split: Split = "open"
    """The part of the benchmark: all kinds of subjects, people, or one subject a video."""
    output: Path
    """The folder to write <sample id>.mp4 to, with run.json, which says what made them."""
    limit: int | None = None
    """The number of samples to make, from the first. By default all of the split are made."""
    dry_run: bool = False
    """Count samples and passes, measure a step of this model on this machine, and say how long it will take."""
    seconds_per_step: float | None = None
    """For --dry-run: how long a denoising step takes, instead of measuring it."""


def run(command: Generate) -> int:
    """
    Makes the videos that are missing and returns the exit code: 1 if some could not be made.

    Raises:
        ValueError: if options do not fit, the benchmark cannot be used, or the folder holds videos of other settings.
    """
    from refalign.devices import rank_and_processes
    from refalign.loading import read_defaults
    from refalign.owner import remove_dead_lock
    from refalign_evaluation.benchmark import digest_images, digest_split, read_benchmark
    from refalign_evaluation.run_folder import Run, begin, check_same

    _check(command)
    digest = digest_split(command.benchmark, command.split)
    samples = list(read_benchmark(command.benchmark, command.split).values())[: command.limit]
    if digest_split(command.benchmark, command.split) != digest:
        raise ValueError(f"{command.benchmark} changed while it was read. Call this again when it is whole.")
    defaults = read_defaults(command.base or command.model or str(FOLDER), command.lora)
    defaults = with_preset(command.fast, command.device, defaults)
    jobs = [filled(_job(command, sample), defaults) for sample in samples]
    for job in jobs:
        check_options(job.command)
    settings = _settings(jobs[0]) | {"benchmark": digest}
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    ids = tuple(sample.id for sample in samples)
    model = "refalign-sprites" if command.model is None else source_name(command.model)
    images = {sample.id: digest_images(sample.images) for sample in samples}
    asked = Run(split=command.split, model=model, samples=ids, settings=settings, versions=versions, images=images)
    check_same(command.output, asked)
    left = [job for job in jobs if not job.output.exists()]
    for job in jobs:
        if job not in left:
            remove_dead_lock(job.output)
    print(f"{command.output}: {len(jobs)} samples of the split {command.split}, {len(jobs) - len(left)} made before")
    rank, processes = rank_and_processes()
    if command.dry_run:
        print(_plan(command, left, processes))
        return 0
    if not (mine := left[rank::processes]):
        return 0
    pipeline = load_for(mine[0].command)
    begin(command.output, _with_weights(asked, pipeline))
    return _make(pipeline, mine, command.output, images)


def _check(command: Generate) -> None:
    if command.limit is not None and command.limit < 1:
        raise ValueError(f"--limit is {command.limit}: pass 1 or more.")
    if command.seconds_per_step is not None and not command.dry_run:
        raise ValueError("--seconds-per-step goes with --dry-run.")
    if command.seconds_per_step is not None and not 0 < command.seconds_per_step < 1e6:
        raise ValueError(f"--seconds-per-step is {command.seconds_per_step}: pass a number of seconds above 0.")


def _job(command: Generate, sample: BenchmarkSample) -> Job:
    """What makes a sample's video: the command of `refalign generate` that does."""
    shared = {field.name: getattr(command, field.name) for field in fields(VideoOptions)}
    output = command.output / f"{sample.id}.mp4"
    references = tuple(map(str, sample.images))
    return checked(sample.id, VideoCommand(prompt=sample.prompt, reference=references, output=output, **shared))


def _settings(job: Job) -> dict[str, Any]:
    """What all videos of a run must have been made with."""
    settings = kept_settings(job.command)
    for name in NOT_SETTINGS:
        del settings[name]
    return json.loads(json.dumps(settings))  # as it comes back from the file: tuples are lists there


def _with_weights(asked: "Run", pipeline: "RefAlignWanPipeline") -> "Run":
    return asked.model_copy(update={"settings": {**asked.settings, "weights": fingerprint(pipeline)}})


def fingerprint(pipeline: "RefAlignWanPipeline") -> str:
    """A digest of the dtypes and some values of every weight of the transformer, so that a model that was trained on
    under its old name is another one."""
    from refalign.quantization import as_plain

    digest = hashlib.sha256()
    for name, weight in sorted(pipeline.transformer.state_dict().items()):
        flat = as_plain(weight.detach()).flatten()
        some = flat[:: max(flat.numel() // 64, 1)].float().cpu()
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode() + some.numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def _make(pipeline: "RefAlignWanPipeline", jobs: Sequence[Job], output: Path, images: Mapping[str, str]) -> int:
    from refalign.command_line import one_line
    from refalign_evaluation.run_folder import tell_failure

    failed = []
    for job, error in generate_all(pipeline, jobs):
        reason = None if error is None else one_line(error)
        if reason is None and _have_changed(job, images[job.name]):
            job.output.unlink()  # who knows which of them it shows
            reason = "its images changed while the video was made. Call this again when the benchmark is whole."
        tell_failure(output, job.name, reason)
        if reason is not None:
            print(f"refalign-eval: {job.name}: {shown(reason)}", file=sys.stderr)
            failed.append(job.name)
    if failed:
        names = ", ".join(failed)
        print(f"refalign-eval: {len(failed)} of {len(jobs)} samples failed: {names}. Call it again.", file=sys.stderr)
    return 1 if failed else 0


def _have_changed(job: Job, digest: str) -> bool:
    """Whether the images of a job are not what they were when the call began."""
    from refalign_evaluation.benchmark import digest_images

    try:
        return digest_images(map(Path, job.command.reference)) != digest
    except OSError:
        return True


# -- What it will take ------------------------------------------------------------------------------------------------


def _plan(command: Generate, jobs: Sequence[Job], processes: int) -> str:
    """The samples that are left, their passes and hours, for a terminal."""
    from refalign.pipeline_refalign_wan import count_passes, guidance_passes

    if not jobs:
        return "Nothing is left to make."
    options = check_options(jobs[0].command)
    steps = options["num_inference_steps"]
    names = [name for name, _ in guidance_passes(options["guidance_scale"], options["image_guidance_scale"], True)]
    passes = count_passes(names, options["guidance_gate"], steps)
    by_count = _by_count(jobs)
    counts = ", ".join(f"{len(some)} with {count}" for count, some in sorted(by_count.items()))
    size = f"{options['num_frames']} frames of {options['width']}x{options['height']}"
    lines = [
        f"left: {len(jobs)} samples ({counts} references), {size}",
        f"passes: {len(jobs) * passes:,} ({passes:,} in {steps} steps for each)",
    ]
    costs = dict.fromkeys(by_count, Cost(command.seconds_per_step or 0.0, 0.0))
    if command.seconds_per_step is None:
        costs = _measure(load_for(jobs[0].command), by_count)
        for count, cost in sorted(costs.items()):
            lines.append(f"measured with {count} references: {cost.step:.3g} s per step, {cost.rest:.3g} s besides")
    whole_steps = passes / len(names)  # a measured step makes all passes
    seconds = 0.0
    for count, some in by_count.items():
        seconds += (costs[count].step * whole_steps + costs[count].rest) * len(some)
    shared = "" if processes == 1 else f" on each of {processes} processes"
    return "\n".join([*lines, f"time: {seconds / processes / 3600:.3g} hours{shared}"])


@dataclass(frozen=True)
class Cost:
    """How long a video takes, in seconds."""

    step: float
    """A denoising step, with all its passes."""
    rest: float
    """Encoders and decoder."""


def _by_count(jobs: Sequence[Job]) -> dict[int, list[Job]]:
    by_count: dict[int, list[Job]] = {}
    for job in jobs:
        by_count.setdefault(len(job.command.reference), []).append(job)
    return by_count


def _measure(pipeline: "RefAlignWanPipeline", by_count: Mapping[int, Sequence[Job]]) -> dict[int, Cost]:
    """What a video costs, by the number of its references: a call of two steps, of which the second one counts."""
    from refalign.generate import prepare

    pipeline.set_progress_bar_config(disable=True)
    costs = {}
    for count, jobs in by_count.items():
        arguments = {**prepare(jobs[0].command), "num_inference_steps": 2, "guidance_gate": None}
        ends: list[float] = []

        def note_end(*call: Any, ends: list[float] = ends) -> dict[str, Any]:
            _wait(pipeline)
            ends.append(time.perf_counter())
            return {}

        start = time.perf_counter()
        pipeline(**arguments, callback_on_step_end=note_end, output_type="pt")
        step = ends[1] - ends[0]
        _wait(pipeline)
        costs[count] = Cost(step, max(time.perf_counter() - start - 2 * step, 0.0))
    return costs


def _wait(pipeline: "RefAlignWanPipeline") -> None:
    """Until the accelerator has done what it was told."""
    import torch

    if pipeline._execution_device.type != "cpu":
        torch.accelerator.synchronize()
