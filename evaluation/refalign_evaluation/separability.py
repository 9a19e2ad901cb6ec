"""
How well the transformer's tokens of reference images tell subjects apart: what is read, and what is computed of it.

The tokens are the hidden states behind a block, in a call of the transformer as a generation makes it: one reference,
encoded as the pipeline encodes it, behind the video's latents; the prompt's embeddings; a timestep. The video is one
of which nothing is known: the mean of all latents (zeros), noised to that timestep with the same noise for all images.
So the reference is all that differs. At timestep 1000 this is exactly the first step of a generation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch


if TYPE_CHECKING:
    from PIL import Image

    from refalign.pipeline_refalign_wan import RefAlignWanPipeline


WHITE = 250  # from this value on, a pixel is the white that references are letterboxed on
MOST_FOLDS = 5
STRENGTHS = np.logspace(0, 4, 5)  # of the probe's regularisation, chosen within the images it is trained on


@dataclass(frozen=True)
class View:
    """An image of a subject, as the model sees it."""

    subject: int
    """Which subject, counted from 0."""
    image: "Image.Image"
    """RGB, of the video's size."""
    tokens: np.ndarray
    """Which of the transformer's tokens are read of it, as indices."""


@dataclass(frozen=True)
class Setting:
    """What the transformer is called with besides a reference."""

    prompt: str
    num_frames: int
    blocks: tuple[int, ...]
    timesteps: tuple[float, ...]
    seed: int


def subject_tokens(image: "Image.Image", patch: int) -> np.ndarray:
    """Which tokens, each of `patch` x `patch` pixels and counted row by row, show something that is not white."""
    pixels = np.asarray(image)
    rows, columns = pixels.shape[0] // patch, pixels.shape[1] // patch
    darkest = pixels.reshape(rows, patch, columns, patch * 3).min(axis=(1, 3))
    return np.flatnonzero(darkest < WHITE)


@torch.no_grad()
def read_tokens(
    pipeline: "RefAlignWanPipeline", views: Sequence[View], setting: Setting
) -> dict[tuple[int, float], list[np.ndarray]]:
    """
    The hidden states of the views' tokens.

    Returns:
        `dict`: by block and timestep, for each view an array `(tokens, dim)`, float32.

    Raises:
        ValueError: if hidden states are not finite.
    """
    found: dict[tuple[int, float], list[np.ndarray]] = {}
    for view, (timestep, states) in _calls(pipeline, views, setting):
        for block, state in zip(setting.blocks, states, strict=True):
            tokens = state[0].float().cpu().numpy()[view.tokens]
            if not np.isfinite(tokens).all():
                raise ValueError(
                    f"Behind block {block} at timestep {timestep:g}, hidden states are not finite: the model is "
                    "damaged, or --dtype is too narrow for it. Try --dtype float32."
                )
            found.setdefault((block, timestep), []).append(tokens)
    return found


def _calls(
    pipeline: "RefAlignWanPipeline", views: Sequence[View], setting: Setting
) -> Iterator[tuple[View, tuple[float, Sequence[torch.Tensor]]]]:
    device, dtype = pipeline._execution_device, pipeline.transformer.dtype
    width, height = views[0].image.size
    length = pipeline.call_defaults["max_sequence_length"]
    prompt, _ = pipeline.encode_prompt(
        setting.prompt, do_classifier_free_guidance=False, max_sequence_length=length, device=device
    )
    shape = pipeline._latents_shape(1, setting.num_frames, height, width)
    noise = pipeline.prepare_latents(shape, torch.Generator().manual_seed(setting.seed), None, device)
    for view in views:
        reference = pipeline.encode_reference(view.image, height, width).to(device, dtype)
        for timestep in setting.timesteps:
            output = pipeline.transformer(
                hidden_states=(timestep / 1000 * noise).to(dtype),
                timestep=torch.tensor([timestep], device=device),
                encoder_hidden_states=prompt.to(device, dtype),
                reference_hidden_states=reference,
                output_reference_layers=setting.blocks,
            )
            yield view, (timestep, output.reference_hidden_states)


# -- Figures ----------------------------------------------------------------------------------------------------------


def separability(tokens: Sequence[np.ndarray], subjects: Sequence[int], seed: int = 0) -> dict[str, float]:
    """
    How well tokens tell subjects apart.

    Args:
        tokens (`Sequence[np.ndarray]`): for each image, `(tokens, dim)`.
        subjects (`Sequence[int]`): each image's subject; of each there are two images or more.
        seed (`int`, *optional*, defaults to 0): which images are tested together.

    Returns:
        `dict`: `within` and `between`, mean cosines in [-1, 1] of tokens of two images of one subject and of two
        subjects, when the mean of all images is taken away; `gap`, the first less the second; `probe`, the share in
        [0, 1] of the tokens of images it has not seen, each subject counting alike, whose subject a linear
        classifier tells; `chance`, what it gets of tokens that tell nothing.
    """
    within, between = cosines(tokens, subjects)
    return {
        "within": within,
        "between": between,
        "gap": within - between,
        "probe": probe(tokens, subjects, seed),
        "chance": 1 / len(set(subjects)),
    }


def cosines(tokens: Sequence[np.ndarray], subjects: Sequence[int]) -> tuple[float, float]:
    """The mean cosine of tokens of two images of one subject, and of two subjects; see [`separability`]."""
    centre = np.mean([some.mean(0) for some in tokens], 0)
    # The mean cosine over all pairs of tokens of two images is the product of their mean unit vectors
    means = np.stack([_unit(some - centre).mean(0) for some in tokens])
    products = means @ means.T
    is_same = np.equal.outer(subjects, subjects)
    is_pair = ~np.eye(len(subjects), dtype=bool)
    return float(products[is_same & is_pair].mean()), float(products[~is_same].mean())


def _unit(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(norms, np.finfo(np.float32).tiny)


def probe(tokens: Sequence[np.ndarray], subjects: Sequence[int], seed: int = 0) -> float:
    """The cross-validated accuracy of a linear classifier of tokens; all tokens of an image are tested together."""
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.metrics import recall_score
    from sklearn.model_selection import PredefinedSplit, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    counts = [len(some) for some in tokens]
    labels = np.repeat(subjects, counts)
    split = PredefinedSplit(np.repeat(folds(subjects, seed), counts))
    classifier = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=STRENGTHS))
    told = cross_val_predict(classifier, np.concatenate(tokens), labels, cv=split)
    return float(recall_score(labels, told, average="macro"))


def folds(subjects: Sequence[int], seed: int) -> np.ndarray:
    """The fold in which each image is tested: each subject's images go round, so that none is missing in training."""
    generator = np.random.default_rng(seed)
    names, counts = np.unique(subjects, return_counts=True)
    number = min(MOST_FOLDS, counts.min())
    result = np.empty(len(subjects), dtype=int)
    for name in names:
        images = generator.permutation(np.flatnonzero(np.equal(subjects, name)))
        result[images] = np.arange(len(images)) % number
    return result


def project(tokens: Sequence[np.ndarray], method: str, seed: int = 0) -> np.ndarray:
    """All tokens in the plane, `(all tokens, 2)`, by `"tsne"` (of 50 principal components) or `"pca"`."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    points = np.concatenate(tokens)
    if method == "pca":
        return PCA(2, random_state=seed).fit_transform(points)
    components = min(50, *points.shape)
    points = PCA(components, random_state=seed).fit_transform(points)
    options: dict[str, Any] = {"perplexity": min(30, (len(points) - 1) / 3), "init": "pca", "random_state": seed}
    return TSNE(**options).fit_transform(points)
