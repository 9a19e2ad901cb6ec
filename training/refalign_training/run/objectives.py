"""The objective of a run, made of its options and its networks."""

from functools import partial
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn

from refalign import RefAlignWanTransformer3DModel
from refalign.loading import read_defaults
from refalign_training.data.decoding import Decoded
from refalign_training.method.distillation import GuidanceDistillation
from refalign_training.method.objective import Objective
from refalign_training.method.options import ObjectiveOptions
from refalign_training.run.batches import pad_prompt_embeds
from refalign_training.run.config import RunCommand
from refalign_training.run.inputs import CachedSamples, Encoders, OnlineSamples
from refalign_training.run.networks import load_teacher
from refalign_training.run.parallel import Parallel


def make_objective(
    command: RunCommand,
    student: nn.Module,
    alignment: nn.Module | None,
    transformer: RefAlignWanTransformer3DModel,
    samples: CachedSamples | OnlineSamples,
    parallel: Parallel,
) -> Objective:
    """What the run minimises. `student` is `transformer`, perhaps wrapped. Raises ValueError if the negative prompt or
    the teacher of a distillation cannot be had."""
    options = command.objective
    precision = getattr(torch, command.model.precision)
    if options.kind == "refalign":
        return Objective(student, alignment, command.alignment, precision, partial(detail_weight, options))
    teacher = transformer
    if command.training == "full":
        teacher = load_teacher(command)
        parallel.wrap(teacher, teacher.blocks)
    embeds = pad_prompt_embeds([encode_negative_prompt(command, samples, parallel)], options.max_sequence_length)[0]
    return GuidanceDistillation(
        transformer=student,
        alignment=None,
        options=command.alignment,
        dtype=precision,
        teacher=teacher,
        negative_prompt_embeds=embeds.to(parallel.device),
        guidance_scale=options.guidance_scale,
        image_guidance_scale=options.image_guidance_scale,
    )


def detail_weight(options: ObjectiveOptions, step: int) -> float:
    """By how much more positions of detail count at a step."""
    done = min(step / options.detail_steps, 1.0) if options.detail_steps else 0.0
    return options.detail_weight + done * (1 - options.detail_weight)


def encode_negative_prompt(
    command: RunCommand, samples: CachedSamples | OnlineSamples, parallel: Parallel
) -> torch.Tensor:
    """The embeddings `(tokens, dim)` of the base's own negative prompt, on the CPU. The main process encodes it for
    all; encoders that the samples do not need are gone afterwards."""
    negative = read_defaults(command.model.base)["negative_prompt"]
    if not negative and isinstance(samples, CachedSamples):
        return samples.empty_prompt_embeds()
    encoded: list[Any] = [None]
    if parallel.is_main:
        is_online = isinstance(samples, OnlineSamples)
        encoders = samples.encoders if is_online else Encoders(("text",), command.model, parallel.device)
        encoded = [encoders("text")([Decoded(prompts=(negative,), prefix=None)])[0]["prompt_embeds_0"].cpu()]
    return broadcast_object_list(encoded)[0]
