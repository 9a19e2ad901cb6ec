"""The losses of a training step, one value a sample, and the timesteps it is drawn at. Pure functions.

Shapes: `tokens` are those of one sample's references, one reference behind the other. Timesteps are in [0, 1000].
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable


NUM_TRAIN_TIMESTEPS = 1000
# Tokens of student and of teacher that are compared at once: large enough for a matrix product at full speed, small
# enough that a block, unlike all pairs of tokens, is small beside the tokens themselves
BLOCK_SIZE = 1024


# -- Flow matching ----------------------------------------------------------------------------------------------------


def add_noise(latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """
    x_t = (1 - sigma) x_0 + sigma noise, sigma = t / 1000 (flow matching, arXiv 2210.02747, on the straight path).

    Args:
        latents (`torch.Tensor` of shape `(batch, ...)`): clean latents, normalised.
        noise (`torch.Tensor` of the same shape): Gaussian noise.
        timestep (`torch.Tensor` of shape `(batch,)`): one a sample, in [0, 1000].

    Returns:
        `torch.Tensor`: noisy latents in the dtype of `latents`, computed in float32.

    Raises:
        ValueError: if the shapes do not fit each other.
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
    w(t) mean (v - (noise - x_0))^2, one value a sample (flow matching, arXiv 2210.02747, on the straight path).

    Args:
        velocity (`torch.Tensor` of shape `(batch, ...)`): what the model predicts.
        noise, latents (`torch.Tensor` of the same shape): the noise, and the clean latents it was added to.
        weights (`torch.Tensor` of shape `(batch,)`, *optional*): w(t), of [`sample_timesteps`]; 1 without.
        position_weights (`torch.Tensor` of shape `(batch, 1, frames, h, w)`, *optional*): how much each position
            counts, relative to the others of its sample; all alike without.

    Returns:
        `torch.Tensor` of shape `(batch,)`, float32.

    Raises:
        ValueError: if the shapes do not fit each other.
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


def detail(latents: torch.Tensor, threshold: float = 0.7) -> torch.Tensor:
    """
    Where latents differ from those at their left or right by more than a threshold, on average over the channels: at
    subjects, where places are smooth along a row.

    Args:
        latents (`torch.Tensor` of shape `(batch, channels, frames, h, w)`): clean and normalised.

    Returns:
        Booleans of shape `(batch, 1, frames, h, w)`.
    """
    step = latents.float().diff(dim=-1).abs().mean(1, keepdim=True)
    edges = torch.nn.functional.pad(step, (1, 1))
    return torch.maximum(edges[..., 1:], edges[..., :-1]) > threshold


def timestep_gate(timestep: torch.Tensor, power: float = 3) -> torch.Tensor:
    """
    (t / 1000)^power, the weight of the alignment at a timestep (RefAlign, arXiv 2603.25743, training objective).

    Args:
        timestep (`torch.Tensor` of shape `(batch,)`): in [0, 1000].
        power (`float`, *optional*, defaults to 3): 0 switches the gate off.

    Returns:
        `torch.Tensor` of shape `(batch,)`, float32.
    """
    return (timestep.float() / NUM_TRAIN_TIMESTEPS).pow(power)


# -- Timesteps --------------------------------------------------------------------------------------------------------


