"""`refalign demo | generate | convert | export | push | lora`: reference-to-video from the command line.

Nothing heavy is imported before the command line is understood, so that `--help` answers at once.
"""

import logging
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, subcommand

from refalign import demo, generate
from refalign.demo import Demo
from refalign.generate import Generate


@dataclass(frozen=True)
class Convert:
    """Turn a native RefAlign checkpoint, as its authors released it, into a pipeline folder for diffusers."""

    checkpoint: str
    """A safetensors file, a folder of shards, or a Hub id."""
    base: str
    """The Wan 2.1 pipeline in diffusers' format (folder or Hub id) whose VAE, text encoder and tokenizer go along."""
    output: Path
    """A new folder."""
    max_shard_size: str = "5GB"
    """Of the transformer's files."""
    keep_scheduler: bool = False
    """Take the base's scheduler too, instead of the paper's (Euler, shift 5)."""
    card: str = "auto"
    """The model card: template, refalign-1.3b or refalign-14b; auto knows the authors' releases by their Hub id."""


@dataclass(frozen=True)
class Export:
    """Write a pipeline for others: one native file (ComfyUI), a Hub repo folder, or the community script."""

    model: str | None = None
    """A pipeline folder, or a Hub id."""
    output: Path | None = None
    """FILE.safetensors for one native file, else a new folder: a Hub repo."""
    community: Path | None = None
    """Write the pipeline's code as one script for diffusers' custom_pipeline."""


@dataclass(frozen=True)
class Push:
    """Push a pipeline folder to the Hub, so that it loads with and without this package."""

    folder: Positional[Path]
    """The pipeline folder."""
    repo: str
    """ORG/NAME; made if it does not exist."""
    private: bool = False
    """Make a new repo private."""
    dry_run: bool = False
    """Only say which files would go. Connects to nothing."""


@dataclass(frozen=True)
class LoraInspect:
    """Show a LoRA's key style, rank, scale, layers and strength, and which base it fits."""

    file: Positional[Path]
    """A Wan LoRA in safetensors."""


@dataclass(frozen=True)
class LoraConvert:
    """Write a LoRA in another key style; its scale (alpha / rank) is multiplied in."""

    file: Positional[Path]
    """A Wan LoRA in safetensors, of any style: ComfyUI's, diffusers', peft's or kohya's (musubi-tuner)."""
    output: Path
    """A new FILE.safetensors."""
    to: Literal["native", "diffusers", "kohya"]
    """native is for ComfyUI and diffusers, kohya for musubi-tuner."""


LoraCommand = Annotated[LoraInspect, subcommand("inspect")] | Annotated[LoraConvert, subcommand("convert")]
Command = (
    Annotated[Demo, subcommand("demo")]
    | Annotated[Generate, subcommand("generate")]
    | Annotated[Convert, subcommand("convert")]
    | Annotated[Export, subcommand("export")]
    | Annotated[Push, subcommand("push")]
    | Annotated[LoraCommand, subcommand("lora", description="Look into LoRA files, and change their key style.")]
)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code. Errors of users are told in one line, without a traceback."""
    command = tyro.cli(Command, args=arguments, prog="refalign", description="RefAlign for diffusers.")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of an exception, so that nothing half is left
    runners = {
        Demo: demo.run,
        Generate: generate.run,
        Convert: run_convert,
        Export: export,
        Push: push,
        LoraInspect: inspect_lora,
        LoraConvert: convert_lora,
    }
    try:
        return runners[type(command)](command)
    except (ValueError, OSError, ImportError) as error:
        print(f"refalign: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("refalign: interrupted; no unfinished file is left.", file=sys.stderr)
        return 130


def run_convert(command: Convert) -> int:
    from refalign import hub
    from refalign.convert import convert

    card = hub.RELEASES.get(command.checkpoint, "template") if command.card == "auto" else command.card
    convert(command.checkpoint, command.base, command.output, command.max_shard_size, command.keep_scheduler, card)
    print(f"Wrote {command.output}: RefAlignWanPipeline.from_pretrained({str(command.output)!r})")
    return 0


def export(command: Export) -> int:
    from refalign import hub
    from refalign.convert import export_native

    if (command.model is None) != (command.output is None) or (command.model is None and command.community is None):
        raise ValueError("Pass --model and --output (FILE.safetensors or a new folder), or --community FILE.")
    if command.community is not None:
        print(f"Wrote {hub.write_community_script(command.community)}")
    if command.output is not None:
        native = command.output.suffix == ".safetensors"
        write = export_native if native else hub.export_repo
        print(f"Wrote {write(command.model, command.output)}")
    return 0


def push(command: Push) -> int:
    from refalign import hub

    names = hub.push(command.folder, command.repo, command.private, command.dry_run)
    print("\n".join(names))
    print(f"{'Would push' if command.dry_run else 'Pushed'} {len(names)} files to {command.repo}.")
    return 0


def inspect_lora(command: LoraInspect) -> int:
    from refalign import lora

    print(lora.describe(command.file))
    return 0


def convert_lora(command: LoraConvert) -> int:
    from refalign import lora

    layers = lora.read_lora(command.file).layers
    print(f"Wrote {lora.write_lora(layers, command.output, command.to)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
