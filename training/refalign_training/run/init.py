"""`refalign-train init`: looks at clips and a GPU, and writes the file that all other commands read.

    refalign-train init CLIPS --gpu-memory 24
    refalign-train check --config refalign.yaml --preview preview

Nothing heavy is imported before it is needed, so that `--help` answers at once.
"""

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from string import Template
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from refalign.files import new_file
from refalign.privacy import shown
from refalign_training.data.fields import Unusable
from refalign_training.data.sample import Fault, Sample
from refalign_training.data.source import Source, read_source
from refalign_training.run.config import RunCommand
from refalign_training.run.config_files import read_config


if TYPE_CHECKING:
    from refalign_training.run.estimate import Estimate


LOOKED_AT = 100  # clips are opened, spread over the folder
FPS = 16  # the model's frames per second
GB_PER_GIB = 2**30 / 1e9
FRAMES = (81, 65, 49, 33, 17)
SHARE = 0.95  # of a GPU's memory that a run may take by arithmetic
SIZES = ((480, 832), (320, 544))
TEACHERS = {"base": "facebook/dinov3-vitb16-pretrain-lvd1689m", "large": "facebook/dinov3-vitl16-pretrain-lvd1689m"}
# So that nothing is asked of the Hub: what their transformer/config.json say
KNOWN = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
}


@dataclass(frozen=True)
class InitCommand:
    """Look at your clips and the GPU, and write one commented file that check, cache, run and export read."""

    clips: Positional[Path]
    """The folder of the clips: clip.mp4 with clip.txt, clip.ref0.png, clip.ref1.png, ... beside each."""
    output: Path = Path("refalign.yaml")
    """The YAML file to write. It must not exist."""
    gpu_memory: float | None = None
    """The memory of the GPU in GB. The default is that of this machine's GPU, or 24 if it has none."""
    model: str = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    """The Wan 2.1 or RefAlign pipeline to train, as a folder or a Hub id."""


