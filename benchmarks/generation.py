"""RefAlignWanPipeline against diffusers' WanPipeline: seconds a step and peak memory, at the same number of tokens.

    python -m benchmarks.generation                                                     # on a CPU: half an hour
    python -m benchmarks.generation --size tiny --steps 3 --repeats 2                   # does it run
    python -m benchmarks.generation --size 1.3b --device cuda --dtype bfloat16 --repeats 3

Both pipelines run one transformer of random weights, shared and not copied, through their own `__call__`, from given
noise and embeddings to latents. K references beside F latent frames in RefAlign stand against F + K latent frames in
Wan: equal tokens, an equal scheduler and equal passes. Wan never takes three passes, so three of RefAlign's stand
against three times a step of Wan's with one. Without references RefAlign runs Wan's own forward: those rows show the
noise of the measurement.

Seconds: all in one process; the sides take turns, and the side that begins alternates. A step's time is that between
two calls of `callback_on_step_end`, so the first step of each call, which warms up, is not counted. The ratio is the
median over repeats of RefAlign's median divided by Wan's.
Memory: a fresh process for each side of each row; the peak above what is held before the call, weights included
there. On CUDA it is what PyTorch allocates. On a CPU it is resident memory (VmHWM), after a call so small that it
only loads code, with an allocator that gives freed blocks back at once: the peak is that of live tensors. Without
that it would be higher on both sides, and differ from run to run.
"""

import ctypes
import dataclasses
import statistics
import time
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any, Literal

import torch
import tyro
from diffusers import WanPipeline, WanTransformer3DModel
from tqdm.auto import tqdm

from benchmarks.machine import in_fresh_process, machine_line, markdown_table, process_memory, reset_peak_memory
from refalign import RefAlignWanPipeline
from refalign.pipeline_refalign_wan import TOKEN_PIXELS, guidance_passes, paper_scheduler


Side = Literal["wan", "refalign"]
M_MMAP_THRESHOLD = -3  # glibc's malloc.h: larger blocks are given back to the system when they are freed
SIDES: tuple[Side, Side] = ("wan", "refalign")
# RefAlign's passes a step: the guidance scales for text and references that ask for so many, and Wan's passes
GUIDANCE = {1: (1.0, 1.0), 2: (5.0, 1.0), 3: (7.5, 5.0)}
WAN_PASSES = {1: 1, 2: 2, 3: 1}


@dataclass(frozen=True)
class Size:
    """A transformer and a video: its pixels, its latent frames (without references), and the prompt's tokens."""

    transformer: dict[str, int]
    height: int
    width: int
    frames: int
    text_tokens: int = 512


