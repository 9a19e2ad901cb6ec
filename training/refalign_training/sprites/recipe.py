"""
`refalign-train sprites`: the small world's models from nothing, stage by stage.

    refalign-train sprites --output sprites
    refalign-train sprites --output sprites --ablation
    refalign-train sprites --output sprites --refine

Killed, the same command goes on: a stage that is done leaves a folder, and each long one has checkpoints of its own.
Nothing heavy is imported before it is needed, so that `--help` answers at once.
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Literal

from refalign.files import new_folder


logger = logging.getLogger(__name__)

Stage = Literal[
    "vae",
    "text",
    "teacher",
    "base",
    "data",
    "cache",
    "run",
    "model",
    "refine-vae",
    "refine-encoder",
    "refine-base",
    "refine-data",
    "refine-cache",
    "refine-run",
    "refine-model",
]

TRANSFORMER = {
    "num_attention_heads": 6,
    "attention_head_dim": 24,
    "ffn_dim": 432,
    "num_layers": 6,
    "text_dim": 48,
    "freq_dim": 64,
}
PIXELS = ["--height", "64", "--width", "64", "--num-frames", "17", "--stride", "1.5625"]  # in real time
# References are drawn from other clips as often as there is one: each shows another pose
VIEWS = ["--cross-probability", "0.75"]
HELD_OUT_CLIPS = 128
# What a call takes by default; the scales are measured (docs/sprites.md)
CALL_DEFAULTS = {
    "negative_prompt": "",
    "height": 64,
    "width": 64,
    "num_frames": 17,
    "num_inference_steps": 16,
    "guidance_scale": 3.0,
    "image_guidance_scale": 3.0,
    "max_sequence_length": 64,
}
SHIFT = 7.0  # of the scheduler, as in training
# Held-out subjects that `refalign demo` can be asked for, and how their pictures are turned, in degrees
CAST = {
    "crowned-plus": (("plus", "pink", "red", "half", "two eyes", "crown"), -14),
    "crowned-star": (("star", "cyan", "purple", "spots", "two eyes", "crown"), 12),
    "dotted-ball": (("circle", "blue", "yellow", "spots", "glasses", "antennae"), -10),
    "green-square": (("square", "yellow", "green", "rim", "two eyes", "nothing"), 18),
    "hatted-triangle": (("triangle", "cyan", "yellow", "rim", "one eye", "hat"), 15),
    "red-square": (("square", "purple", "red", "rim", "glasses", "hat"), -12),
    "striped-ball": (("circle", "yellow", "purple", "stripes", "one eye", "nothing"), -16),
    "yellow-heart": (("heart", "yellow", "orange", "half", "two eyes", "nothing"), 14),
}


@dataclass(frozen=True)
class SpritesCommand:
    """Make the tiny model of drawn figures anew, from nothing. If it was killed, the same command goes on."""

    output: Path = Path("sprites")
    """The folder for everything that is made. The pipeline is the folder `model` in it."""
    clips: int = 6_000
    """The number of clips of the dataset."""
    processes: int = 2
    """How many processes train and encode together."""
    only: Stage | None = None
    """Make only this stage, in this process."""
    until: Stage | None = None
    """The last stage to make. By default all are made."""
    steps: int | None = None
    """The number of training steps of the transformer. By default it is the recipe's."""
    samples: int = 96
    """How many clips of one subject, and as many of two, the finished model is measured on."""
    refine: bool = False
    """Make the tiny model that refines images instead, by the stages whose names begin with refine."""
    ablation: bool = False
    """Train the arms of the ablation instead, one after the other, and write `ablation.json` and its pictures."""


Stages = dict[Stage, Callable[[SpritesCommand], None]]


def make(command: SpritesCommand, stages: Stages, until: Stage | None) -> None:
    """Makes what is missing of those stages, up to one of them or all."""
    for stage, make_stage in stages.items():
        if not _is_done(command, stage):
            logger.info("Stage %s", stage)
            if stage in TOGETHER:
                arguments = ["--output", str(command.output), "--only", stage, "--clips", str(command.clips)]
                launch(["sprites", *arguments], command.processes)
            else:
                make_stage(command)
        if stage == until:
            return


def _is_done(command: SpritesCommand, stage: Stage) -> bool:
    """Whether a stage has left its folder. Data, cache and run find out for themselves what is missing."""
    return stage in PRODUCTS and (command.output / PRODUCTS[stage]).is_dir()


MEASURED = "measured.json"
SAMPLE = "assets/demo.mp4"
TOGETHER = ("vae", "text", "teacher", "refine-vae", "refine-encoder")  # stages that processes share
PRODUCTS = {
    "vae": "vae",
    "text": "text_encoder",
    "teacher": "teacher",
    "base": "base",
    "model": "model",
    "refine-vae": "refine-vae",
    "refine-encoder": "refine-encoder",
    "refine-base": "refine-base",
    "refine-model": "refine",
}


