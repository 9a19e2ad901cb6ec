"""Whether the options of a run fit each other, before anything is loaded."""

from collections.abc import Sequence
from pathlib import Path

from refalign_training.run.config import PromptOptions, RunCommand, accumulation, flatten, wants_shards


def check(command: RunCommand) -> None:
    """Raises ValueError, naming the option, for options that do not fit each other."""
    folder = command.output if command.resume == "latest" else Path(command.resume or "")
    if command.resume != "auto" and not folder.exists():  # before what the folder would have told
        raise ValueError(f"--resume {command.resume}: there is no folder {folder}.")
    accumulation(command, world_size=1)
    _check_refinement(command)
    _check_data(command)
    _check_prompts(command.validation.prompts)
    _check_distillation(command)
    _check_memory(command)
    optimizer = command.optimizer
    if optimizer.warmup_steps > command.steps:
        raise ValueError(f"optimizer.warmup_steps is {optimizer.warmup_steps}, more than the {command.steps} steps.")
    if optimizer.name != "adamw" and wants_shards(command.parallel):
        raise ValueError(f"optimizer.name {optimizer.name} does not work with fsdp2. Choose adamw, or parallel ddp.")


def _check_memory(command: RunCommand) -> None:
    model = command.model
    if command.gpu_memory is not None and not command.dry_run:
        raise ValueError("--gpu-memory goes with --dry-run, which then says what fits.")
    asked = {"quantization": model.quantization, "offload_blocks": model.offload_blocks}
    for name in filter(asked.get, asked):
        if command.training == "full":
            raise ValueError(f"model.{name} is for a frozen base: it goes with training lora.")
        if wants_shards(command.parallel):
            raise ValueError(f"model.{name} does not work with fsdp2, which shards the base. Choose parallel ddp.")
    if model.offload_blocks and model.quantization == "nf4":
        raise ValueError("model.offload_blocks works with int8 and fp8, not with model.quantization nf4.")
    if model.offload_blocks and model.compile:
        raise ValueError("model.offload_blocks does not work with model.compile. Leave one out.")
    if (model.offload_blocks or model.offload_activations) and not model.gradient_checkpointing:
        raise ValueError("model.offload_blocks and offload_activations need model.gradient_checkpointing.")


# What a distillation must have: one pass can equal guided ones only where all conditions are there
DISTILLED = {
    "alignment.weight": 0,
    "objective.no_text": 0,
    "objective.no_references": 0,
    "objective.neither": 0,
    "objective.detail_weight": 1,
    "validation.guidance_scale": 1,
    "validation.image_guidance_scale": 1,
}


def _check_distillation(command: RunCommand) -> None:
    objective, options = command.objective, flatten(command)
    if objective.kind != "distil":
        return
    wrong = [f"{name} {needed}" for name, needed in DISTILLED.items() if options[name] != needed]
    if wrong:
        raise ValueError(f"objective.kind distil needs {', '.join(wrong)}. The recipe distil-1.3b has all of it.")
    if objective.guidance_scale == objective.image_guidance_scale == 1:
        raise ValueError("objective.guidance_scale and image_guidance_scale are 1: that is one pass already.")


# What a refinement has nothing of
OF_VIDEOS = {
    "model.offload_activations": False,
    "model.attention": None,
    "objective.detail_weight": 1,
    "validation.prompts": [],
}


def _check_refinement(command: RunCommand) -> None:
    if command.objective.kind != "refine":
        return
    if command.training != "full":
        raise ValueError("objective.kind refine trains all weights of a UNet: pass training full.")
    if command.alignment.weight:
        raise ValueError(
            f"objective.kind refine has no alignment loss: pass alignment.weight 0, not {command.alignment.weight:g}."
        )
    options = flatten(command)
    for name, default in OF_VIDEOS.items():
        if options[name] != default:
            raise ValueError(f"{name} is for videos, not for objective.kind refine. Leave it out.")
    if command.gpu_memory is not None:
        raise ValueError("--gpu-memory is reckoned for videos, not for objective.kind refine. Leave it out.")


def _check_data(command: RunCommand) -> None:
    data = command.data
    has_cache, has_dataset = data.cache is not None, data.source.data is not None
    if not has_cache and not has_dataset:
        raise ValueError("Pass either data.cache, made by `refalign-train cache`, or a dataset as data.source.data.")
    if has_cache and not has_dataset and data.teacher is not None:
        raise ValueError("data.teacher goes with a dataset: a cache has its teacher's features. Leave it out.")
    if not has_cache and data.teacher is None and command.alignment.weight:
        raise ValueError("Without a cache, data.teacher must name the model to align to; or set alignment.weight 0.")
    if not has_cache and command.validation.cache is not None:
        raise ValueError("validation.cache goes with data.cache.")


def _check_prompts(prompts: Sequence[PromptOptions]) -> None:
    for number, prompt in enumerate(prompts, 1):
        for reference in prompt.references:
            if "://" not in reference and not Path(reference).is_file():
                raise ValueError(f"validation.prompts, prompt {number}: the reference {reference} does not exist.")
