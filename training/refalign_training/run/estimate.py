"""
What a run will take: memory per GPU, compute per sample, hours. Arithmetic on shapes alone; nothing heavy is imported.

What the memory of activations is reckoned with was measured on the real sizes without a GPU, by the storages that live
in a forward and backward pass of fake tensors (torch 2.13, diffusers 0.42.1, peft 0.21; fused attention, autocast to
bfloat16 that keeps no copies of weights). See [`estimate`] for what is left out.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from refalign_training.method.options import AlignmentOptions
from refalign_training.run.config import OptimizerOptions, RunCommand, accumulation, wants_shards


GIB = 2**30
ASSUMED_TFLOPS = 400  # what a GPU does in use: an H100 or H200 in bfloat16
OVERHEAD = 1.0 * GIB  # CUDA's context, cuBLAS's workspaces, the allocator's gaps
# UMT5-XXL, two bytes a weight; the VAE in float32; the larger teacher
ENCODERS = 11.4e9 + 0.5e9 + 0.6e9
# Bytes per token that a block saves for its backward pass, for each channel of its width and of its feed-forward...
SAVED = {"full": (68, 4), "lora": (50, 4)}
# ... and those that come and go on top: a LoRA's layers take their inputs in the adapters' float32
WORKING = {"full": (4, 1), "lora": (12, 6)}
FLOAT32_FACTOR = 1.5  # of both in float32: much of it is so already


@dataclass(frozen=True)
class Memory:
    """The memory of one GPU at its fullest, in GiB: in the backward pass, when all gradients are there."""

    weights: float
    gradients: float
    optimizer: float
    average: float
    """The moving average of the trained weights."""
    gathered: float
    """Blocks that are whole for a moment, and their gradients, where weights are sharded."""
    activations: float
    loss: float
    encoders: float
    """They run along where there is no cache."""
    overhead: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Estimate:
    """What [`estimate`] returns."""

    bucket: tuple[int, int, int, int]
    """(frames, height, width, references), in pixels."""
    tokens: int
    """The tokens of a sample, its references' among them."""
    parameters: int
    """The transformer's weights, without adapters."""
    trained: int
    """The weights of transformer or adapters that are trained; without `projectors`."""
    projectors: int
    memory: Memory
    pflop: float
    """Forward, backward and recomputation of a sample, in 10^15 floating-point operations."""
    hours: float
    """How long the run takes, at `ASSUMED_TFLOPS` per GPU."""
    world_size: int
    sharded: bool

    def lines(self) -> list[str]:
        """A small table for people."""
        frames, height, width, references = self.bucket
        named = ", ".join(f"{name} {size:.1f}" for name, size in asdict(self.memory).items() if size >= 0.05)
        counts = map(_count, (self.parameters, self.trained, self.projectors))
        many = f"{self.world_size} GPUs, {'sharded' if self.sharded else 'each with all weights'}"
        return [
            f"sample      {frames} frames of {width}x{height}, references: {references}; {self.tokens:,} tokens",
            "parameters  {}, trained {}, projectors {}".format(*counts),
            f"GPUs        {'one GPU' if self.world_size == 1 else many}",
            f"memory      {self.memory.total:.1f} GiB per GPU: {named}",
            f"compute     {self.pflop:.3g} PFLOP per sample",
            f"time        {self.hours:.3g} hours, assuming {ASSUMED_TFLOPS} TFLOP/s per GPU; samples are read in time",
        ]


