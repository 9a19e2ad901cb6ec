"""The commands of `refalign`: reference-to-video from the command line.

Nothing heavy is imported before the command line is understood, so that `--help` answers at once.
"""

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from refalign import calibration, demo, generate, prompt, refine, refine_init
from refalign.calibration import Calibrate
from refalign.command_line import Command, Program
from refalign.demo import Demo
from refalign.generate import Generate
from refalign.prompt import Prompt
from refalign.refine import Refine
from refalign.refine_init import RefineInit


@dataclass(frozen=True)
class App:
    """Open the app: drop in pictures, write a prompt and watch the video in a browser. It needs the extra `app`."""

    model: str | None = None
    """The pipeline that makes the videos, as a folder or a Hub id. The default is what the variable REFALIGN_MODEL
    names, or else the tiny one of drawn figures in this package."""
    port: int | None = None
    """The port of this machine to serve it at. The default is the first free one from 7860 on."""


@dataclass(frozen=True)
class Convert:
    """Turn a native RefAlign checkpoint, or one of Bernini-R, as its authors released it, into a pipeline folder for
    diffusers."""

    checkpoint: str
    """The native checkpoint: a safetensors file, a folder of shards, or a Hub id. Of the family bernini also a
    pipeline in diffusers' format, such as ByteDance/Bernini-R-1.3B-Diffusers."""
    base: str
    """The Wan 2.1 pipeline in diffusers' format, as a folder or a Hub id, whose VAE, text encoder and tokenizer are
    taken."""
    output: Path
    """The pipeline folder to write. It must not exist."""
    max_shard_size: str = "5GB"
    """The largest size of a file of the transformer, in bytes or with a unit."""
    family: Literal["refalign", "bernini"] = "refalign"
    """How the model reads references: as RefAlign does, or as Bernini-R."""
    revision: str | None = None
    """The revision of the checkpoint, if it is a Hub id."""
    keep_scheduler: bool = False
    """Take the base's scheduler too, instead of the paper's (Euler with shift 5; UniPC with shift 5 for Bernini-R)."""
    card: str = "auto"
    """The model card to write: template, refalign-1.3b, refalign-14b or bernini-r-1.3b. auto takes a card of the
    authors for their releases, which it knows by their Hub ids, and for others template, or bernini-r-1.3b."""


@dataclass(frozen=True)
class Export:
    """Write a pipeline for others: as one native file (ComfyUI), as a Hub repo folder, or its code as one script."""

    model: str | None = None
    """The pipeline to write, as a folder or a Hub id."""
    output: Path | None = None
    """The file or folder to write. A name that ends in .safetensors makes one native file, any other name a new
    folder, a Hub repo."""
    community: Path | None = None
    """The file to write the pipeline's code to, as one script for diffusers' custom_pipeline."""


@dataclass(frozen=True)
class Push:
    """Push a pipeline folder to the Hub, so that it loads with and without this package."""

    folder: Positional[Path]
    """The pipeline folder to push."""
    repo: str
    """The repo on the Hub, as ORG/NAME. It is made if it does not exist."""
    private: bool = False
    """Make the repo private, if it is new."""
    dry_run: bool = False
    """Only say which files would be pushed, without any connection."""


@dataclass(frozen=True)
class PushSpace:
    """Push the app and this package as a Space of Hugging Face, where others try a model in their browsers."""

    repo: str
    """The Space on the Hub, as ORG/NAME. It is made if it does not exist."""
    model: str | None = None
    """The Hub id of the model to show. By default an existing Space keeps its model, and a new one shows the tiny
    model that comes with this package."""
    private: bool = False
    """Make the Space private, if it is new."""
    dry_run: bool = False
    """Only say which files would be pushed, without any connection."""


@dataclass(frozen=True)
class LoraInspect:
    """Show a LoRA's key style, rank, scale, layers and strength, and which base it fits."""

    file: Positional[Path]
    """The Wan LoRA, a safetensors file."""


@dataclass(frozen=True)
class LoraConvert:
    """Write a LoRA in another key style, with its scale (alpha / rank) multiplied in."""

    file: Positional[Path]
    """The Wan LoRA, a safetensors file of any style: ComfyUI's, diffusers', peft's or kohya's (musubi-tuner)."""
    output: Path
    """The safetensors file to write. It must not exist."""
    to: Literal["native", "diffusers", "kohya"]
    """The key style to write. native is for ComfyUI and diffusers, kohya for musubi-tuner."""


def run_app(command: App) -> int:
    if find_spec("gradio") is None:
        raise ImportError('The app needs gradio: `pip install "refalign[app]"`, in a clone `pip install ".[app]"`.')
    from refalign.space.app import serve  # pyright: ignore[reportMissingImports] (space/, by pyproject.toml)

    serve(command.model, command.port)
    return 0


