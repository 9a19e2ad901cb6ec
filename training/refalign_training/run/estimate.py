"""What a run will take: memory per GPU, compute per sample, hours.

Weights and compute are torch's own counts of a transformer of fake tensors, which take no memory. The memory of
activations is reckoned with what was measured on the real sizes without a GPU, by the storages that live in a forward
and backward pass of fake tensors (torch 2.13, diffusers 0.42.1, peft 0.21; fused attention, autocast to bfloat16 that
keeps no copies of weights). See [`estimate`] for what is left out.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import sub
from typing import Any, NamedTuple

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from refalign import RefAlignWanTransformer3DModel
from refalign.devices import find_device, rank_and_processes
from refalign.pipeline_refalign_wan import guidance_passes
from refalign_training.method.alignment import ReferenceAlignment
from refalign_training.method.options import AlignmentOptions
from refalign_training.run.batches import read_first
from refalign_training.run.config import RunCommand, accumulation, wants_shards
from refalign_training.run.inputs import open_samples
from refalign_training.run.lean import check_lean
from refalign_training.run.log import check_tracker
from refalign_training.run.networks import add_lora, make_alignment, of_its_family, transformer_config
from refalign_training.run.optimizers import check_optimizer
from refalign_training.run.order import Order, hold_out, nothing_held_out
from refalign_training.run.resume import checkpoint_to_resume, find_start


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
# AdamW's two moments of a weight, Muon's one, and what prodigy compares with beside them
OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2, "adafactor": 0.1, "prodigy": 16, "muon": 4}
QUANTIZED_BYTES = {"int8": 1.01, "fp8": 1.01, "nf4": 0.57}  # of a frozen weight, with its scale
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# As fused attention of a GPU is counted; a CPU's own is not known to torch's counter
ATTENTION = {
    _CPU_ATTENTION: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    _CPU_ATTENTION_BACKWARD: lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4]),
}


@dataclass(frozen=True)
class Memory:
    """The memory of one GPU at its fullest, in GiB: in the backward pass, when all gradients are there."""

    weights: float
    gradients: float
    optimizer: float
    average: float
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
    """What [`estimate`] returns. `hours` are reckoned at `ASSUMED_TFLOPS` per GPU."""

    bucket: Sequence[int]
    tokens: int
    """The tokens of a sample, its references' among them."""
    parameters: int
    """The transformer's weights, without adapters."""
    trained: int
    """The weights of transformer or adapters that are trained; without `projectors`."""
    projectors: int
    memory: Memory
    pflop: float
    """Forward, backward and recomputation of a sample, and the passes of a distillation's teacher, in 10^15
    floating-point operations."""
    hours: float
    world_size: int
    sharded: bool

    def lines(self) -> list[str]:
        """A small table for people."""
        frames, height, width, references = self.bucket[:4]
        named = ", ".join(f"{name} {size:.1f}" for name, size in asdict(self.memory).items() if size >= 0.05)
        parameters, trained, projectors = map(_count, (self.parameters, self.trained, self.projectors))
        gpus = f"{self.world_size} GPUs, {'sharded' if self.sharded else 'each with all weights'}"
        return [
            f"sample      {frames} frames of {width}x{height}, references: {references}; {self.tokens:,} tokens",
            f"parameters  {parameters}, trained {trained}, projectors {projectors}",
            f"GPUs        {'one GPU' if self.world_size == 1 else gpus}",
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
    """What a run will take if all samples are of one bucket.

    Left out: validation and its videos, what encoders compute where there is no cache, waiting for data and for other
    GPUs. The optimiser's step is reckoned to need less for a moment than the activations that are gone by then.

    Args:
        transformer_config (`Mapping`): the configuration of [`RefAlignWanTransformer3DModel`].
        bucket (`Sequence[int]`): (frames, height, width, references) of a sample, in pixels, and perhaps the height
            and width of each reference; without, they are reckoned as large as the video.
        world_size (`int`, *optional*, defaults to 1): GPUs.
        sharded (`bool`, *optional*, defaults to `False`): whether each holds its part of the weights (fsdp2).
        teacher_dim (`int`, *optional*, defaults to 1024): width of the teacher's features, DINOv3 ViT-L's.
    """
    shape = _Shape(transformer_config, bucket, teacher_dim)
    whole, block = _count_weights_and_flop(command, transformer_config, shape)
    projectors = _count_projectors(command.alignment, shape)
    again = shape.blocks * block.forward if command.model.gradient_checkpointing else 0
    taught = _teacher_passes(command) * whole.forward
    pflop = (whole.forward + whole.backward + again + taught) / 1e15
    parts = world_size if sharded else 1
    memory = _memory(command, shape, whole, block, projectors, parts)
    seconds = command.steps * command.batch.size * pflop * 1000 / (ASSUMED_TFLOPS * world_size)
    return Estimate(
        bucket=bucket,
        tokens=shape.tokens,
        parameters=whole.parameters,
        trained=whole.trained,
        projectors=projectors,
        memory=memory,
        pflop=pflop,
        hours=seconds / 3600,
        world_size=world_size,
        sharded=sharded,
    )


def dry_run(command: RunCommand) -> int:
    """Prints what the run would take if all samples were of its largest bucket. Nothing is trained or written. Raises
    ValueError if the data, or what the run starts from, does not fit."""
    command = of_its_family(command)
    resumes = checkpoint_to_resume(command) is not None
    start = find_start(command, resumes)
    config, needs_teacher = transformer_config(command.model), bool(command.alignment.weight)
    samples = open_samples(command.data, command.model, needs_teacher, torch.device("cpu"), fetches=False)
    buckets = np.unique(samples.buckets, axis=0).tolist()
    bucket = max(buckets, key=lambda bucket: _Shape(config, bucket).tokens)
    rows, held_out = hold_out(len(samples.buckets), 0 if command.validation.cache else command.validation.samples)
    teacher_dim = 1024  # of online encoders it is not known before they are loaded
    if needs_teacher and command.data.cache is not None:
        order = Order(samples.buckets, rows, command.batch.size, command.batch.micro, command.seed)
        teacher_dim = read_first(samples, order)["teacher_features"][0].shape[-1]
        make_alignment(command.alignment, config, teacher_dim, start, command.seed)  # does it fit?
    check_tracker(command.log.tracker)
    check_optimizer(command.optimizer)
    check_lean(command.model, config, find_device(command.device))
    rank, world_size = rank_and_processes()
    sharded = world_size > 1 and wants_shards(command.parallel)
    micro_batches = accumulation(command, world_size)
    if rank == 0:
        taken = f"{micro_batches} x {command.batch.micro} on each of {world_size}"
        print(f"{command.output}: {command.training}, {command.steps:,} steps of {command.batch.size} ({taken}).")
        counts = f"{len(rows):,} samples and {len(held_out)} held out, of {len(buckets)} shapes"
        print(f"{samples.name}: {counts}. Of the largest:")
        found = estimate(command, config, bucket, world_size, sharded=sharded, teacher_dim=teacher_dim)
        print("\n".join(found.lines()))
        if command.gpu_memory is not None:
            print(smallest_setting(command, config, bucket, world_size, teacher_dim=teacher_dim))
        if len(rows) < command.batch.size:
            print(f"{len(rows)} samples are fewer than a batch: some come twice per step.")
        validation = command.validation
        if validation.every and validation.samples and validation.cache is None and not len(held_out):
            print(nothing_held_out(len(rows)))
    return 0


def smallest_setting(
    command: RunCommand,
    config: Mapping[str, Any],
    bucket: Sequence[int],
    world_size: int = 1,
    *,
    teacher_dim: int = 1024,
) -> str:
    """Says which of the model's memory options have to change for `gpu_memory` GiB: as few as will do, what is exact
    and quick before what is not. Arguments as those of [`estimate`]."""
    limit = command.gpu_memory or 0.0
    shape = _Shape(config, bucket, teacher_dim)
    whole, block = _count_weights_and_flop(command, config, shape)
    projectors = _count_projectors(command.alignment, shape)
    parts = world_size if world_size > 1 and wants_shards(command.parallel) else 1
    for changes in _settings(command, shape.blocks):
        asked = dataclasses.replace(command, model=dataclasses.replace(command.model, **changes))
        if _memory(asked, shape, whole, block, projectors, parts).total <= limit:
            told = ", ".join(f"model.{name} {value}" for name, value in changes.items())
            return f"fits        {limit:g} GiB with {told}" if told else f"fits        {limit:g} GiB as it is"
    remedy = "Take smaller or shorter videos, fewer references, or more GPUs with parallel fsdp2."
    return f"fits        not into {limit:g} GiB, whatever is put elsewhere. {remedy}"


def _settings(command: RunCommand, blocks: int) -> Iterator[dict[str, Any]]:
    """Changes of the model's options, each sparing more memory than the one before."""
    changes: dict[str, Any] = {}
    yield changes
    if not command.model.gradient_checkpointing:
        changes = {"gradient_checkpointing": True}
        yield changes
    if not command.model.offload_activations:
        changes = {**changes, "offload_activations": True}
        yield changes
    if command.training == "full" or wants_shards(command.parallel):
        return
    if command.model.quantization is None:
        changes = {**changes, "quantization": "int8"}
        yield changes
    for count in range(max(command.model.offload_blocks, 1) + 1, blocks + 1):
        yield {**changes, "offload_blocks": count}


class _Shape:
    """A transformer's and a teacher's sizes, a sample's latents, and its tokens."""

    def __init__(self, config: Mapping[str, Any], bucket: Sequence[int], teacher_dim: int = 1024) -> None:
        frames, height, width, references, *sizes = bucket
        _, rows, columns = config.get("patch_size", (1, 2, 2))
        self.dim, self.teacher_dim = config["num_attention_heads"] * config["attention_head_dim"], teacher_dim
        self.ffn_dim, self.blocks = config["ffn_dim"], config["num_layers"]
        self.channels = config.get("in_channels", 16)
        self.latents = ((frames - 1) // 4 + 1, height // 8, width // 8)
        sizes = sizes or [height, width] * references
        self.reference_latents = [(h // 8, w // 8) for h, w in zip(sizes[::2], sizes[1::2], strict=True) if h]
        a_frame = (height // 8 // rows) * (width // 8 // columns)
        self.references = sum((h // rows) * (w // columns) for h, w in self.reference_latents)
        self.tokens = self.latents[0] * a_frame + self.references


class _Counts(NamedTuple):
    """Numbers of weights, and floating-point operations of a sample."""

    parameters: int
    trained: int
    forward: int
    backward: int


def _count_weights_and_flop(command: RunCommand, config: Mapping[str, Any], shape: _Shape) -> tuple[_Counts, _Counts]:
    """What the transformer has and does, and what each of its blocks: one and two blocks are counted."""
    one, two = _count_blocks(command, config, shape, 1), _count_blocks(command, config, shape, 2)
    block = _Counts(*map(sub, two, one))
    whole = _Counts(*(first + (shape.blocks - 1) * another for first, another in zip(one, block, strict=True)))
    return whole, block


def _count_blocks(command: RunCommand, config: Mapping[str, Any], shape: _Shape, blocks: int) -> _Counts:
    with torch.device("meta"):
        transformer = RefAlignWanTransformer3DModel.from_config({**config, "num_layers": blocks})
        parameters = transformer.num_parameters()
        if command.training == "lora":
            transformer.requires_grad_(False)
            add_lora(transformer, command.lora, command.seed)
    with FakeTensorMode():  # of a CPU: meta tensors take plain attention, which is not what a GPU takes
        weights = {}
        for name, tensor in (*transformer.named_parameters(), *transformer.named_buffers()):
            weights[name] = torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=tensor.requires_grad)
        references = [torch.empty(1, shape.channels, 1, *size) for size in shape.reference_latents]
        if transformer.config["reference_rope"] == "frames":
            references = torch.cat(references, dim=2)
        text_tokens, text_dim = command.objective.max_sequence_length, transformer.config.text_dim
        inputs = {
            "hidden_states": torch.empty(1, shape.channels, *shape.latents),
            "reference_hidden_states": references,
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": torch.empty(1, text_tokens, text_dim),
        }
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as forward:
            velocity = functional_call(transformer, weights, kwargs=inputs).sample
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as backward:
            velocity.sum().backward()
    trained = transformer.num_parameters(only_trainable=True)
    return _Counts(parameters, trained, forward.get_total_flops(), backward.get_total_flops())


def _teacher_passes(command: RunCommand) -> int:
    options = command.objective
    if options.kind != "distil":
        return 0
    return len(guidance_passes(options.guidance_scale, options.image_guidance_scale))


def _count_projectors(options: AlignmentOptions, shape: _Shape) -> int:
    if not options.weight:
        return 0
    with torch.device("meta"):
        alignment = ReferenceAlignment(shape.dim, shape.teacher_dim, options.layers, projector=options.projector)
    return sum(map(torch.Tensor.numel, alignment.parameters()))


# -- Memory -----------------------------------------------------------------------------------------------------------


def _memory(command: RunCommand, shape: _Shape, whole: _Counts, block: _Counts, projectors: int, parts: int) -> Memory:
    """`parts`: into how many all weights are split."""
    is_full, trained, learned = command.training == "full", whole.trained, whole.trained + projectors
    compute_bytes = 2 if command.model.precision == "bfloat16" else 4
    has_teacher = bool(_teacher_passes(command))  # of a LoRA it is the frozen network itself
    frozen = 0 if is_full and not has_teacher else whole.parameters * compute_bytes
    if not is_full:
        frozen -= _spared(command, block.parameters * compute_bytes, block.parameters, shape.blocks)
    gathered = 0
    if parts > 1:  # a block in use, the next one, and the buffer that they arrive in; gradients and what they leave in
        frozen_block = 0 if is_full and not has_teacher else block.parameters * compute_bytes
        gathered = 3 * (frozen_block + 4 * block.trained) + 2 * 4 * block.trained
    encoders = ENCODERS * compute_bytes / 2 if command.data.cache is None else 0
    return Memory(
        weights=(frozen + 4 * learned) / parts / GIB,
        gradients=4 * learned / parts / GIB,
        optimizer=OPTIMIZER_BYTES[command.optimizer.name] * learned / parts / GIB,
        average=(4 * trained / parts if command.optimizer.ema_decay is not None else 0) / GIB,
        gathered=gathered / GIB,
        activations=_activations(command, shape, block.trained) / GIB,
        loss=_loss_bytes(command, shape) / GIB,
        encoders=encoders / GIB,
        overhead=OVERHEAD / GIB,
    )


def _spared(command: RunCommand, block_bytes: float, block_weights: int, blocks: int) -> float:
    """What fewer bits, and blocks in the CPU's memory, spare of the frozen weights."""
    model, spared = command.model, 0.0
    if model.quantization is not None:  # a block that computes has its weights as they were, too
        spared = blocks * (block_bytes - QUANTIZED_BYTES[model.quantization] * block_weights) - block_bytes
        block_bytes = QUANTIZED_BYTES[model.quantization] * block_weights
    if model.offload_blocks:  # one is there while it computes
        spared += (min(model.offload_blocks, blocks) - 1) * block_bytes
    return spared


def _activations(command: RunCommand, shape: _Shape, block_weights: int) -> float:
    """What the blocks save: their inputs and one block's insides if it is computed again, else all insides."""
    is_bfloat16, again = command.model.precision == "bfloat16", command.model.gradient_checkpointing
    tokens, factor = shape.tokens * command.batch.micro, 1 if is_bfloat16 else FLOAT32_FACTOR
    (saved_dim, saved_ffn), (working_dim, working_ffn) = SAVED[command.training], WORKING[command.training]
    saved = tokens * factor * (saved_dim * shape.dim + saved_ffn * shape.ffn_dim)
    working = tokens * factor * (working_dim * shape.dim + working_ffn * shape.ffn_dim)
    kept = 1 if command.model.offload_activations else shape.blocks
    stream = kept * tokens * shape.dim * (2 if is_bfloat16 else 4) if again else 0
    copies = 2 * block_weights if is_bfloat16 else 0  # autocast's, of a block
    return stream + working + (saved + copies) * (1 if again else shape.blocks)


def _loss_bytes(command: RunCommand, shape: _Shape) -> int:
    """Velocity, noise and latents with their differences, and one aligned layer with its projector."""
    diffusion = 6 * 4 * shape.channels * math.prod(shape.latents)
    alignment = shape.references * 12 * (shape.dim + shape.teacher_dim) if command.alignment.weight else 0
    return command.batch.micro * (diffusion + alignment)


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