def timestep_table(preset: str) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The 1000 timesteps that stand for a preset's distribution, each as likely as the others, and their weights.

    Args:
        preset (`str`): `"refalign"` (shift 5, bump weights; RefAlign, arXiv 2603.25743: exactly these timesteps are
            drawn), `"logit_normal"` (Stable Diffusion 3, arXiv 2403.03206, section 3.1; shift 3, unweighted) or
            `"uniform"` (shift 7, unweighted: most steps where layout and identity are decided; for tiny models).

    Returns:
        `tuple` of two `torch.Tensor` of shape `(1000,)`, float32: timesteps, falling, and w(t), of mean 1.

    Raises:
        ValueError: for an unknown preset.
    """
    quantiles = (torch.arange(NUM_TRAIN_TIMESTEPS, 0, -1, dtype=torch.float64) - 0.5) / NUM_TRAIN_TIMESTEPS
    return sample_timesteps(preset, quantiles)


def sample_timesteps(preset: str, quantiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Timesteps at given quantiles of a preset's distribution, and their weights.

    Quantiles from the caller's own generator draw; (i + u_i) / batch instead stratifies a batch of the i-th samples.

    Args:
        preset (`str`): see [`timestep_table`].
        quantiles (`torch.Tensor` of shape `(batch,)`): in [0, 1). The higher, the noisier.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(batch,)`, float32: timesteps in [0, 1000] and weights w(t).

    Raises:
        ValueError: for an unknown preset, or quantiles outside [0, 1).
    """
    if preset not in TIMESTEP_PRESETS:
        raise ValueError(f"The timestep preset is {preset!r}; known are {', '.join(TIMESTEP_PRESETS)}.")
    if ((quantiles < 0) | (quantiles >= 1)).any():
        raise ValueError(f"`quantiles` are from {quantiles.min():g} to {quantiles.max():g}, but have to be in [0, 1).")
    timesteps, weights = TIMESTEP_PRESETS[preset](quantiles.double())
    return timesteps.float(), weights.float()