SIZES = {
    "tiny": Size(
        {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 128, "num_layers": 2, "text_dim": 64},
        *(64, 96, 3, 16),
    ),
    # Wan's size of a head and of the text, and about a twentieth of the parameters and of the tokens of 1.3b
    "mid": Size({"num_attention_heads": 6, "ffn_dim": 3072, "num_layers": 6}, 240, 416, 4),
    "1.3b": Size({"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, 480, 832, 21),
}


@dataclass(frozen=True)
class Options:
    """Compares RefAlignWanPipeline with WanPipeline at the same number of tokens."""

    size: Literal["tiny", "mid", "1.3b"] = "mid"
    """tiny to try; mid for a CPU; 1.3b is the released model at 480x832 and 81 frames, for a GPU."""
    device: str = "cpu"
    """cpu or cuda."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype of the weights, but for those that diffusers keeps in float32."""
    references: tuple[int, ...] = (0, 1, 2, 3)
    """Numbers of references."""
    passes: tuple[int, ...] = (1, 2, 3)
    """Passes a step. Without references there are never three."""
    steps: int = 4
    """Denoising steps a call; the first is not counted."""
    repeats: int = 5
    """Calls of each side of each row."""
    memory: bool = True
    """Whether to measure peak memory too."""


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    references: int
    passes: int


@dataclass
class Result:
    """What was measured of a row: by side, one list of step times a call; and bytes."""

    seconds: dict[Side, list[list[float]]] = field(default_factory=lambda: {side: [] for side in SIDES})
    peak: dict[Side, int] = field(default_factory=dict)


def make_transformer(options: Options) -> WanTransformer3DModel:
    """Random weights on the device, in the dtypes in which `from_pretrained` would load them."""
    torch.manual_seed(0)
    with torch.device(options.device):
        model = WanTransformer3DModel(**{"text_dim": 4096, **SIZES[options.size].transformer}).eval()
    for name, parameter in model.named_parameters():
        if not set(name.split(".")) & set(model._keep_in_fp32_modules):
            parameter.data = parameter.data.to(getattr(torch, options.dtype))
    return model.requires_grad_(False)


def make_pipeline(side: Side, transformer: WanTransformer3DModel) -> WanPipeline:
    """The side's pipeline around `transformer`, without VAE and text encoder."""
    pipeline = (RefAlignWanPipeline if side == "refalign" else WanPipeline)(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=paper_scheduler(),
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call_arguments(side: Side, case: Case, size: Size, text_dim: int, device: str) -> dict[str, Any]:
    """What the side's pipeline is called with: equal tokens and equal passes on both sides."""
    generator = torch.Generator().manual_seed(0)
    text_scale, image_scale = GUIDANCE[case.passes]
    frames, rows, columns = size.frames, size.height // 8, size.width // 8
    arguments = {"guidance_scale": text_scale if WAN_PASSES[case.passes] > 1 else 1.0}
    if side == "refalign":
        assert len(guidance_passes(text_scale, image_scale, case.references > 0)) == case.passes
        arguments = {"guidance_scale": text_scale, "image_guidance_scale": image_scale}
        if case.references:
            latents = torch.randn(1, 16, case.references, rows, columns, generator=generator)
            arguments["reference_latents"] = latents.to(device)
    else:
        frames += case.references
    embeds = torch.randn(2, 1, size.text_tokens, text_dim, generator=generator).to(device)
    return arguments | {
        "height": size.height,
        "width": size.width,
        "num_frames": 4 * frames - 3,
        "latents": torch.randn(1, 16, frames, rows, columns, generator=generator).to(device),
        "prompt_embeds": embeds[0],
        "negative_prompt_embeds": embeds[1],
    }


def step_seconds(pipeline: WanPipeline, arguments: dict[str, Any], steps: int) -> list[float]:
    """The seconds of each step of one call, but of the first."""
    ends = []

    def note_time(pipeline: WanPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        if pipeline.transformer.device.type == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        return {}

    pipeline(**arguments, num_inference_steps=steps, output_type="latent", callback_on_step_end=note_time)
    return [end - start for start, end in pairwise(ends)]


def measure_seconds(options: Options, results: dict[Case, Result]) -> None:
    """Fills in the seconds; the sides take turns."""
    transformer = make_transformer(options)
    pipelines = {side: make_pipeline(side, transformer) for side in SIDES}
    size, text_dim = SIZES[options.size], transformer.config.text_dim
    turns = [
        (side, case)
        for repeat in range(options.repeats)
        for case in results
        for side in (SIDES if repeat % 2 == 0 else SIDES[::-1])
    ]
    for side, case in tqdm(turns, desc="Seconds"):
        arguments = call_arguments(side, case, size, text_dim, options.device)
        results[case].seconds[side].append(step_seconds(pipelines[side], arguments, options.steps))


def peak_memory(side: Side, case: Case, options: Options) -> int:
    """The bytes that a call takes at its peak above what is held before it. To be run in a fresh process."""
    if options.device == "cpu":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
    transformer = make_transformer(options)
    pipeline, text_dim = make_pipeline(side, transformer), transformer.config.text_dim
    small = dataclasses.replace(SIZES[options.size], height=16, width=16, frames=1, text_tokens=8)
    step_seconds(pipeline, call_arguments(side, case, small, text_dim, options.device), steps=1)
    arguments = call_arguments(side, case, SIZES[options.size], text_dim, options.device)
    if options.device == "cpu":
        reset_peak_memory()
        before = process_memory()["VmRSS"]
        step_seconds(pipeline, arguments, steps=2)
        return process_memory()["VmHWM"] - before
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step_seconds(pipeline, arguments, steps=2)
    return torch.cuda.max_memory_allocated() - before


def measure_memory(options: Options, results: dict[Case, Result]) -> None:
    """Fills in the peaks, a process each."""
    for side, case in tqdm([(side, case) for case in results for side in SIDES], desc="Memory"):
        results[case].peak[side] = in_fresh_process(peak_memory, side, case, options)


def table_row(case: Case, result: Result, size: Size) -> list[str]:
    """A row of [`report`]'s table."""
    tokens = (size.frames + case.references) * (size.height // TOKEN_PIXELS) * (size.width // TOKEN_PIXELS)
    factor = case.passes // WAN_PASSES[case.passes]
    wan, refalign = (statistics.median(chain.from_iterable(result.seconds[side])) for side in SIDES)
    ratios = [
        statistics.median(ours) / (factor * statistics.median(theirs))
        for theirs, ours in zip(result.seconds["wan"], result.seconds["refalign"], strict=True)
    ]
    row = [str(case.references), str(case.passes), f"{tokens:,}"]
    row += [f"{wan:.3f}" if factor == 1 else f"{factor} x {wan:.3f}", f"{refalign:.3f}"]
    row += [f"{statistics.median(ratios):.3f}", f"{min(ratios):.3f}-{max(ratios):.3f}"]
    return row + [f"{result.peak[side] / 1e6:,.0f}" if result.peak else "" for side in SIDES]


def report(options: Options, results: dict[Case, Result]) -> str:
    """What was compared, where, and the table."""
    header = ["References", "passes", "tokens", "Wan, s a step", "RefAlign, s a step", "ratio", "its range"]
    header += ["Wan, peak MB", "RefAlign, peak MB"]
    size = SIZES[options.size]
    what = (
        f"Size {options.size}, {size.height}x{size.width}, {size.frames} latent frames, {options.dtype}; "
        f"{options.repeats} calls of {options.steps} steps each."
    )
    rows = [table_row(case, result, size) for case, result in results.items()]
    return f"{machine_line(options.device)} {what}\n\n{markdown_table(header, rows)}"


def main(options: Options) -> None:
    """Raises ValueError where there would be no step to count."""
    if options.steps < 2 or options.repeats < 1:
        raise ValueError(f"`steps` is {options.steps} and `repeats` {options.repeats}; pass 2 and 1, or more.")
    cases = [Case(references, passes) for references in options.references for passes in options.passes]
    results = {case: Result() for case in cases if case.references or case.passes < 3}
    if options.memory:
        measure_memory(options, results)
    measure_seconds(options, results)
    print(report(options, results))


if __name__ == "__main__":
    main(tyro.cli(Options))