@dataclass(frozen=True)
class Clips:
    """What was found in a folder."""

    samples: Sequence[Sample]
    lost: int
    """Samples that cannot be used."""
    sizes: Sequence[tuple[int, int]]
    """Width and height of those that were opened."""
    seconds: Sequence[float]
    """Their durations."""

    @property
    def references(self) -> int:
        """The most that a sample has."""
        return max(len(sample.references) for sample in self.samples)

    @property
    def are_upright(self) -> bool:
        """Whether most are higher than wide."""
        return 2 * sum(height > width for width, height in self.sizes) > len(self.sizes)

    @property
    def frames(self) -> int:
        """The longest video that three quarters of the clips can fill in real time."""
        times = sorted(self.seconds)
        enough = times[len(times) // 4]
        return next((count for count in FRAMES if (count - 1) / FPS <= enough), FRAMES[-1])


def run(command: InitCommand) -> int:
    """Writes the file and returns the exit code. Raises ValueError if there is no usable clip, the output exists, or
    an option is wrong."""
    memory = _memory_of_gpu() if command.gpu_memory is None else command.gpu_memory
    if not 0 < memory < math.inf:
        raise ValueError(f"--gpu-memory is {memory:g}: pass the GB of your GPU, such as 24.")
    clips = _look(command.clips)
    with new_file(command.output) as file:
        settings = _settings(command, clips)
        for height, width, frames in _shapes(clips):
            settings |= {"height": height, "width": width, "num_frames": frames}
            file.write_text(_TEMPLATE.substitute(settings, memory=""), "utf-8")
            found = _estimate(read_config(file), command.model, clips.references)
            if found.memory.total * GB_PER_GIB <= memory * SHARE:
                break
        needed = found.memory.total * GB_PER_GIB
        fits = f"it fits into {memory:g} GB" if needed <= memory * SHARE else f"MORE than your {memory:g} GB"
        told = f"{needed:.0f} GB by arithmetic, not measured: {fits}"
        file.write_text(_TEMPLATE.substitute(settings, memory=told), "utf-8")
    print(f"Wrote {command.output}: {settings['found']}")
    print(f"{settings['width']}x{settings['height']}, {settings['num_frames']} frames; memory: {told}.")
    print(f"Next: refalign-train check --config {shlex.quote(str(command.output))} --preview preview")
    return 0


def _look(folder: Path) -> Clips:
    items = list(read_source(Source(data="folder", videos=folder)))
    samples = [item for item in items if isinstance(item, Sample)]
    faults = [item for item in items if isinstance(item, Fault) and item.lost == "sample"]
    opened = list(_open(samples[:: max(1, len(samples) // LOOKED_AT)]))
    if not opened:
        first = f" The first fault: {faults[0].detail}." if faults else ""
        raise ValueError(
            f"{folder} has no usable clip.{first} See: refalign-train check --data folder --videos {folder}"
        )
    sizes, seconds = zip(*opened, strict=True)
    return Clips(samples, len(faults), sizes, seconds)


def _open(samples: Sequence[Sample]) -> Iterator[tuple[tuple[int, int], float]]:
    """Size and duration of those clips that can be opened."""
    from refalign_training.data.video import open_video

    for sample in samples:
        try:
            with open_video(sample.clip.path) as video:
                _, image = next(iter(video.read([0])))
                yield image.size, len(video) / video.fps
        except Unusable:
            continue


def _memory_of_gpu() -> float:
    import torch

    if not torch.cuda.is_available():
        print("There is no GPU here: planning for one of 24 GB. --gpu-memory says otherwise.")
        return 24.0
    return torch.cuda.get_device_properties(0).total_memory / 1e9


def _shapes(clips: Clips) -> Iterator[tuple[int, int, int]]:
    """Height, width and frames, from what the clips allow to what needs least memory."""
    for short, long in SIZES:
        for frames in FRAMES:
            if frames <= clips.frames:
                yield (long, short, frames) if clips.are_upright else (short, long, frames)


def _config(model: str) -> Mapping[str, Any]:
    from refalign_training.run.config import ModelOptions
    from refalign_training.run.networks import transformer_config

    if model in KNOWN:
        return {**KNOWN[model], "attention_head_dim": 128}
    return transformer_config(ModelOptions(base=model))


def _estimate(command: RunCommand, model: str, references: int) -> "Estimate":
    from refalign_training.run.estimate import estimate

    recipe = command.data.recipe
    bucket = (recipe.num_frames, recipe.height, recipe.width, references)
    return estimate(command, _config(model), bucket)


# -- The file ---------------------------------------------------------------------------------------------------------


def _settings(command: InitCommand, clips: Clips) -> dict[str, Any]:
    """What the template has holes for, but size and memory."""
    count, name = len(clips.samples), command.clips.resolve().name
    config = _config(command.model)
    batch = 8 if count >= 80 else 4 if count >= 8 else 2
    seen = min(max(100 * count, 2_000), 16_000)
    steps = math.ceil(seen / batch)
    found = f"clips: {count}, lost: {clips.lost}, references: {clips.references} at most, {_durations(clips.seconds)}"
    prompts = list(map(_prompt, clips.samples[:2]))
    return {
        "file": shlex.quote(shown(str(command.output))),
        "found": shown(found),
        "clips": _yaml(str(command.clips)),
        "run": _yaml(f"runs/{name}"),
        "run_words": shlex.quote(shown(f"runs/{name}")),
        "cache": _yaml(f"cache/{name}"),
        "model": _yaml(command.model),
        "teacher": TEACHERS["large" if config["num_attention_heads"] >= 40 else "base"],
        "rank": 64 if count >= 80 else 32,
        "batch": batch,
        "steps": steps,
        "epochs": f"{steps * batch / count:.3g}",
        "count": count,
        "warmup": min(100, steps // 10),
        "every": max(steps // 8, 1),
        "prompts": "\n".join(f"    - {_yaml(prompt)}" for prompt in prompts),
    }


def _prompt(sample: Sample) -> dict[str, Any]:
    references = [str(reference.view.path) for reference in sample.references if reference.view is not None]
    return {"prompt": sample.prompts[0].strip(), "references": references}


def _durations(seconds: Sequence[float]) -> str:
    if len(seconds) < 2:
        return f"{seconds[0]:.1f} s long"
    return f"{min(seconds):.1f} to {max(seconds):.1f} s long, half of them over {quantiles(seconds, n=2)[0]:.1f} s"


def _yaml(value: Any) -> str:
    """A value in one line of YAML."""
    import yaml

    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
    return text.removesuffix("...\n").strip()


_TEMPLATE = Template("""\
# Made by `refalign-train init`. $found.
#
#   refalign-train check --config $file --preview preview    # look at preview/index.html
#   refalign-train cache --config $file
#   refalign-train run --config $file      # stopped or killed: --resume latest --output $run_words
#   refalign-train export --config $file --output my-lora
#
# Memory of the run: $memory.
# What is not named here is at its default; `refalign-train run --help` describes all options.

output: $run
training: lora
steps: $steps  # $epochs epochs of $count clips; look at the videos and stop when they are good

model:
  base: $model

lora:
  rank: $rank  # more clips bear a higher rank
  alpha: $rank

data:
  source:
    data: folder
    videos: $clips
  recipe:
    height: $height
    width: $width
    num_frames: $num_frames  # 4k + 1, shown at 16 a second
    stride: 1.5625  # real time; 3 plays clips 1.9 times as fast, as the paper does
  teacher: $teacher  # gated: accept its licence on its page, then `hf auth login`
  cache: $cache  # what `refalign-train cache` makes of the clips, and what is trained on

batch:
  size: $batch
  micro: 1  # more needs more memory

optimizer:
  lr: 1e-4
  schedule: cosine
  warmup_steps: $warmup

checkpoints:
  every: $every

validation:
  every: $every
  samples: 8  # held out of your clips: at most a tenth, of fewer than ten none
  # Shown as videos before the first step and at each validation. Put prompts with references that are not
  # among your clips here: they tell more.
  prompts:
$prompts
""")
