"""The aligned blocks' projectors, what the teacher's features go through, and how long the alignment lasts.

Projectors exist in training alone: they are saved in checkpoints, under their native keys, and absent from exports.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from refalign.keys import projector_key, projector_name
from refalign_training.method.losses import AlignmentLoss, Keep, SubjectIds, reference_alignment_loss


class AlignmentProjector(nn.Module):
    """A block's tokens to the teacher's width, token by token (RefAlign, arXiv 2603.25743): `projector="linear"`."""

    def __init__(self, dim: int, teacher_dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Linear(dim, dim // 2, bias=False), nn.SiLU(), nn.Linear(dim // 2, teacher_dim, bias=False)
        )

    def forward(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """`(batch, references * height * width, dim)` to the same with `teacher_dim`. The grid is not needed."""
        return self.proj(tokens)


class ConvAlignmentProjector(nn.Module):
    """One 3x3 convolution over each reference's grid (iREPA, arXiv 2512.10794): `projector="conv"`."""

    def __init__(self, dim: int, teacher_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, teacher_dim, kernel_size=3, padding=1)

    def forward(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """`(batch, references * height * width, dim)` to the same with `teacher_dim`; `grid` is (height, width)."""
        batch = len(tokens)
        images = tokens.reshape(-1, *grid, tokens.shape[-1]).permute(0, 3, 1, 2)
        return self.conv(images).permute(0, 2, 3, 1).reshape(batch, tokens.shape[1], -1)


PROJECTORS: dict[str, type[nn.Module]] = {"linear": AlignmentProjector, "conv": ConvAlignmentProjector}


class ReferenceAlignment(nn.Module):
    """
    The reference alignment loss over several blocks, with one projector per block (RefAlign, arXiv 2603.25743).

    The defaults are the paper's. Each layer is computed anew in the backward pass, so what it holds until then are the
    hidden states, which the transformer holds anyway, and the teacher's features.

    Args:
        dim (`int`): width of the transformer.
        teacher_dim (`int`): width of the teacher's features.
        layers (`Sequence[int]`, *optional*, defaults to the first nine): aligned blocks, counted from 0.
        projector (`str`, *optional*, defaults to `"linear"`): or `"conv"`.
        spatial_norm (`bool`, *optional*, defaults to `False`): whether to bring each channel of each reference's
            teacher features to mean 0 and deviation 1 over the grid (iREPA, arXiv 2512.10794).
        positive_margin, negative_margin, negative_weight (`float`, *optional*): see [`reference_alignment_loss`].

    Raises:
        ValueError: if there is no layer, one comes twice or is below 0, or the projector is unknown.
    """

    def __init__(
        self,
        dim: int,
        teacher_dim: int,
        layers: Sequence[int] = range(9),
        *,
        projector: Literal["linear", "conv"] = "linear",
        spatial_norm: bool = False,
        positive_margin: float = 0.0,
        negative_margin: float = 1.0,
        negative_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.layers = tuple(layers)
        if not self.layers or len(set(self.layers)) < len(self.layers) or min(self.layers) < 0:
            raise ValueError(f"`layers` is {self.layers}; name one or more blocks, counted from 0, each once.")
        if projector not in PROJECTORS:
            raise ValueError(f"`projector` is {projector!r}; known are {', '.join(PROJECTORS)}.")
        self.dim, self.teacher_dim = dim, teacher_dim
        self.spatial_norm = spatial_norm
        self.loss_options = {
            "positive_margin": positive_margin,
            "negative_margin": negative_margin,
            "negative_weight": negative_weight,
        }
        self.projectors = nn.ModuleDict({str(i): PROJECTORS[projector](dim, teacher_dim) for i in self.layers})

    def forward(
        self,
        reference_hidden_states: Sequence[torch.Tensor] | Sequence[Sequence[torch.Tensor]],
        teacher_features: torch.Tensor | Sequence[torch.Tensor],
        subject_ids: SubjectIds = None,
        keep: Keep = None,
    ) -> AlignmentLoss:
        """
        Args:
            reference_hidden_states (`Sequence`): for each of `layers`, in their order, the reference tokens after that
                block, `(batch, references * height * width, dim)`, or those of each reference, `(batch, height *
                width, dim)`: what [`RefAlignWanTransformer3DModel`] returns for `output_reference_layers=layers`.
            teacher_features (`torch.Tensor` of shape `(batch, references, height, width, teacher_dim)`, or a list of
                `(batch, height, width, teacher_dim)`, one of each reference, of any height and width):
                the teacher's features on the transformer's grid of tokens. No gradient reaches them.
            subject_ids, keep (*optional*): as in [`reference_alignment_loss`]. `keep` is `False` for samples whose
                references were dropped (the null reference): they cost nothing.

        Returns:
            [`AlignmentLoss`]: the losses are means over the layers; `cosine` and `active_negatives` have shape
            `(batch, layers)`.

        Raises:
            ValueError: if numbers or shapes do not fit each other.
        """
        layers: Any = reference_hidden_states
        if isinstance(teacher_features, torch.Tensor):  # references of one size are one part: projected at once
            parts = [teacher_features]
            layers = [(tokens,) for tokens in reference_hidden_states]
        else:
            parts = [features[:, None] for features in teacher_features]
        self._check(layers, parts)
        parts = [features.detach() for features in parts]
        if self.spatial_norm:
            parts = list(map(normalize_over_grid, parts))
        losses = []
        for projector, hidden_states in zip(self.projectors.values(), layers, strict=True):
            arguments = (projector, hidden_states, parts, subject_ids, keep)
            # Nothing in it is random, so there is no state of a generator to preserve
            losses.append(checkpoint(self._layer_loss, *arguments, use_reentrant=False, preserve_rng_state=False))
        total, positive, negative, cosine, active = (torch.stack(values, 1) for values in zip(*losses, strict=True))
        return AlignmentLoss(total.mean(1), positive.mean(1), negative.mean(1), cosine, active)

    def no_references(self, samples: int, device: torch.device) -> tuple[list[torch.Tensor], torch.Tensor]:
        """What to call it with for samples of which none is kept, and whose references have no tokens: one of zeros
        in each layer, and features of zeros."""
        # With a gradient, as tokens have: processes wait for each other's gradients in one order
        layers = [torch.zeros(samples, 1, self.dim, device=device, requires_grad=True) for _ in self.layers]
        return layers, torch.zeros(samples, 1, 1, 1, self.teacher_dim, device=device)

    def _layer_loss(
        self,
        projector: nn.Module,
        hidden_states: Sequence[torch.Tensor],
        parts: Sequence[torch.Tensor],
        subject_ids: SubjectIds,
        keep: Keep,
    ) -> AlignmentLoss:
        students, teachers, counts = [], [], []
        for tokens, features in zip(hidden_states, parts, strict=True):
            references, height, width = features.shape[1:4]
            # The transformer may be in bfloat16 and the projectors in float32; under autocast, that decides
            tokens = tokens.to(next(projector.parameters()).dtype)
            if keep is not None:  # not even what is not finite in a dropped sample may reach the projector's gradient
                is_dropped = ~torch.as_tensor(keep, dtype=torch.bool, device=tokens.device)
                tokens = tokens.masked_fill(is_dropped[:, None, None], 0)
            students.append(projector(tokens, (height, width)))
            teachers.append(features.flatten(1, 3))
            counts += [height * width] * references
        return reference_alignment_loss(
            torch.cat(students, dim=1),
            torch.cat(teachers, dim=1),
            counts,
            subject_ids=subject_ids,
            keep=keep,
            **self.loss_options,
        )

    def _check(self, hidden_states: Sequence[Sequence[torch.Tensor]], parts: Sequence[torch.Tensor]) -> None:
        if len(hidden_states) != len(self.layers):
            raise ValueError(
                f"There are hidden states of {len(hidden_states)} layers, but {len(self.layers)} are aligned. Ask the "
                f"transformer for `output_reference_layers={self.layers}`."
            )
        if len(parts) != len(hidden_states[0]):
            raise ValueError(
                f"`teacher_features` has {len(parts)} references, but there are tokens of {len(hidden_states[0])}. "
                "Compute the features for these references."
            )
        for features, tokens in zip(parts, hidden_states[0], strict=True):
            teacher, student = tuple(features.shape), tuple(tokens.shape)
            fits = len(teacher) == 5 and (teacher[0], math.prod(teacher[1:4])) == student[:2]
            if not fits or teacher[4] != self.teacher_dim:
                raise ValueError(
                    f"`teacher_features` has shape {teacher}; beside hidden states of shape {student} it must be "
                    f"(batch, references, height, width, {self.teacher_dim}) with {student[0]} samples of "
                    f"{student[1]} tokens. Compute the features for these references and this teacher."
                )

    def native_state_dict(self) -> dict[str, torch.Tensor]:
        """The projectors under their native keys ([`refalign.keys.projector_key`])."""
        return {projector_key(name): tensor for name, tensor in self.projectors.state_dict().items()}

    def load_native_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """
        Loads what [`~ReferenceAlignment.native_state_dict`] gives, or the projectors of a training checkpoint.

        Raises:
            ValueError: naming the keys that are missing, unknown, or whose tensors have another shape.
        """
        expected, problems = self.native_state_dict(), []
        for key in sorted(expected.keys() | state_dict.keys()):
            if key not in state_dict:
                problems.append(f"missing: {key}")
            elif key not in expected:
                problems.append(f"not known: {key}")
            elif state_dict[key].shape != expected[key].shape:
                shapes = f"{tuple(state_dict[key].shape)}, not {tuple(expected[key].shape)}"
                problems.append(f"of another shape: {key} {shapes}")
        if problems:
            told = "; ".join(problems)
            raise ValueError(f"The projectors do not fit layers {self.layers} ({told}). Check model and layers.")
        self.projectors.load_state_dict({projector_name(key): tensor for key, tensor in state_dict.items()})


def normalize_over_grid(features: torch.Tensor) -> torch.Tensor:
    """
    Brings each channel of each reference to mean 0 and deviation 1 over its grid (iREPA, arXiv 2512.10794): features
    `(batch, references, height, width, dim)` become float32 of the same shape.
    """
    features = features.float()
    deviation, mean = torch.std_mean(features, dim=(2, 3), correction=0, keepdim=True)
    return (features - mean) / (deviation + 1e-6)


def alignment_weight(
    step: int,
    *,
    weight: float = 1.0,
    decay_start: int | None = None,
    decay_steps: int = 0,
    stop_step: int | None = None,
) -> float:
    """
    The weight of the alignment at a training step, counted from 0; by default the same at all (RefAlign, arXiv
    2603.25743). Alignment helps early and can harm late (HASTE, arXiv 2505.16792), so it can end.

    Args:
        weight (`float`, *optional*, defaults to 1): the weight before any decay.
        decay_start (`int`, *optional*): the step from which the weight falls along half a cosine; `None`: never.
        decay_steps (`int`, *optional*, defaults to 0): the number of steps over which it falls to 0.
        stop_step (`int`, *optional*): the step from which the weight is 0; `None`: never.

    Raises:
        ValueError: for a number below 0.
    """
    for name, value in (("decay_start", decay_start), ("decay_steps", decay_steps), ("stop_step", stop_step)):
        if value is not None and value < 0:
            raise ValueError(f"`{name}` is {value}, but must be 0 or more.")
    if stop_step is not None and step >= stop_step:
        return 0.0
    if decay_start is None or step < decay_start:
        return weight
    if step >= decay_start + decay_steps:
        return 0.0
    return weight * (1 + math.cos(math.pi * (step - decay_start) / decay_steps)) / 2
