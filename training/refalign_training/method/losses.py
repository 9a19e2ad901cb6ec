"""The losses of a training step, one value per sample, and the timesteps it is drawn at. Pure functions.

Shapes: `tokens` are the tokens of one sample's references, one reference behind the other. Timesteps are in [0, 1000].
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint


NUM_TRAIN_TIMESTEPS = 1000
TIMESTEP_PRESETS = ("refalign", "logit_normal", "bernini", "uniform")

SubjectIds = torch.Tensor | Sequence | None
Keep = torch.Tensor | Sequence[bool] | None


# -- Flow matching ----------------------------------------------------------------------------------------------------


def add_noise(latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """
    x_t = (1 - sigma) x_0 + sigma noise, sigma = t / 1000 (flow matching, arXiv 2210.02747, on the straight path).

    Takes clean, normalised latents `(batch, ...)`, noise of the same shape and a timestep for each sample `(batch,)`,
    or raises ValueError. Computes in float32 and returns the dtype of `latents`.
    """
    _check_same_shape(latents=latents, noise=noise)
    _check_a_sample("timestep", timestep, latents)
    sigma = (timestep.float() / NUM_TRAIN_TIMESTEPS).view(-1, *[1] * (latents.ndim - 1))
    return torch.lerp(latents.float(), noise.float(), sigma).to(latents.dtype)


def flow_matching_loss(
    velocity: torch.Tensor,
    noise: torch.Tensor,
    latents: torch.Tensor,
    weights: torch.Tensor | None = None,
    position_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    w(t) mean (v - (noise - x_0))^2, one value per sample (flow matching, arXiv 2210.02747, on the straight path).

    Args:
        velocity (`torch.Tensor` of shape `(batch, ...)`): what the model predicts.
        noise, latents (`torch.Tensor` of the same shape): the noise, and the clean latents it was added to.
        weights (`torch.Tensor` of shape `(batch,)`, *optional*): w(t), see [`sample_timesteps`]; 1 without.
        position_weights (`torch.Tensor` of shape `(batch, 1, frames, h, w)`, *optional*): how much each position
            counts, relative to the others of its sample; all alike without.

    Returns:
        `torch.Tensor` of shape `(batch,)`, float32. Shapes that do not fit each other raise ValueError.
    """
    _check_same_shape(velocity=velocity, noise=noise, latents=latents)
    error = (velocity.float() - (noise.float() - latents.float())).square()
    if position_weights is not None:
        error = error * (position_weights / position_weights.flatten(1).mean(1).view(-1, *[1] * (error.ndim - 1)))
    loss = error.flatten(1).mean(1)
    if weights is None:
        return loss
    _check_a_sample("weights", weights, velocity)
    return loss * weights.float()


