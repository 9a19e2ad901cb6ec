"""The networks of a run: the transformer, perhaps with adapters, and the alignment's projectors."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import LoraConfig

from refalign import RefAlignWanTransformer3DModel
from refalign.convert import check_shapes, find_config
from refalign.families import family_of
from refalign.files import fetch, find_safetensors, naming_component, read, read_headers
from refalign.transformer_refalign_wan import check_finite
from refalign_training.method.alignment import ReferenceAlignment
from refalign_training.method.options import AlignmentOptions
from refalign_training.run.checkpoint import read_weights
from refalign_training.run.config import LoraOptions, ModelOptions, RunCommand, wants_shards
from refalign_training.run.resume import Start, find_start


def transformer_config(options: ModelOptions) -> dict[str, Any]:
    """The configuration of the base's transformer, downloaded alone if need be. Raises ValueError if it is not the one
    of Wan 2.1's text-to-video transformer."""
    return find_config(options.base, options.revision)


def of_its_family(command: RunCommand) -> RunCommand:
    """The command with the family of its base, and that one's options where none are given. Raises ValueError if
    another family was asked for, or the family cannot be trained so."""
    model, objective = command.model, command.objective
    family = "refalign"  # a refinement, whose base is no transformer, takes nothing of either
    if objective.kind != "refine":
        family = family_of(transformer_config(model), model.base)
    if objective.family not in ("auto", family):
        raise ValueError(
            f"objective.family is {objective.family}, but {model.base} is of the family {family}. Leave it out, or "
            f"make a base of that family: refalign convert --family {objective.family} ..."
        )
    if family == "bernini" and objective.kind == "distil":
        raise ValueError(
            f"objective.kind distil does not teach the projected guidance that {model.base}, a Bernini-R model, is "
            "sampled with. Name a RefAlign model as model.base."
        )
    if family == "bernini" and command.batch.micro > 1 and wants_shards(command.parallel):
        raise ValueError(
            f"batch.micro is {command.batch.micro}, but with fsdp2 a Bernini-R model takes one sample at once: others "
            "may need passes of their own, for which sharded processes do not wait. Set it to 1."
        )
    return dataclasses.replace(command, objective=dataclasses.replace(objective, family=family).filled())


def load_transformer(command: RunCommand, start: Start, resumes: bool = False) -> RefAlignWanTransformer3DModel:
    """The transformer on the CPU, its weights mapped from the files as they are stored. For a LoRA, it is cast, frozen
    and given adapters, which are the same for a seed. A full run that `resumes` reads no file: a checkpoint fills it.
    Raises ValueError if the files do not fit the base's configuration."""
    options, config = command.model, transformer_config(command.model)
    with naming_component("transformer's configuration", options.base), init_empty_weights():
        transformer = RefAlignWanTransformer3DModel.from_config(config)
    if resumes and command.training == "full":
        shapes = transformer.state_dict()
        transformer.load_state_dict({n: torch.empty_like(t, device="cpu") for n, t in shapes.items()}, assign=True)
    else:
        transformer.load_state_dict(_stored_weights(options, config, start), assign=True)
    if command.training == "lora":
        transformer.cast_weights(getattr(torch, options.precision)).requires_grad_(False)
        add_lora(transformer, command.lora, command.seed)
    _keep_time_embedding_in_float32(transformer)
    if options.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return transformer.train()


def load_teacher(command: RunCommand) -> RefAlignWanTransformer3DModel:
    """The frozen teacher of a distillation of all weights: what the run started from, in the precision of the
    computation. Raises ValueError as [`load_transformer`]."""
    start = find_start(command)
    with init_empty_weights():
        teacher = RefAlignWanTransformer3DModel.from_config(transformer_config(command.model))
    if start.checkpoint is None:
        weights = _stored_weights(command.model, transformer_config(command.model), start)
    else:
        weights = read_weights(start.checkpoint, average=False)
    teacher.load_state_dict(weights, assign=True)
    _keep_time_embedding_in_float32(teacher)
    return teacher.cast_weights(getattr(torch, command.model.precision)).requires_grad_(False).eval()


def _stored_weights(options: ModelOptions, config: Mapping[str, Any], start: Start) -> dict[str, torch.Tensor]:
    """The weights to start from, mapped from their files."""
    tensors, source = start.transformer, options.start
    if not tensors:
        folder = fetch(options.base, ["transformer/*.json", "transformer/*.safetensors"], options.revision)
        tensors, source = read_headers(find_safetensors(folder / "transformer")), options.base
    check_shapes(tensors, config, source)
    weights = read(tensors)
    check_finite(weights.items(), str(source))
    return weights


def add_lora(transformer: RefAlignWanTransformer3DModel, options: LoraOptions, seed: int) -> None:
    """Gives a transformer its adapters, in float32: the same ones for a seed."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"r": options.rank, "lora_alpha": options.alpha, "lora_dropout": options.dropout}
    transformer.add_adapter(LoraConfig(target_modules=list(options.targets), **sizes))
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _keep_time_embedding_in_float32(transformer: RefAlignWanTransformer3DModel) -> None:
    """Under autocast too: that is what inference does, and neighbouring timesteps are one in bfloat16."""

    def forward(
        hidden_states: torch.Tensor,
        compute: Callable[[torch.Tensor], torch.Tensor] = transformer.condition_embedder.time_embedder.forward,
    ) -> torch.Tensor:
        with torch.autocast(hidden_states.device.type, enabled=False):
            return compute(hidden_states)

    transformer.condition_embedder.time_embedder.forward = forward


def make_alignment(
    options: AlignmentOptions, config: Mapping[str, Any], teacher_dim: int, start: Start, seed: int
) -> ReferenceAlignment:
    """The projectors, started from those that came with the weights, or else the same ones for a seed. Raises
    ValueError if a layer is not there, or the projectors do not fit."""
    if outside := [layer for layer in options.layers if layer >= config["num_layers"]]:
        raise ValueError(f"alignment.layers names {outside}, but the blocks are 0 to {config['num_layers'] - 1}.")
    torch.manual_seed(seed)
    alignment = ReferenceAlignment(
        config["num_attention_heads"] * config["attention_head_dim"],
        teacher_dim,
        options.layers,
        projector=options.projector,
        spatial_norm=options.spatial_norm,
        positive_margin=options.positive_margin,
        negative_margin=options.negative_margin,
        negative_weight=options.negative_weight,
    )
    if start.projectors:
        alignment.load_native_state_dict({n: t.float() for n, t in read(start.projectors).items()})
    return alignment