def launch(arguments: list[str], processes: int) -> None:
    """
    Runs `refalign-train` in so many processes that work together, one thread each.

    Raises:
        ValueError: if it fails.
    """
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    command += ["refalign_training.cli", *arguments]
    code = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, close_fds=False).returncode
    if code:
        raise ValueError(f"refalign-train {arguments[0]} ended with exit code {code}. The same command goes on.")


# -- Stages -----------------------------------------------------------------------------------------------------------


def is_main() -> bool:
    """Whether this process is the first of those that work together."""
    return int(os.environ.get("RANK", 0)) == 0


def _make_vae(command: SpritesCommand) -> None:
    from refalign_training.sprites.vae import draw_many, train_vae, vae_psnr

    vae = train_vae(command.output / "vae-run")
    if is_main():
        videos, _ = draw_many(64, held_out=True, purpose="held-out VAE")
        measured = {"psnr": vae_psnr(vae, videos), "clips": len(videos)}
        logger.info("VAE: %.1f dB on %d clips of held-out subjects", measured["psnr"], measured["clips"])
        with new_folder(command.output / PRODUCTS["vae"]) as folder:
            vae.half().save_pretrained(folder)
            write_measured(folder, measured)


def _make_text(command: SpritesCommand) -> None:
    from refalign_training.sprites.text import train_text_encoder

    tokenizer, encoder, right = train_text_encoder(command.output / "text-run")
    if is_main():
        logger.info("Text encoder: %.1f %% of the captions are told whole by each of their tokens", 100 * right)
        tokenizer.save_pretrained(command.output / "tokenizer")
        with new_folder(command.output / PRODUCTS["text"]) as folder:
            encoder.save_pretrained(folder)
            write_measured(folder, {"captions": right})


def _make_teacher(command: SpritesCommand) -> None:
    from refalign_training.sprites.teacher import train_teacher

    teacher, top_1 = train_teacher(command.output / "teacher-run")
    if is_main():
        logger.info("Teacher: of 300 held-out subjects, %.1f %% are found by another picture", 100 * top_1)
        with new_folder(command.output / PRODUCTS["teacher"]) as folder:
            teacher.save_pretrained(folder)
            write_measured(folder, {"top_1": top_1})


def write_measured(folder: Path, figures: dict[str, float]) -> None:
    """Writes a part's figures into its folder."""
    (folder / MEASURED).write_text(json.dumps(figures, indent=2) + "\n", "utf-8")


def _make_base(command: SpritesCommand) -> None:
    """A pipeline of the parts with an untrained transformer."""
    import torch
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler
    from transformers import AutoTokenizer, UMT5EncoderModel

    from refalign import RefAlignWanPipeline, RefAlignWanTransformer3DModel

    torch.manual_seed(0)
    pipeline = RefAlignWanPipeline(
        AutoTokenizer.from_pretrained(command.output / "tokenizer"),
        UMT5EncoderModel.from_pretrained(command.output / PRODUCTS["text"], use_safetensors=True),
        AutoencoderKLWan.from_pretrained(
            command.output / PRODUCTS["vae"], torch_dtype=torch.float16, use_safetensors=True
        ),
        FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        RefAlignWanTransformer3DModel(**TRANSFORMER),
        call_defaults=CALL_DEFAULTS,
    )
    with new_folder(command.output / PRODUCTS["base"]) as folder:
        pipeline.save_pretrained(folder)


def _make_data(command: SpritesCommand) -> None:
    from refalign_training.sprites.dataset import write_dataset

    write_dataset(command.output / "data", command.clips)
    write_dataset(command.output / "data-held-out", HELD_OUT_CLIPS, seed=1, held_out=True)


def _make_cache(command: SpritesCommand) -> None:
    for name in ("", "-held-out"):
        data = command.output / f"data{name}"
        arguments = ["--data", "opens2v", "--videos", data / "Videos"]
        arguments += ["--annotations", data / "Jsons/mask_and_bbox/total_part1.json"]
        arguments += ["--cross-pairs", data / "Jsons/cross_video_pairs/pairs.json"]
        arguments += ["--model", command.output / PRODUCTS["base"], "--teacher", command.output / PRODUCTS["teacher"]]
        arguments += ["--output", command.output / f"cache{name}", "--workers", "0", "--limit", command.clips]
        # Half the time; half a percent off, a tenth of the noise that the decoder is trained with
        arguments += ["--dtype", "float32", "--vae-dtype", "bfloat16"]
        launch(["cache", *map(str, arguments), *PIXELS, *VIEWS], command.processes)


def _train(command: SpritesCommand) -> None:
    train(command, command.output / "run", ["--steps", str(command.steps)] if command.steps else [])


