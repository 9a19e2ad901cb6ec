"""The families of models that one pipeline runs. What differs between them is data, kept in a model's own files."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


BERNINI_PREFIX = "You are a helpful assistant specialized in {} generation."


@dataclass(frozen=True)
class Family:
    """What a model of a family is given when it is made."""

    scheduler: dict[str, Any] | None = None
    """The class of the scheduler, as `_class_name`, and its configuration. `None`: the paper's."""
    transformer: dict[str, Any] = field(default_factory=dict)
    """Entries of the transformer's configuration."""
    pipeline: dict[str, Any] = field(default_factory=dict)
    """Entries of `model_index.json`."""
    card: str = "template"
    """The model card of `model_cards/` for a checkpoint that is not recognised."""


FAMILIES: dict[str, Family] = {
    "refalign": Family(),  # arXiv 2603.25743
    # arXiv 2605.22344: references and prompts as its code has them, and the settings of its command line
    "bernini": Family(
        scheduler={
            "_class_name": "UniPCMultistepScheduler",
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": 5.0,
        },
        transformer={"reference_rope": "sources", "text_to_references": True},
        pipeline={
            "call_defaults": {
                "width": 848,
                "num_inference_steps": 40,
                "guidance_scale": 4.0,
                "image_guidance_scale": 4.5,
                "guidance_projection": {"eta": 0.5, "thresholds": [50, 50]},
                "reference_long_edge": 848,
            },
            "prompt_prefix": {
                "references": BERNINI_PREFIX.format("subject-to-video"),
                "no_references": BERNINI_PREFIX.format("text-to-video"),
            },
            "first_sigma": 0.999,
        },
        card="bernini-r-1.3b",
    ),
}


def family_of(config: Mapping[str, Any], model: str) -> str:
    """The family of a transformer, by its configuration; plain Wan counts as RefAlign's, which it becomes. Raises
    ValueError, naming the model, if it is of none."""
    found = {
        "reference_rope": config.get("reference_rope", "frames"),
        "text_to_references": bool(config.get("text_to_references")),
    }
    plain = {"reference_rope": "frames", "text_to_references": False}
    for name, family in FAMILIES.items():
        if plain | family.transformer == found:
            return name
    raise ValueError(f"{model} is of no family that is known here: its transformer's configuration has {found}.")