def _refalign(quantiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    count = NUM_TRAIN_TIMESTEPS
    timesteps = count * _shift(torch.arange(1, count + 1, dtype=torch.float64, device=quantiles.device) / count, 5)
    bump = torch.exp(-2 * (timesteps / count - 0.5).square())
    weights = (bump - bump.min()) / (bump - bump.min()).mean()
    index = (quantiles * count).long()
    return timesteps[index], weights[index]


def _logit_normal(quantiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    sigmas = _shift(torch.special.ndtri(quantiles).sigmoid(), 3)
    return NUM_TRAIN_TIMESTEPS * sigmas, torch.ones_like(sigmas)


def _uniform(quantiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    sigmas = _shift(quantiles, 7)
    return NUM_TRAIN_TIMESTEPS * sigmas, torch.ones_like(sigmas)


def _shift(sigmas: torch.Tensor, shift: float) -> torch.Tensor:
    """Stable Diffusion 3, arXiv 2403.03206, Eq. 23."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


TIMESTEP_PRESETS: dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "refalign": _refalign,
    "logit_normal": _logit_normal,
    "uniform": _uniform,
}


# -- Reference alignment ----------------------------------------------------------------------------------------------


class AlignmentLoss(NamedTuple):
    """
    What [`reference_alignment_loss`] returns, each of shape `(batch,)` and 0 for a sample that is not kept.

    `total` = `positive` + weight * `negative`. `cosine`, the mean cosine of a token to the teacher's own, and
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
    tokens_per_reference: int,
    *,
    positive_margin: float = 0.0,
    negative_margin: float = 1.0,
    negative_weight: float = 1.0,
    subject_ids: torch.Tensor | Sequence | None = None,
    keep: torch.Tensor | Sequence[bool] | None = None,
) -> AlignmentLoss:
    """
    Pulls each reference token to the teacher's token of the same place and pushes it off those of other subjects
    (RefAlign, arXiv 2603.25743, reference alignment loss).

    With cos the cosine of a student's token i and a teacher's token j of the same sample:

        positive = mean over i of relu((1 - cos_ii) - positive_margin)
        negative = mean over (i, j) of different subjects of relu(negative_margin - (1 - cos_ij))

    The pairs are compared block by block, once in the forward pass and again in the backward pass: what is held in
    between are the two arguments. Pairs of one subject are not computed at all.

    Args:
        student (`torch.Tensor` of shape `(batch, references * tokens_per_reference, dim)`): projected tokens.
        teacher (`torch.Tensor` of the same shape): the teacher's features. No gradient reaches them.
        tokens_per_reference (`int`): tokens of one reference.
        positive_margin (`float`, *optional*, defaults to 0): distance to the own token that costs nothing.
        negative_margin (`float`, *optional*, defaults to 1): distance to other subjects above which nothing costs.
        negative_weight (`float`, *optional*, defaults to 1): of `negative` in `total`.
        subject_ids (integers of shape `(references,)` or `(batch, references)`, *optional*): references of equal
            number show one subject and are no negatives to each other. Each is a subject of its own without. A
            tensor on the CPU, or a sequence, spares a wait for the GPU; so with `keep`.
        keep (booleans of shape `(batch,)`, *optional*): `False` where a sample's references were dropped: its losses
            and its gradients are 0, whatever its tokens are.

    Returns:
        [`AlignmentLoss`], in float32 (float64 if `student` is), also under autocast.

    Raises:
        ValueError: if shapes do not fit each other.
    """
    _check_same_shape(student=student, teacher=teacher)
    if student.ndim != 3 or tokens_per_reference < 1 or student.shape[1] % tokens_per_reference:
        raise ValueError(
            f"`student` has shape {tuple(student.shape)}, which is not (batch, references * tokens_per_reference, "
            f"dim) with `tokens_per_reference` = {tokens_per_reference}. Pass the tokens of whole references."
        )
    batch, references = student.shape[0], student.shape[1] // tokens_per_reference
    positive, negative, cosine, active_negatives = _BlockwiseAlignment.apply(
        student,
        teacher.detach(),
        tokens_per_reference,
        _subjects(subject_ids, keep, batch, references),
        positive_margin,
        negative_margin,
    )
    return AlignmentLoss(positive + negative_weight * negative, positive, negative, cosine, active_negatives)


def _subjects(subject_ids, keep, batch: int, references: int) -> list[list[int]]:
    """The subject of each reference of each sample; none for a sample that is not kept."""
    ids = torch.arange(references) if subject_ids is None else torch.as_tensor(subject_ids)
    if tuple(ids.shape) not in ((references,), (batch, references)):
        raise ValueError(
            f"`subject_ids` has shape {tuple(ids.shape)}, but has to be ({references},) or ({batch}, {references}): "
            "one number a reference."
        )
    kept = torch.ones(batch, dtype=torch.bool) if keep is None else torch.as_tensor(keep)
    if tuple(kept.shape) != (batch,):
        raise ValueError(f"`keep` has shape {tuple(kept.shape)}, but has to be ({batch},): one boolean a sample.")
    return [row if is_kept else [] for row, is_kept in zip(ids.expand(batch, -1).tolist(), kept.tolist(), strict=True)]


class _BlockwiseAlignment(torch.autograd.Function):
    """The means of [`reference_alignment_loss`], and their gradient to the student, from the same blocks."""

    @staticmethod
    def forward(ctx, student, teacher, tokens_per_reference, subjects, positive_margin, negative_margin):
        ctx.save_for_backward(student, teacher)
        ctx.settings = (tokens_per_reference, subjects, positive_margin, negative_margin)
        dtype = torch.promote_types(student.dtype, torch.float32)
        positive, negative, cosine, active = (student.new_zeros(len(subjects), dtype=dtype) for _ in range(4))
        with torch.autocast(student.device.type, enabled=False):
            for i, sample_subjects in enumerate(subjects):
                sample = _Sample(student[i], teacher[i], tokens_per_reference, sample_subjects, dtype)
                for subject, rows in sample.blocks:
                    student_rows, _ = sample.student_rows(rows)
                    own = sample.own_cosines(student_rows, rows)
                    cosine[i] += own.sum() / len(student[i])
                    positive[i] += (1 - own - positive_margin).relu().sum() / len(student[i])
                    for columns, excess in sample.negatives(student_rows, subject, negative_margin):
                        excess = excess.relu_()
                        negative[i] += (excess @ sample.teacher_scale[columns]).sum() / sample.num_negatives
                        active[i] += excess.gt_(0).sum() / sample.num_negatives
        ctx.mark_non_differentiable(cosine, active)
        return positive, negative, cosine, active

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_positive, grad_negative, *_):
        student, teacher = ctx.saved_tensors
        tokens_per_reference, subjects, positive_margin, negative_margin = ctx.settings
        grad_student = torch.zeros_like(student)
        with torch.autocast(student.device.type, enabled=False):
            for i, sample_subjects in enumerate(subjects):
                sample = _Sample(student[i], teacher[i], tokens_per_reference, sample_subjects, grad_positive.dtype)
                for subject, rows in sample.blocks:
                    student_rows, scale = sample.student_rows(rows)
                    gradient = torch.zeros_like(student_rows)
                    for columns, excess in sample.negatives(student_rows, subject, negative_margin):
                        # relu's gradient at each pair is 0 or 1: the sum of the teacher's tokens that cost something
                        is_active = excess.gt_(0).mul_(sample.teacher_scale[columns])
                        gradient.addmm_(is_active, sample.teacher[columns].to(gradient))
                    gradient *= grad_negative[i] / max(sample.num_negatives, 1)
                    is_far = 1 - sample.own_cosines(student_rows, rows) > positive_margin
                    pull = is_far * sample.teacher_scale[rows] * grad_positive[i] / len(student[i])
                    gradient.addcmul_(sample.teacher[rows].to(gradient), pull[:, None], value=-1)
                    # Through the normalisation: only what is at right angles to a token turns it
                    along = (gradient * student_rows).sum(-1, keepdim=True)
                    grad_student[i, rows] = gradient.addcmul_(student_rows, along, value=-1).mul_(scale[:, None])
        return grad_student, None, None, None, None, None


class _Sample:
    """The tokens of one sample, normalised and compared block by block; in a block all tokens show one subject."""

    def __init__(self, student, teacher, tokens_per_reference: int, subjects: list[int], dtype: torch.dtype):
        self.student, self.teacher = student, teacher
        norms = torch.linalg.vector_norm(teacher, dim=-1, dtype=dtype)
        self.teacher_norms = norms.masked_fill_(norms == 0, 1)  # a token of zeros has a cosine of 0 to all
        self.teacher_scale = self.teacher_norms.reciprocal()
        self.num_negatives = tokens_per_reference**2 * sum(a != b for a in subjects for b in subjects)
        size = math.ceil(tokens_per_reference / math.ceil(tokens_per_reference / BLOCK_SIZE))  # no small last block
        self.blocks: list[tuple[int, slice]] = []
        for reference, subject in enumerate(subjects):
            end = (reference + 1) * tokens_per_reference
            starts = range(reference * tokens_per_reference, end, size)
            self.blocks += [(subject, slice(start, min(start + size, end))) for start in starts]

    def student_rows(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised tokens, and by what they were multiplied for it."""
        norms = torch.linalg.vector_norm(self.student[rows], dim=-1, dtype=self.teacher_norms.dtype)
        scale = norms.reciprocal().masked_fill(norms == 0, 0)  # a token of zeros has no direction to turn from
        return self.student[rows] * scale[:, None], scale

    def own_cosines(self, student_rows: torch.Tensor, rows: slice) -> torch.Tensor:
        """Cosine of each student's token and the teacher's token of the same place."""
        return (student_rows * self.teacher[rows]).sum(-1) * self.teacher_scale[rows]

    def negatives(
        self, student_rows: torch.Tensor, subject: int, margin: float
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Other subjects' columns, and how far each pair with them is inside the margin: cos - (1 - margin), times the
        norm of the teacher's token, whose sign is the same and which spares a pass over the pairs."""
        for other, columns in self.blocks:
            if other != subject:
                bound = (margin - 1) * self.teacher_norms[columns]
                yield columns, torch.addmm(bound, student_rows, self.teacher[columns].to(student_rows).T)


def _check_same_shape(**tensors: torch.Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        named = ", ".join(f"`{name}` {shape}" for name, shape in shapes.items())
        raise ValueError(f"The shapes differ, but have to be equal: {named}.")


def _check_a_sample(name: str, values: torch.Tensor, tensor: torch.Tensor) -> None:
    if tuple(values.shape) != (len(tensor),):
        raise ValueError(f"`{name}` has shape {tuple(values.shape)}, but has to be ({len(tensor)},): one a sample.")