def train(command: SpritesCommand, output: Path, options: list[str], prefix: str = "") -> None:
    """Trains a network by its recipe and what differs from it, or goes on with it. `prefix` is `refine-` for the model
    that refines."""
    name = "refine-sprites" if prefix else "sprites"
    with as_file(files("refalign_training.configs") / f"{name}.yaml") as config:
        arguments = ["--config", config, "--output", output, "--resume", "auto"]
        arguments += ["--model.base", command.output / f"{prefix}base"]
        arguments += ["--data.cache", command.output / f"{prefix}cache"]
        arguments += ["--validation.cache", command.output / f"{prefix}cache-held-out"]
        launch(["run", *map(str, arguments), *options], command.processes)


def _make_model(command: SpritesCommand) -> None:
    """The Hub repo that `refalign` carries, with the average of the weights."""
    from refalign_training.sprites.subject import Subject, draw_reference

    folder = command.output / "subjects"
    folder.mkdir(exist_ok=True)
    for name, (who, tilt) in CAST.items():
        draw_reference(Subject(*who), tilt).save(folder / f"{name}.png")
    make_model(command, command.output / "run", command.output / PRODUCTS["model"])


def make_model(command: SpritesCommand, run: Path, output: Path) -> None:
    """
    A run's weights as a Hub repo, measured.

    Args:
        run (`Path`): the run's folder; its latest checkpoint is taken.
        output (`Path`): a new folder.
    """
    from refalign import RefAlignWanPipeline
    from refalign.hub import complete_repo, fill_card
    from refalign_training.run.checkpoint import find_checkpoint, read_state, read_weights

    checkpoint = find_checkpoint(run)
    state = read_state(checkpoint)
    pipeline = RefAlignWanPipeline.from_pretrained(command.output / PRODUCTS["base"])
    pipeline.transformer.load_state_dict(read_weights(checkpoint, average=True))
    pipeline.register_to_config(call_defaults=CALL_DEFAULTS)
    pipeline.vae.half()
    with new_folder(output) as folder:
        pipeline.save_pretrained(folder)
        figures = measure(folder, output.with_name(f"{output.name}.json"), command.samples)
        parts = {name: read_measured(command.output / PRODUCTS[name]) for name in ("vae", "text", "teacher")}
        seen = state["step"] * state["options"]["batch.size"]
        weights = sum(parameter.numel() for parameter in pipeline.transformer.parameters())
        rows = [(name, *_shown(name, figures)) for name in figures["intervals"]]
        numbers = {"steps": state["step"], "seen": seen, "weights": weights}
        widget = [write_sample(folder)]
        card = fill_card("sprites", None, None, widget=widget, rows=rows, figures=figures, parts=parts, **numbers)
        (folder / "README.md").write_text(card, "utf-8")
        complete_repo(folder)


def write_sample(folder: Path) -> dict[str, Any]:
    """
    Writes the video of `refalign demo` into a model's folder, with its references at the left.

    Returns:
        `dict`: what the card's front matter says of it.
    """
    from refalign.demo import Demo, draw_moving, make_frames, pictures_of
    from refalign.video import write_video

    demo = Demo()
    references = pictures_of(demo.subjects)
    frames = draw_moving(references, make_frames(demo, references, folder))
    write_video(frames, folder / SAMPLE, settings={"prompt": demo.prompt, "seed": demo.seed})
    return {"text": demo.prompt, "output": {"url": SAMPLE}}


def measure(model: Path, output: Path, samples: int, options: Sequence[str] = ()) -> dict[str, Any]:
    """The figures of `refalign-eval sprites` for a pipeline folder, which the file `output` then holds."""
    command = [sys.executable, "-m", "refalign_evaluation.cli", "sprites", "--model", str(model)]
    command += ["--json", str(output), "--samples", str(samples), *options]
    code = subprocess.run(command).returncode
    if code:
        raise ValueError(f"refalign-eval ended with exit code {code}.")
    return json.loads(output.read_text("utf-8"))


def _shown(name: str, figures: dict[str, Any]) -> tuple[str, str]:
    """A figure and its interval as a card shows them."""
    value, (low, high) = figures[name], figures["intervals"][name]
    if name == "psnr":
        return f"{value:.1f} dB", f"{low:.1f} to {high:.1f}"
    return f"{100 * value:.0f} %", f"{100 * low:.0f} to {100 * high:.0f}"


def read_measured(folder: Path) -> dict[str, float]:
    """What [`write_measured`] wrote into a part's folder."""
    return json.loads((folder / MEASURED).read_text("utf-8"))


STAGES: Stages = {
    "vae": _make_vae,
    "text": _make_text,
    "teacher": _make_teacher,
    "base": _make_base,
    "data": _make_data,
    "cache": _make_cache,
    "run": _train,
    "model": _make_model,
}