def run_convert(command: Convert) -> int:
    from refalign import hub
    from refalign.convert import convert
    from refalign.families import FAMILIES

    card = command.card
    if card == "auto":
        card = hub.find_release(command.checkpoint) or FAMILIES[command.family].card
    convert(
        command.checkpoint,
        command.base,
        command.output,
        command.max_shard_size,
        command.keep_scheduler,
        card,
        family=command.family,
        revision=command.revision,
    )
    print(f"Wrote {command.output}: RefAlignWanPipeline.from_pretrained({str(command.output)!r})")
    return 0


def export(command: Export) -> int:
    from refalign import hub
    from refalign.community_script import write_community_script
    from refalign.convert import export_native

    if (command.model is None) != (command.output is None) or (command.model is None and command.community is None):
        raise ValueError("Pass --model and --output (FILE.safetensors or a new folder), or --community FILE.")
    if command.community is not None:
        print(f"Wrote {write_community_script(command.community)}")
    if command.model is not None and command.output is not None:
        native = command.output.suffix == ".safetensors"
        write = export_native if native else hub.export_repo
        print(f"Wrote {write(command.model, command.output)}")
    return 0


def push(command: Push) -> int:
    from refalign import hub

    print(hub.push(command.folder, command.repo, command.private, command.dry_run))
    return 0


def run_push_space(command: PushSpace) -> int:
    from refalign.push_space import push_space

    pushed = push_space(command.repo, command.model, command.private, command.dry_run)
    print(pushed)
    if not command.dry_run:
        print(f"Choose its hardware: {pushed.url}/settings")
    return 0


def inspect_lora(command: LoraInspect) -> int:
    from refalign.lora_inspect import describe

    print(describe(command.file))
    return 0


def convert_lora(command: LoraConvert) -> int:
    from refalign import lora
    from refalign.lora_defaults import as_metadata, read_file_defaults

    found = lora.read_lora(command.file)
    metadata = as_metadata(read_file_defaults(command.file))
    print(f"Wrote {lora.write_lora(found.layers, command.output, command.to, found.differences, metadata)}")
    if found.passed_over:
        print(lora.passed_over(found).replace("applied", "written"))
    return 0


LORA = Program(
    "refalign lora",
    "Look into LoRA files, and change their key style.",
    {
        "inspect": Command(LoraInspect, inspect_lora, "my-lora.safetensors"),
        "convert": Command(LoraConvert, convert_lora, "my-lora.safetensors --output comfy.safetensors --to native"),
    },
)
REFINE = Program(
    "refalign refine",
    "Make a region of an image or a video that went wrong anew from a reference (Refine-by-Align).",
    {
        "run": Command(
            Refine, refine.run, "--image mug.png --mask logo.png --reference logo-right.png --output mug-refined.png"
        ),
        "init": Command(
            RefineInit,
            refine_init.run,
            "--inpainting stable-diffusion-v1-5/stable-diffusion-inpainting "
            "--image-encoder facebook/dinov2-with-registers-large --output refine-base",
        ),
    },
    default="run",
)
PROGRAM = Program(
    "refalign",
    "RefAlign for diffusers: videos of the subjects of reference images.",
    {
        "demo": Command(Demo, demo.run, '--subjects dotted-ball --prompt "It slides to the right at night."'),
        "generate": Command(
            Generate,
            generate.run,
            '--model refalign-1.3b --prompt "A woman walks her dog." --reference woman.png dog.png --output walk.mp4',
        ),
        "prompt": Command(Prompt, prompt.run, '"she walks her dog on a beach" --reference woman.png dog.png'),
        "app": Command(App, run_app, "--model refalign-1.3b --port 7860"),
        "calibrate": Command(Calibrate, calibration.run, "--model refalign-1.3b"),
        "convert": Command(
            Convert,
            run_convert,
            "--checkpoint gudaochangsheng/RefAlign-1.3B --base Wan-AI/Wan2.1-T2V-1.3B-Diffusers "
            "--output refalign-1.3b",
        ),
        "export": Command(Export, export, "--model refalign-1.3b --output refalign-1.3b.safetensors"),
        "push": Command(Push, push, "refalign-1.3b --repo ORG/NAME --dry-run"),
        "push-space": Command(PushSpace, run_push_space, "--repo ORG/NAME --dry-run"),
        "lora": LORA,
        "refine": REFINE,
    },
)


def main(words: list[str] | None = None) -> int:
    """Runs a command, by default that of the command line, and returns its exit code."""
    return PROGRAM.main(words)


if __name__ == "__main__":
    sys.exit(main())
