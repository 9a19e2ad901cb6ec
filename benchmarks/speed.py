"""Seconds a step, peak GiB and minutes a clip: presets of `--fast` by models, sizes and references.

    python -m benchmarks.speed --device cuda --page README.md docs/speed.md      # an hour on an H100, or so
    python -m benchmarks.speed --reckon --page README.md docs/speed.md           # no GPU: from operations and a rate
    python -m benchmarks.speed --device cpu --output speed-cpu.json             # tiny shapes: does it run

The transformer and the VAE have the real shapes and random weights, made on the device in bfloat16 (VAE: float32).
Speed does not depend on the weights, with one exception: what a cache skips does. So caches are left out of what is
measured, and the preset's other levers stay. Prompts are embeddings, as the text encoder runs once and is under 0.1%.

Measured: a call of `--steps` steps after one that warms up (and compiles). Seconds a step are those of all steps, also
of the cheaper ones behind a guidance gate, divided by their number. Minutes a clip: that times the preset's steps of
50, and the decoding. Peak: what PyTorch allocated, the transformer's and the VAE's weights included.

Reckoned: operations of a pass by the formula of docs/memory-and-speed.md, at the rate of diffusers on an H100
(9.77 s for a step of two passes of plain Wan 14B: 344 TFLOP/s), by the passes that a preset makes. Kernel and
compilation count as 1.5, the cache as 1.8: the lower ends of what is published for them. Peak: two bytes a weight and
25.5 kB a token for width 1536, more for wider ones. Decoding is not in it.

Rows are written to `--output` as JSON, with machine and versions, and from there as Markdown between the marks of
`--page`. A test holds the pages against the file.
"""

import dataclasses
import json
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from tqdm.auto import tqdm

from benchmarks.machine import machine_line, markdown_table, write_between_marks
from refalign.pipeline_refalign_wan import CALL_DEFAULTS, count_passes, guidance_passes
from refalign.presets import PRESETS


ROWS = Path(__file__).with_name("speed.json")
STEPS = CALL_DEFAULTS["num_inference_steps"]
TEXT_TOKENS, TEXT_DIM = 512, 4096
ONE_PASS = "one pass"  # of a distilled LoRA: both scales at 1
PUBLISHED_RATE = 344e12  # operations a second, see above
KERNELS, CACHE = 1.5, 1.8
TOKEN_BYTES, TOKEN_WIDTH = 25_500, 1536


@dataclass(frozen=True)
class Model:
    """A transformer's shape."""

    width: int
    feed_forward: int
    layers: int
    head: int = 128

    @property
    def parameters(self) -> float:
        """The weights of the blocks, which are nearly all."""
        return self.layers * (8 * self.width**2 + 2 * self.width * self.feed_forward)


MODELS = {"1.3B": Model(1536, 8960, 30), "14B": Model(5120, 13824, 40), "tiny": Model(48, 96, 2, 24)}
SIZES = {"480x832, 81 frames": (480, 832, 81), "720x1280, 81 frames": (720, 1280, 81), "32x32, 5 frames": (32, 32, 5)}
REAL = (("1.3B", "14B"), ("480x832, 81 frames", "720x1280, 81 frames"), (1, 3))
TINY = (("tiny",), ("32x32, 5 frames",), (1,))
SHORT = ("480x832, 81 frames", 3)  # what README shows of all


@dataclass(frozen=True)
class Options:
    """Measures or reckons what a video takes."""

    device: Literal["cuda", "cpu"] = "cuda"
    """cuda measures the real shapes, cpu tiny ones."""
    reckon: bool = False
    """Measure nothing: reckon, from operations and a published rate."""
    steps: int = 10
    """The denoising steps of a measured call."""
    output: Path = ROWS
    """The JSON file to write."""
    page: tuple[Path, ...] = ()
    """Markdown files to write the table into. README.md gets the short one."""


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    preset: str
    model: str
    size: str
    references: int
    step_seconds: float
    peak_gib: float
    clip_minutes: float