def estimate(
    command: RunCommand,
    transformer_config: Mapping[str, Any],
    bucket: Sequence[int],
    world_size: int = 1,
    *,
    sharded: bool = False,
    teacher_dim: int = 1024,
) -> Estimate:
    """
    What a run will take if all samples are of one bucket.

    Left out: validation and its videos, what encoders compute where there is no cache, waiting for data and for other
    GPUs. The optimiser's step is reckoned to need less for a moment than the activations that are gone by then.

    Args:
        command ([`RunCommand`]): the options.
        transformer_config (`Mapping`): the configuration of [`RefAlignWanTransformer3DModel`].
        bucket (`Sequence[int]`): (frames, height, width, references) of a sample, in pixels.
        world_size (`int`, *optional*, defaults to 1): GPUs.
        sharded (`bool`, *optional*, defaults to `False`): whether each holds its part of the weights (fsdp2).
        teacher_dim (`int`, *optional*, defaults to 1024): width of the teacher's features, DINOv3 ViT-L's.

    Returns:
        [`Estimate`].
    """
    shape = _Shape(transformer_config, tuple(bucket), command.objective.max_sequence_length)
    layers = list(_layers(transformer_config))
    parameters = _parameters(transformer_config, layers)
    trained = parameters if command.training == "full" else _lora_parameters(command, layers)
    projectors = _projector_parameters(command.alignment, shape.dim, teacher_dim)
    counts, parts = (parameters, trained, projectors), world_size if sharded else 1
    pflop = _flop(command, shape, layers) / 1e15
    seconds = command.steps * command.batch.size * pflop * 1000 / (ASSUMED_TFLOPS * world_size)
    return Estimate(
        bucket=tuple(bucket),
        tokens=shape.tokens["all"],
        parameters=parameters,
        trained=trained,
        projectors=projectors,
        memory=_memory(command, shape, layers, counts, parts, teacher_dim),
        pflop=pflop,
        hours=seconds / 3600,
        world_size=world_size,
        sharded=sharded,
    )


def dry_run(command: RunCommand) -> int:
    """
    Prints what the run would take if all samples were of its largest bucket. Nothing is trained or written.

    Raises:
        ValueError: if the data or what the run starts from do not fit.
    """
    import numpy as np
    import torch

    from refalign_training.run.batches import read_first
    from refalign_training.run.inputs import open_samples
    from refalign_training.run.log import check_tracker
    from refalign_training.run.networks import make_alignment, transformer_config
    from refalign_training.run.order import Order, hold_out
    from refalign_training.run.resume import checkpoint_to_resume, find_start

    resumes = checkpoint_to_resume(command) is not None
    start = find_start(command, resumes)
    config, needs_teacher = transformer_config(command.model), bool(command.alignment.weight)
    samples = open_samples(command.data, command.model, needs_teacher, torch.device("cpu"), fetches=False)
    buckets = np.unique(samples.buckets, axis=0).tolist()
    bucket = max(buckets, key=lambda bucket: _Shape(config, bucket, 0).tokens["all"])
    rows, held_out = hold_out(len(samples.buckets), 0 if command.validation.cache else command.validation.samples)
    teacher_dim = 1024  # of online encoders it is not known before they are loaded
    if needs_teacher and command.data.cache is not None:
        order = Order(samples.buckets, rows, command.batch.size, command.batch.micro, command.seed)
        teacher_dim = read_first(samples, order)["teacher_features"].shape[-1]
        make_alignment(command.alignment, config, teacher_dim, start, command.seed)  # does it fit?
    check_tracker(command.log.tracker)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    sharded = world_size > 1 and wants_shards(command.parallel)
    micro_batches = accumulation(command, world_size)
    if int(os.environ.get("RANK", 0)) == 0:
        taken = f"{micro_batches} x {command.batch.micro} on each of {world_size}"
        print(f"{command.output}: {command.training}, {command.steps:,} steps of {command.batch.size} ({taken}).")
        counts = f"{len(rows):,} samples and {len(held_out)} held out, of {len(buckets)} shapes"
        print(f"{samples.name}: {counts}. Of the largest:")
        found = estimate(command, config, bucket, world_size, sharded=sharded, teacher_dim=teacher_dim)
        print("\n".join(found.lines()))
        if len(rows) < command.batch.size:
            print(f"{len(rows)} samples are fewer than a batch: some come twice per step.")
    return 0


# -- The transformer --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """A matrix with a bias, and which tokens go through it."""

    name: str
    inputs: int
    outputs: int
    sees: Literal["all", "video", "text", "sample"]
    count: int = 1

    @property
    def parameters(self) -> int:
        return (self.inputs + 1) * self.outputs


