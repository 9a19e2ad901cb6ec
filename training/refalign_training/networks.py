"""The networks of a run: the transformer with what of it is trained, and the alignment's projectors."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.models.attention_dispatch import AttentionBackendName
from peft import LoraConfig

from refalign import RefAlignWanTransformer3DModel
from refalign.checkpoints import (
    PROJECTORS,
    check_shapes,
    find_safetensors,
    native_to_diffusers,
    read,
    read_headers,
    read_json,
)
from refalign.hub import LORA_WEIGHTS
from refalign_training.alignment import ReferenceAlignment
from refalign_training.checkpoint import find_checkpoint, read_state
from refalign_training.config import AlignmentOptions, LoraOptions, ModelOptions, RunCommand
from refalign_training.frozen_models import fetch_model


CHANNELS = 16  # of Wan 2.1's latents; its image-to-video models take 36, Wan 2.2's 5B takes 48


@dataclass(frozen=True)
class Start:
    """What a run starts from, other than its base."""

    checkpoint: Path | None = None
    """Another run's checkpoint, read when the networks stand; else files, as headers of tensors:"""
    transformer: Mapping[str, Any] = field(default_factory=dict)
    projectors: Mapping[str, Any] = field(default_factory=dict)


def find_start(command: RunCommand, resumes: bool = False) -> Start:
    """
    What `model.start` names. A run that `resumes` has what it took of a checkpoint in its own: it needs but the whole
    weights that adapters belong to.

    Raises:
        ValueError: if it is nothing to start from, or of another kind of training.
    """
    path = command.model.start
    if path is None or (resumes and (command.training == "full" or not path.exists())):
        return Start()
    if not path.exists():
        raise ValueError(f"model.start is {path}, which does not exist.")
    if (path / LORA_WEIGHTS).is_file():
        raise ValueError(f"{path} holds exported adapters. Name the run, or the checkpoint, that they are of.")
    if path.is_dir() and (path / "transformer").is_dir():
        projectors = path / PROJECTORS
        tensors = read_headers(find_safetensors(path / "transformer"))
        return Start(None, tensors, read_headers([projectors]) if projectors.is_file() else {})
    if path.is_dir() and not any(path.glob("*.safetensors")):
        checkpoint = find_checkpoint(path)
    elif path.is_dir() and (path / "state.json").is_file():
        checkpoint = path
    else:
        return Start(None, *native_to_diffusers(read_headers(find_safetensors(path))))
    if resumes:
        return Start()
    training = read_state(checkpoint)["options"]["training"]
    if training != command.training:
        remedy = {
            "full": "Export it (refalign-train export) and name that folder as model.start.",
            "lora": "Adapters are no whole weights to start from: train as lora, or without model.start.",
        }
        raise ValueError(f"{checkpoint} is of {training} training, this run is {command.training}. {remedy[training]}")
    return Start(checkpoint)


def transformer_config(options: ModelOptions) -> dict[str, Any]:
    """
    The configuration of the base's transformer, downloaded alone if need be.

    Raises:
        ValueError: if there is none, or it is not of Wan 2.1's text-to-video transformer.
    """
    folder = fetch_model(options.base, options.revision, ["transformer/config.json"])
    file = folder / "transformer/config.json"
    if not file.is_file():
        raise ValueError(f"{options.base} is no pipeline in diffusers' format: it has no transformer/config.json.")
    config = read_json(file)
    kind, channels = config.get("_class_name"), config.get("in_channels", CHANNELS)
    is_wan = kind in ("WanTransformer3DModel", "RefAlignWanTransformer3DModel")
    takes_images = config.get("image_dim") is not None
    if not is_wan or takes_images or channels != CHANNELS:
        kind = f"image-to-video {kind}" if takes_images else kind
        raise ValueError(
            f"{options.base} has a transformer of kind {kind} that takes {channels} channels, not Wan 2.1's "
            f"text-to-video one (WanTransformer3DModel, {CHANNELS} channels). Pass a base that has it."
        )
    return config