def velocity_loss(velocity: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """
    mean (v - target)^2, one value per sample `(batch,)` in float32, of velocities `(batch, ...)` of one shape; with
    weights that broadcast to it, the weighted mean.
    """
    _check_same_shape(velocity=velocity, target=target)
    error = (velocity.float() - target.float()).square()
    if weights is None:
        return error.flatten(1).mean(1)
    weights = weights.expand_as(error).flatten(1)
    return (weights * error.flatten(1)).sum(1) / weights.sum(1)


def detail(latents: torch.Tensor, threshold: float = 0.7) -> torch.Tensor:
    """
    Where clean latents `(batch, channels, frames, h, w)` differ from those at their left or right by more than a
    threshold, on average over the channels: at subjects, where places are smooth along a row. Returns booleans
    `(batch, 1, frames, h, w)`.
    """
    step = latents.float().diff(dim=-1).abs().mean(1, keepdim=True)
    edges = torch.nn.functional.pad(step, (1, 1))
    return torch.maximum(edges[..., 1:], edges[..., :-1]) > threshold


def timestep_gate(timestep: torch.Tensor, power: float = 3) -> torch.Tensor:
    """
    (t / 1000)^power in float32, the weight of the alignment at each timestep (RefAlign, arXiv 2603.25743, training
    objective). Power 0 switches the gate off.
    """
    return (timestep.float() / NUM_TRAIN_TIMESTEPS).pow(power)


# -- Timesteps --------------------------------------------------------------------------------------------------------


def timestep_table(preset: str) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The 1000 timesteps that stand for a preset's distribution, falling, each as likely as the others, and their weights
    w(t), of mean 1: see [`sample_timesteps`].
    """
    quantiles = (torch.arange(NUM_TRAIN_TIMESTEPS, 0, -1, dtype=torch.float64) - 0.5) / NUM_TRAIN_TIMESTEPS
    return sample_timesteps(preset, quantiles)


def sample_timesteps(preset: str, quantiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Timesteps at given quantiles of a preset's distribution, and their weights.

    Args:
        preset (`str`): `"refalign"` (shift 5, bump weights; RefAlign, arXiv 2603.25743: one of 1000 timesteps is
            drawn), `"logit_normal"` (Stable Diffusion 3, arXiv 2403.03206, section 3.1; shift 3, unweighted),
            `"bernini"` (its density for references, shift 4, unweighted; Bernini-R, arXiv 2605.22344) or `"uniform"`
            (shift 7, unweighted: most steps where layout and identity are decided; for tiny models).
        quantiles (`torch.Tensor` of shape `(batch,)`): numbers in [0, 1). The higher, the noisier.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(batch,)`, float32: timesteps in [0, 1000] and weights w(t).

    Raises:
        ValueError: for an unknown preset, or quantiles outside [0, 1).
    """
    if preset not in TIMESTEP_PRESETS:
        raise ValueError(f"The timestep preset is {preset!r}; known are {', '.join(TIMESTEP_PRESETS)}.")
    if ((quantiles < 0) | (quantiles >= 1)).any():
        raise ValueError(f"`quantiles` are from {quantiles.min():g} to {quantiles.max():g}, but must be in [0, 1).")
    quantiles, count = quantiles.double(), NUM_TRAIN_TIMESTEPS
    if preset == "refalign":
        sigmas = torch.arange(1, count + 1, dtype=torch.float64, device=quantiles.device) / count
        timesteps = count * shifted(sigmas, 5)
        bump = torch.exp(-2 * (timesteps / count - 0.5).square())
        weights = (bump - bump.min()) / (bump - bump.min()).mean()
        index = (quantiles * count).long()
        return timesteps[index].float(), weights[index].float()
    if preset == "logit_normal":
        sigmas = shifted(torch.special.ndtri(quantiles).sigmoid(), 3)
    elif preset == "bernini":
        # Grows with the quantile from 0 to 1, so that it maps quantiles to quantiles
        sigmas = shifted(quantiles + 1.29 * (quantiles - (torch.pi / 2 * quantiles).sin().square()), 4)
    else:
        sigmas = shifted(quantiles, 7)
    return (count * sigmas).float(), torch.ones_like(sigmas).float()


def shifted(sigmas: torch.Tensor, shift: float) -> torch.Tensor:
    """Stable Diffusion 3, arXiv 2403.03206, Eq. 23."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


# -- Reference alignment ----------------------------------------------------------------------------------------------


class AlignmentLoss(NamedTuple):
    """
    The reference alignment loss, each part of shape `(batch,)` and 0 for a sample that is not kept.

    `total` = `positive` + weight * `negative`. `cosine`, the mean cosine of a token and the teacher's own, and
    `active_negatives`, the share of pairs of different subjects inside the negative margin, carry no gradient.
    """

    total: torch.Tensor
    positive: torch.Tensor
    negative: torch.Tensor
    cosine: torch.Tensor
    active_negatives: torch.Tensor


def reference_alignment_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    tokens_per_reference: int | Sequence[int],
    *,
    positive_margin: float = 0.0,
    negative_margin: float = 1.0,
    negative_weight: float = 1.0,
    subject_ids: SubjectIds = None,
    keep: Keep = None,
) -> AlignmentLoss:
    """
    Pulls each reference token to the teacher's token of the same place and pushes it off those of other subjects
    (RefAlign, arXiv 2603.25743, reference alignment loss).

    With cos the cosine of a student's token i and a teacher's token j of the same sample:

        positive = mean over i of relu((1 - cos_ii) - positive_margin)
        negative = mean over (i, j) of different subjects of relu(negative_margin - (1 - cos_ij))

    Each token, and each pair of tokens, counts alike, so a reference of more tokens counts more.

    References are compared pair by pair, once in the forward pass and again in the backward pass: only the two
    arguments are held in between. Pairs of one subject are not computed at all.

    Args:
        student (`torch.Tensor` of shape `(batch, tokens of all references, dim)`): projected tokens.
        teacher (`torch.Tensor` of the same shape): the teacher's features. No gradient reaches them.
        tokens_per_reference (`int` or `Sequence[int]`): tokens of every reference, or of each of them.
        positive_margin (`float`, *optional*, defaults to 0): the distance to the own token that costs nothing.
        negative_margin (`float`, *optional*, defaults to 1): the distance to other subjects that costs nothing.
        negative_weight (`float`, *optional*, defaults to 1): the weight of `negative` in `total`.
        subject_ids (integers of shape `(references,)` or `(batch, references)`, *optional*): references of equal
            number show one subject and are not negatives of each other. By default each is a subject of its own. A
            tensor on the CPU, or a sequence, spares a wait for the GPU; the same holds for `keep`.
        keep (booleans of shape `(batch,)`, *optional*): `False` where a sample's references were dropped: its losses
            and its gradients are 0, whatever its tokens are.

    Returns:
        [`AlignmentLoss`], in float32 (float64 if `student` is), also under autocast.

    Raises:
        ValueError: if shapes do not fit each other.
    """
    _check_same_shape(student=student, teacher=teacher)
    counts = _token_counts(student, tokens_per_reference)
    margins = (positive_margin, negative_margin)
    samples = []
    with torch.autocast(student.device.type, enabled=False):
        normalized = _normalize(teacher.detach())
        for number, subjects in enumerate(_subjects(subject_ids, keep, len(student), len(counts))):
            students, teachers = student[number].split(counts), normalized[number].split(counts)
            samples.append(_sample_losses(students, teachers, subjects, margins))
    positive, negative, cosine, active_negatives = map(torch.stack, zip(*samples, strict=True))
    return AlignmentLoss(positive + negative_weight * negative, positive, negative, cosine, active_negatives)


def _token_counts(student: torch.Tensor, tokens_per_reference: int | Sequence[int]) -> list[int]:
    """The number of tokens of each reference."""
    tokens = student.shape[1] if student.ndim == 3 else 0
    if not isinstance(tokens_per_reference, int):
        counts = list(tokens_per_reference)
    elif tokens_per_reference < 1:
        counts = []
    else:
        counts = [tokens_per_reference] * (tokens // tokens_per_reference)
    if not counts or min(counts) < 1 or sum(counts) != tokens:
        raise ValueError(
            f"`student` has shape {tuple(student.shape)}, which is not (batch, references * tokens_per_reference, "
            f"dim) with `tokens_per_reference` = {tokens_per_reference}. Pass the tokens of whole references."
        )
    return counts


def _subjects(subject_ids: SubjectIds, keep: Keep, batch: int, references: int) -> list[list[int] | None]:
    """The subject of each reference of each sample; None for a sample that is not kept."""
    ids = torch.arange(references) if subject_ids is None else torch.as_tensor(subject_ids)
    if tuple(ids.shape) not in ((references,), (batch, references)):
        raise ValueError(
            f"`subject_ids` has shape {tuple(ids.shape)}, but must be ({references},) or ({batch}, {references}): "
            "one number per reference."
        )
    kept = torch.ones(batch, dtype=torch.bool) if keep is None else torch.as_tensor(keep)
    if tuple(kept.shape) != (batch,):
        raise ValueError(f"`keep` has shape {tuple(kept.shape)}, but must be ({batch},): one boolean per sample.")
    subjects: list[list[int] | None] = ids.expand(batch, -1).tolist()
    for number in (~kept.bool()).nonzero().flatten().tolist():
        subjects[number] = None
    return subjects


def _sample_losses(
    student: Sequence[torch.Tensor],
    teacher: Sequence[torch.Tensor],
    subjects: list[int] | None,
    margins: tuple[float, float],
) -> tuple[torch.Tensor, ...]:
    """The fields of [`AlignmentLoss`] but `total`, of each reference's tokens `(tokens, dim)`."""
    if subjects is None:
        zero = student[0][:0].sum(dtype=teacher[0].dtype)  # its gradient is there, and 0
        return zero, zero, zero.detach(), zero.detach()
    references, pairs = [], 0
    # Sizes relative to their mean: where references are of one size, they are 1
    sizes = [len(tokens) * len(student) / sum(map(len, student)) for tokens in student]
    for number, subject in enumerate(subjects):
        others = [i for i, other in enumerate(subjects) if other != subject]
        pairs += sizes[number] * sum(sizes[i] for i in others)
        known = [(teacher[i], sizes[i]) for i in others]
        arguments = (student[number], teacher[number], known, margins, sizes[number])
        # Computed again in the backward pass: the matrices of all references at once are large
        references.append(checkpoint(_reference_losses, *arguments, use_reentrant=False, preserve_rng_state=False))
    positive, negative, cosine, active = map(torch.stack, zip(*references, strict=True))
    pairs = pairs or 1
    return positive.mean(), negative.sum() / pairs, cosine.mean(), active.sum() / pairs


def _reference_losses(
    student: torch.Tensor,
    teacher: torch.Tensor,
    others: list[tuple[torch.Tensor, float]],
    margins: tuple[float, float],
    size: float,
) -> tuple[torch.Tensor, ...]:
    """
    A reference's tokens against the teacher's of the same places and against all of other subjects' references: the
    mean loss of the former, the sum over references of the mean loss of the latter, the mean cosine, and the sum over
    references of the share of active pairs; each times the relative sizes of the references it is of.
    """
    positive_margin, negative_margin = margins
    student = _normalize(student)
    cosines = (student * teacher).sum(-1)
    positive = (1 - cosines - positive_margin).relu().mean()
    negative = active = torch.zeros_like(positive)
    for other, other_size in others:
        excess = (student @ other.T).sub_(1 - negative_margin).relu_()
        negative = negative + size * other_size * excess.mean()
        active = active + size * other_size * excess.detach().sign().mean()
    return size * positive, negative, size * cosines.detach().mean(), active


def _normalize(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens of length 1, at least in float32. A token of zeros stays one, and has no direction to turn from."""
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    norms = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)
    return tokens * norms.masked_fill(norms == 0, math.inf).reciprocal()


def _check_same_shape(**tensors: torch.Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        named = ", ".join(f"`{name}` {shape}" for name, shape in shapes.items())
        raise ValueError(f"The shapes differ, but must be equal: {named}.")


def _check_a_sample(name: str, values: torch.Tensor, tensor: torch.Tensor) -> None:
    if tuple(values.shape) != (len(tensor),):
        raise ValueError(f"`{name}` has shape {tuple(values.shape)}, but must be ({len(tensor)},): one per sample.")