def cases(shapes: tuple) -> list[tuple[str, str, str, int]]:
    """(preset, model, size, references) of every row."""
    models, sizes, references = shapes
    return [(preset, *case) for case in product(models, sizes, references) for preset in (*PRESETS, ONE_PASS)]


def passes_of(preset: str, steps: int) -> int:
    """The passes that all steps of a call make together."""
    if preset == ONE_PASS:
        return steps
    names = [
        name for name, _ in guidance_passes(CALL_DEFAULTS["guidance_scale"], CALL_DEFAULTS["image_guidance_scale"])
    ]
    return count_passes(names, PRESETS[preset].guidance_gate, steps)


def steps_of(preset: str) -> int:
    return STEPS if preset == ONE_PASS else round(PRESETS[preset].steps * STEPS)


# -- Reckoned ---------------------------------------------------------------------------------------------------------


def tokens_of(size: str, references: int) -> tuple[int, int]:
    """The video's tokens, and all of them."""
    height, width, frames = SIZES[size]
    per_frame = (height // 16) * (width // 16)
    video = ((frames - 1) // 4 + 1) * per_frame
    return video, video + references * per_frame


def operations(model: Model, size: str, references: int) -> float:
    """Floating-point operations of a pass, as in docs/memory-and-speed.md."""
    video, tokens = tokens_of(size, references)
    width = model.width
    linear = 4 * width**2 * tokens + 2 * width**2 * (video + TEXT_TOKENS) + 2 * width * model.feed_forward * tokens
    return model.layers * (2 * linear + 4 * width * (tokens**2 + TEXT_TOKENS * video))


def reckoned(preset: str, model: str, size: str, references: int) -> Row:
    """A row by arithmetic alone."""
    shape, steps = MODELS[model], steps_of(preset)
    seconds = operations(shape, size, references) * passes_of(preset, steps) / steps / PUBLISHED_RATE
    if preset != ONE_PASS:
        seconds /= (KERNELS if PRESETS[preset].attention else 1) * (CACHE if PRESETS[preset].cache else 1)
    _, tokens = tokens_of(size, references)
    peak = 2 * shape.parameters + tokens * TOKEN_BYTES * shape.width / TOKEN_WIDTH
    return _row((preset, model, size, references), seconds, peak, seconds * steps)


def _row(case: tuple[str, str, str, int], step_seconds: float, peak: float, clip_seconds: float) -> Row:
    return Row(*case, round(step_seconds, 3), round(peak / 2**30, 1), round(clip_seconds / 60, 2))


# -- Measured ---------------------------------------------------------------------------------------------------------


def make_pipeline(model: str, device: str) -> Any:
    """A pipeline of random weights, without a text encoder."""
    from diffusers import AutoencoderKLWan

    from refalign import RefAlignWanPipeline, RefAlignWanTransformer3DModel
    from refalign.pipeline_refalign_wan import paper_scheduler

    shape = MODELS[model]
    small = {"base_dim": 4, "z_dim": 16, "num_res_blocks": 1} if model == "tiny" else {}
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)  # not 56 GB of float32 first
    try:
        with torch.device(device):
            transformer = RefAlignWanTransformer3DModel(
                num_attention_heads=shape.width // shape.head,
                attention_head_dim=shape.head,
                ffn_dim=shape.feed_forward,
                num_layers=shape.layers,
                text_dim=TEXT_DIM,
            )
    finally:
        torch.set_default_dtype(dtype)
    with torch.device(device):
        vae = AutoencoderKLWan(**small)
    transformer.cast_weights(transformer.patch_embedding.weight.dtype).eval().requires_grad_(False)
    scheduler = paper_scheduler()
    parts = {"transformer": transformer, "vae": vae.eval().requires_grad_(False), "scheduler": scheduler}
    pipeline = RefAlignWanPipeline(tokenizer=None, text_encoder=None, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def measured(pipeline: Any, case: tuple[str, str, str, int], options: Options) -> Row:
    """A row by calls of the pipeline, whose kernels and compilation are the preset's."""
    preset, _, size, references = case
    arguments = call_arguments(pipeline, preset, size, references)
    pipeline(**arguments, num_inference_steps=2)  # compiles, and chooses kernels
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ends: list[float] = []

    def note_end(*call: Any) -> dict[str, Any]:
        _wait(options.device)
        ends.append(time.perf_counter())
        return {}

    begin = time.perf_counter()
    pipeline(**arguments, num_inference_steps=options.steps, callback_on_step_end=note_end)
    _wait(options.device)
    rest = time.perf_counter() - ends[-1]
    step_seconds = (ends[-1] - begin) / options.steps
    peak = torch.cuda.max_memory_allocated() if options.device == "cuda" else 0
    return _row(case, step_seconds, peak, step_seconds * steps_of(preset) + rest)


def call_arguments(pipeline: Any, preset: str, size: str, references: int) -> dict[str, Any]:
    height, width, frames = SIZES[size]
    device, dtype = pipeline.transformer.device, pipeline.transformer.dtype
    embeds = torch.randn(2, 1, TEXT_TOKENS, TEXT_DIM, device=device, dtype=dtype)
    arguments = {
        "height": height,
        "width": width,
        "num_frames": frames,
        "prompt_embeds": embeds[0],
        "negative_prompt_embeds": embeds[1],
        "reference_latents": torch.randn(1, 16, references, height // 8, width // 8, device=device),
        "output_type": "pt",
    }
    if preset == ONE_PASS:
        return {**arguments, "guidance_scale": 1.0, "image_guidance_scale": 1.0}
    return {**arguments, "guidance_gate": PRESETS[preset].guidance_gate}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure_all(options: Options) -> list[Row]:
    """All rows; a model is made once with kernels and compilation, and once without."""
    from refalign.levers import apply_levers
    from refalign.video_options import SpeedOptions

    rows = []
    all_cases = cases(REAL if options.device == "cuda" else TINY)
    groups = product(dict.fromkeys(case[1] for case in all_cases), (False, True))
    for model, is_compiled in tqdm(list(groups), desc="models"):
        pipeline = make_pipeline(model, options.device)
        if is_compiled and options.device == "cuda":
            apply_levers(pipeline, SpeedOptions(attention="_native_cudnn", compile=True))
        for case in all_cases:
            preset = PRESETS.get(case[0])
            if case[1] == model and is_compiled == bool(preset and preset.compile):
                rows.append(measured(pipeline, case, options))
    return sorted(rows, key=lambda row: all_cases.index((row.preset, row.model, row.size, row.references)))


# -- The table --------------------------------------------------------------------------------------------------------


def content_of(rows: list[Row], options: Options) -> dict[str, Any]:
    """What is written as JSON."""
    told = "Reckoned, not measured: no GPU was at hand. `python -m benchmarks.speed --device cuda` measures it."
    versions = {name: version(name) for name in ("refalign", "torch", "diffusers")}
    return {
        "kind": "reckoned" if options.reckon else "measured",
        "told": told if options.reckon else machine_line(options.device),
        **({} if options.reckon else {"machine": platform.platform(), "versions": versions, "steps": options.steps}),
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def as_markdown(content: dict[str, Any], is_short: bool) -> str:
    """The table, with what it is above it."""
    rows = [Row(**row) for row in content["rows"]]
    if is_short:
        rows = [row for row in rows if (row.size, row.references) == SHORT]
    header = ["`--fast`", "model", "size", "references", "s a step", "peak, GiB", "minutes a clip"]
    lines = []
    for row in rows:
        shown = [f"{row.step_seconds:.2f}", f"{row.peak_gib:.0f}", f"{row.clip_minutes:.1f}"]
        lines.append([row.preset, row.model, row.size, str(row.references), *shown])
    return f"{content['told']}\n\n{markdown_table(header, lines)}"


def main(options: Options) -> None:
    if options.reckon:
        rows = [reckoned(*case) for case in cases(REAL)]
    else:
        rows = measure_all(options)
    content = content_of(rows, options)
    options.output.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    print(as_markdown(content, is_short=False))
    for page in options.page:
        write_between_marks(page, "speed", as_markdown(content, is_short=page.name == "README.md"))


if __name__ == "__main__":
    main(tyro.cli(Options))