def load_transformer(command: RunCommand, start: Start, resumes: bool = False) -> RefAlignWanTransformer3DModel:
    """
    The transformer on the CPU, its weights mapped from the files as they are stored; of a LoRA, cast, frozen and with
    its adapters, which are the same for a seed. A full run that `resumes` reads no file: the checkpoint fills it.

    Raises:
        ValueError: if the files do not fit the base's configuration.
    """
    options, config = command.model, transformer_config(command.model)
    with init_empty_weights():
        transformer = RefAlignWanTransformer3DModel.from_config(config)
    if resumes and command.training == "full":
        shapes = transformer.state_dict()
        transformer.load_state_dict({n: torch.empty_like(t, device="cpu") for n, t in shapes.items()}, assign=True)
    else:
        transformer.load_state_dict(_stored_weights(options, config, start), assign=True)
    if command.training == "lora":
        transformer.cast_weights(getattr(torch, options.precision)).requires_grad_(False)
        _add_lora(transformer, command.lora, command.seed)
    _keep_time_embedding_in_float32(transformer)
    if options.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return transformer.train()


def _stored_weights(options: ModelOptions, config: Mapping[str, Any], start: Start) -> dict[str, torch.Tensor]:
    """The weights to start from, mapped from their files."""
    tensors, source = start.transformer, options.start
    if not tensors:
        folder = fetch_model(options.base, options.revision, ["transformer/*.json", "transformer/*.safetensors"])
        tensors, source = read_headers(find_safetensors(folder / "transformer")), options.base
    check_shapes(tensors, config, source)
    return read(tensors)


def frozen_fingerprint(transformer: RefAlignWanTransformer3DModel) -> str:
    """A digest of some values of every frozen weight: other weights, another digest. Empty if none is frozen."""
    total, is_any = hashlib.sha256(), False
    for name, parameter in transformer.named_parameters():
        if not parameter.requires_grad:
            is_any, values = True, parameter.detach().flatten()
            places = torch.linspace(0, len(values) - 1, 64, dtype=torch.float64).long()
            total.update(f"{name} {tuple(parameter.shape)}".encode() + values[places].float().numpy().tobytes())
    return f"sha256:{total.hexdigest()}" if is_any else ""


def _add_lora(transformer: RefAlignWanTransformer3DModel, options: LoraOptions, seed: int) -> None:
    torch.manual_seed(seed)
    transformer.add_adapter(
        LoraConfig(
            r=options.rank,
            lora_alpha=options.alpha,
            lora_dropout=options.dropout,
            target_modules=list(options.targets),
        )
    )
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def take_plain_attention(transformer: RefAlignWanTransformer3DModel) -> None:
    """For training on a CPU, where torch's flash attention takes eight times as long backwards as forwards."""
    # Not by `set_attention_backend`, which would change all other models of the process too
    for block in transformer.blocks:
        for attention in (block.attn1, block.attn2):
            attention.processor._attention_backend = AttentionBackendName._NATIVE_MATH


def _keep_time_embedding_in_float32(transformer: RefAlignWanTransformer3DModel) -> None:
    """Under autocast too: that is what inference does, and neighbouring timesteps are one in bfloat16."""

    def forward(hidden_states: torch.Tensor, compute=transformer.condition_embedder.time_embedder.forward):
        with torch.autocast(hidden_states.device.type, enabled=False):
            return compute(hidden_states)

    transformer.condition_embedder.time_embedder.forward = forward


def make_alignment(
    options: AlignmentOptions, config: Mapping[str, Any], teacher_dim: int, start: Start, seed: int
) -> ReferenceAlignment:
    """
    The projectors, started from those that came with the weights, or else the same ones for a seed.

    Raises:
        ValueError: if a layer is not there, or the projectors do not fit.
    """
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