class _Shape:
    """A transformer's sizes, and how many tokens of each kind a sample has."""

    def __init__(self, config: Mapping[str, Any], bucket: tuple[int, int, int, int], text_tokens: int) -> None:
        frames, height, width, references = bucket
        _, rows, columns = config.get("patch_size", (1, 2, 2))
        self.dim, self.ffn_dim, self.blocks = _dim(config), config["ffn_dim"], config["num_layers"]
        self.latents = config.get("in_channels", 16) * ((frames - 1) // 4 + 1) * (height // 8) * (width // 8)
        a_frame = (height // 8 // rows) * (width // 8 // columns)
        video = ((frames - 1) // 4 + 1) * a_frame
        self.references = references * a_frame
        self.tokens = {"all": video + self.references, "video": video, "text": text_tokens, "sample": 1}


def _dim(config: Mapping[str, Any]) -> int:
    return config["num_attention_heads"] * config["attention_head_dim"]


def _layers(config: Mapping[str, Any]) -> Iterator[_Layer]:
    """All of [`WanTransformer3DModel`], text to video; those of blocks once, with how many there are."""
    dim, ffn_dim, blocks = _dim(config), config["ffn_dim"], config["num_layers"]
    patch = math.prod(config.get("patch_size", (1, 2, 2)))
    yield _Layer("patch_embedding", config.get("in_channels", 16) * patch, dim, "all")
    yield _Layer("condition_embedder.time_embedder.linear_1", config.get("freq_dim", 256), dim, "sample")
    yield _Layer("condition_embedder.time_embedder.linear_2", dim, dim, "sample")
    yield _Layer("condition_embedder.time_proj", dim, 6 * dim, "sample")
    yield _Layer("condition_embedder.text_embedder.linear_1", config.get("text_dim", 4096), dim, "text")
    yield _Layer("condition_embedder.text_embedder.linear_2", dim, dim, "text")
    for name, sees in (("to_q", "video"), ("to_k", "text"), ("to_v", "text"), ("to_out.0", "video")):
        yield _Layer(f"blocks.0.attn1.{name}", dim, dim, "all", blocks)
        yield _Layer(f"blocks.0.attn2.{name}", dim, dim, sees, blocks)
    yield _Layer("blocks.0.ffn.net.0.proj", dim, ffn_dim, "all", blocks)
    yield _Layer("blocks.0.ffn.net.2", ffn_dim, dim, "all", blocks)
    yield _Layer("proj_out", dim, config.get("out_channels", 16) * patch, "video")


def _parameters(config: Mapping[str, Any], layers: Sequence[_Layer]) -> int:
    return sum(layer.parameters * layer.count for layer in layers) + _dim(config) * (
        config["num_layers"] * _small_channels(config) + 2  # the head's modulation
    )


def _small_channels(config: Mapping[str, Any]) -> int:
    """A block's parameters outside matrices, for each channel: modulation, norms of queries and keys, norm2."""
    return 6 + 4 + (2 if config.get("cross_attn_norm", True) else 0)


def _lora_parameters(command: RunCommand, layers: Sequence[_Layer]) -> int:
    ends = tuple(f".{target}" for target in command.lora.targets)
    adapted = [layer for layer in layers if f".{layer.name}".endswith(ends)]
    return command.lora.rank * sum((layer.inputs + layer.outputs) * layer.count for layer in adapted)


def _projector_parameters(options: AlignmentOptions, dim: int, teacher_dim: int) -> int:
    if not options.weight:
        return 0
    linear, conv = dim // 2 * (dim + teacher_dim), (9 * dim + 1) * teacher_dim
    return len(options.layers) * (linear if options.projector == "linear" else conv)


# -- Memory -----------------------------------------------------------------------------------------------------------


def _memory(
    command: RunCommand,
    shape: _Shape,
    layers: Sequence[_Layer],
    counts: tuple[int, int, int],
    parts: int,
    teacher_dim: int,
) -> Memory:
    """`counts`: parameters, trained ones, projectors'. `parts`: into how many all of them are split."""
    parameters, trained, projectors = counts
    is_full, learned = command.training == "full", trained + projectors
    compute_bytes = 2 if command.model.precision == "bfloat16" else 4
    frozen = 0 if is_full else parameters * compute_bytes
    block = sum(layer.parameters for layer in layers if layer.name.startswith("blocks."))
    gathered = 0
    if parts > 1:  # a block in use, the next one, and the buffer that they arrive in; gradients and what they leave in
        a_block = block * (4 if is_full else compute_bytes) + (0 if is_full else trained // shape.blocks * 4)
        gathered = 3 * a_block + 2 * 4 * (trained // shape.blocks)
    encoders = ENCODERS * compute_bytes / 2 if command.data.cache is None else 0
    return Memory(
        weights=(frozen + 4 * learned) / parts / GIB,
        gradients=4 * learned / parts / GIB,
        optimizer=_optimizer_bytes(command.optimizer) * learned / parts / GIB,
        average=(4 * trained / parts if command.optimizer.ema_decay is not None else 0) / GIB,
        gathered=gathered / GIB,
        activations=_activations(command, shape, block if is_full else trained // shape.blocks) / GIB,
        loss=_loss_bytes(command, shape, teacher_dim) / GIB,
        encoders=encoders / GIB,
        overhead=OVERHEAD / GIB,
    )


def _optimizer_bytes(options: OptimizerOptions) -> int:
    """The moments of a weight: AdamW's two, or Muon's one, which nearly all weights have under it."""
    return {"adamw": 8, "adamw8bit": 2, "muon": 4}[options.name]


def _activations(command: RunCommand, shape: _Shape, block_weights: int) -> float:
    """What the blocks save: their inputs and one block's insides if it is computed again, else all insides."""
    is_bfloat16, blocks = command.model.precision == "bfloat16", shape.blocks
    again = command.model.gradient_checkpointing
    tokens, factor = shape.tokens["all"] * command.batch.micro, 1 if is_bfloat16 else FLOAT32_FACTOR
    (saved_dim, saved_ffn), (working_dim, working_ffn) = SAVED[command.training], WORKING[command.training]
    saved = tokens * factor * (saved_dim * shape.dim + saved_ffn * shape.ffn_dim)
    working = tokens * factor * (working_dim * shape.dim + working_ffn * shape.ffn_dim)
    stream = blocks * tokens * shape.dim * (2 if is_bfloat16 else 4) if again else 0
    copies = 2 * block_weights if is_bfloat16 else 0  # autocast's, of a block
    return stream + working + (saved + copies) * (1 if again else blocks)


def _loss_bytes(command: RunCommand, shape: _Shape, teacher_dim: int) -> int:
    """Velocity, noise and latents with their differences, and one aligned layer with its projector."""
    diffusion = 6 * 4 * shape.latents
    alignment = shape.references * 12 * (shape.dim + teacher_dim) if command.alignment.weight else 0
    return command.batch.micro * (diffusion + alignment)


# -- Compute ----------------------------------------------------------------------------------------------------------


def forward_flop(transformer_config: Mapping[str, Any], bucket: Sequence[int], text_tokens: int) -> tuple[int, int]:
    """Floating-point operations of a sample's forward pass: in matrices of weights, and in attention."""
    shape = _Shape(transformer_config, tuple(bucket), text_tokens)
    return _matrix_flop(shape, _layers(transformer_config)), _attention_flop(shape)


def _matrix_flop(shape: _Shape, layers: Iterator[_Layer] | Sequence[_Layer]) -> int:
    return sum(2 * layer.inputs * layer.outputs * layer.count * shape.tokens[layer.sees] for layer in layers)


def _attention_flop(shape: _Shape) -> int:
    pairs = shape.tokens["all"] ** 2 + shape.tokens["video"] * shape.tokens["text"]
    return 4 * pairs * shape.dim * shape.blocks


def _flop(command: RunCommand, shape: _Shape, layers: Sequence[_Layer]) -> float:
    """
    The backward pass costs a matrix once for its input and, if it is trained, once for itself; fused attention five
    products instead of two, as it computes the weights of pairs again.
    """
    again = 1 if command.model.gradient_checkpointing else 0
    matrices = 1 + again + (2 if command.training == "full" else 1)
    flop = matrices * _matrix_flop(shape, layers) + (1 + again + 2.5) * _attention_flop(shape)
    if command.training == "lora":
        for layer in layers:
            if _lora_parameters(command, [layer]):
                adapter = replace(layer, inputs=command.lora.rank, outputs=layer.inputs + layer.outputs)
                flop += (3 + again) * _matrix_flop(shape, [adapter])
    return flop


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
