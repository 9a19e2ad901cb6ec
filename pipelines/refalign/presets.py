"""`--fast`: settings for speed under a name. docs/speed.md shows what each preset costs and saves."""

import logging
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """What options that are not given are set to."""

    guidance_gate: tuple[float, float] | None = None
    """The shares of the steps that make a null pass, and a reference pass."""
    cache: str | None = None
    """The cache of blocks, as `--cache` has it."""
    steps: float = 1.0
    """The share that is made of the model's own number of steps."""
    attention: str | None = None
    """The attention backend, as `--attention` has it. None that is downloaded: only a command may ask for that."""
    compile: bool = False
    """Whether blocks are compiled."""


# exact: bit for bit what a call without it makes
PRESETS = {
    "exact": Preset(),
    "balanced": Preset(guidance_gate=(0.8, 0.9), cache="first-block:0.05", attention="_native_cudnn", compile=True),
    "fast": Preset(
        guidance_gate=(0.6, 0.8), cache="first-block:0.1", steps=0.75, attention="_native_cudnn", compile=True
    ),
}
CUDA_ALONE = ("attention", "compile")


def check_preset(name: str | None) -> None:
    """Raises ValueError if no preset is called so."""
    if name is not None and name not in PRESETS:
        raise ValueError(f"--fast {name}: known are {', '.join(PRESETS)}.")


def with_preset(name: str | None, device: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """
    A model's defaults with those of a preset in their place. A line tells what this machine cannot do, which is left
    out.

    Args:
        name (`str`, *optional*): of the preset, as `--fast` has it.
        device (`str`): what `--device` says.
        defaults (`dict`): the model's own settings, by the names of the pipeline's call.

    Raises:
        ValueError: if no preset is called so.
    """
    check_preset(name)
    if name is None:
        return defaults
    from refalign.devices import find_device

    settings = asdict(PRESETS[name])
    steps = max(1, round(settings.pop("steps") * defaults["num_inference_steps"]))
    asked = {option: value for option, value in settings.items() if value}
    if find_device(device).type != "cuda":
        left_out = [option for option in CUDA_ALONE if asked.pop(option, None) is not None]
        if left_out:
            told = "--fast %s leaves out %s here, for which it takes an NVIDIA GPU."
            logging.getLogger(__name__).warning(told, name, " and ".join(left_out))
    return {**defaults, "num_inference_steps": steps, **asked}
