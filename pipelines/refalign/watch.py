"""A video on its way: how far it is, how long it will still take, and a way to stop it."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from refalign.pipeline_refalign_wan import FRAMES_PER_LATENT, TOKEN_PIXELS, guidance_passes


if TYPE_CHECKING:
    from refalign.pipeline_refalign_wan import RefAlignWanPipeline

# Reckoned, not measured: half of the peak of half an RTX Pro 6000 (ZeroGPU's `large`) in bfloat16
ASSUMED_FLOP_PER_SECOND = 60e12
SECONDS_PER_PIXEL = 4e-7  # of the VAE there, for a pixel of a frame: reckoned too
START_SECONDS = 15.0  # until the weights are on the GPU and the text is encoded
# Shares of the whole that the bar shows
ENCODING, DENOISING = 0.05, 0.9

Tell = Callable[[float, str], Any]


class Cancelled(Exception):
    """A video was stopped before it was complete."""


@contextmanager
def watched(
    pipeline: "RefAlignWanPipeline",
    arguments: Mapping[str, Any],
    tell: Tell,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """
    Inside this context, a call of the pipeline with these arguments (all that decide its work given) tells how far it
    is: a share of 1, and words. It ends with [`Cancelled`], before the next pass of a network, when it is to stop.
    """
    passes = arguments["num_inference_steps"] * len(_passes(arguments))
    frames = (arguments["num_frames"] - 1) // FRAMES_PER_LATENT + 1
    denoising = _Denoising(tell, arguments["num_inference_steps"], passes)
    decoding = _Decoding(tell, frames)
    stages = [
        (pipeline.vae.encoder, lambda: tell(0.0, "Reading the references"), None),
        (pipeline.text_encoder, lambda: tell(ENCODING / 2, "Reading the prompt"), None),
        (pipeline.transformer, denoising.begin, denoising.end),
        (pipeline.vae.decoder, decoding.begin, None),
    ]
    hooks = []
    for network, begin, end in stages:
        hooks.append(network.register_forward_pre_hook(partial(_begin, begin, is_stopped)))
        if end is not None:
            hooks.append(network.register_forward_hook(end))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _begin(tell: Callable[[], Any], is_stopped: Callable[[], bool], *_: Any) -> None:
    if is_stopped():
        raise Cancelled("The video was cancelled.")
    tell()


def _passes(arguments: Mapping[str, Any]) -> list[tuple[str, float]]:
    has_references = bool(arguments["reference_images"])
    scales = (arguments["guidance_scale"], arguments["image_guidance_scale"])
    return guidance_passes(*scales, has_references, bool(arguments.get("guidance_projection")))


class _Denoising:
    """Counts passes of one video, and reckons from those behind how long those ahead will take."""

    def __init__(self, tell: Tell, steps: int, passes: int) -> None:
        self.tell, self.steps, self.passes = tell, steps, passes
        self.done, self.first, self.since = 0, 0, 0.0

    def begin(self) -> None:
        if self.done == 0:
            self.tell(ENCODING, f"Step 1 of {self.steps}")

    def end(self, _network: Any, _inputs: Any, output: Any) -> None:
        self.done += len(output[0])  # small videos make the passes of a step as one batch
        now = time.monotonic()
        if self.first == 0:  # the first also waits for what is loaded late
            self.first, self.since = self.done, now
            return
        seconds = (now - self.since) / (self.done - self.first) * (self.passes - self.done)
        step = min(self.steps, self.done * self.steps // self.passes + 1)
        share = ENCODING + (DENOISING - ENCODING) * self.done / self.passes
        self.tell(share, f"Step {step} of {self.steps}, {duration_in_words(seconds)} left")


class _Decoding:
    """Counts the latent frames that are decoded."""

    def __init__(self, tell: Tell, frames: int) -> None:
        self.tell, self.frames, self.done = tell, frames, 0

    def begin(self) -> None:
        share = DENOISING + (1 - DENOISING) * min(1.0, self.done / self.frames)
        self.done += 1
        self.tell(share, f"Making pictures, part {min(self.done, self.frames)} of {self.frames}")


def duration_in_words(seconds: float) -> str:
    """A time that is reckoned, as people say it: "about 12 s"."""
    if seconds < 1:
        return "less than 1 s"
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min"


def count_flop(config: Mapping[str, Any], arguments: Mapping[str, Any]) -> float:
    """
    What the transformer's passes of a call compute, in floating-point operations: a multiplication and an addition
    for each weight and token, and attention's two products.

    Args:
        config (`Mapping`): the transformer's configuration.
        arguments (`Mapping`): the pipeline's call, with all that decides its work.
    """
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    per_frame = (arguments["height"] // TOKEN_PIXELS) * (arguments["width"] // TOKEN_PIXELS)
    frames = (arguments["num_frames"] - 1) // FRAMES_PER_LATENT + 1
    tokens = (frames + len(arguments["reference_images"] or ())) * per_frame
    text = arguments.get("max_sequence_length", 512)
    weights = 6 * dim**2 + 2 * dim * config["ffn_dim"]  # of a block, that each token meets
    attention = 2 * dim * (tokens + text)
    pass_flop = 2 * tokens * config["num_layers"] * (weights + attention)
    return float(pass_flop * len(_passes(arguments)) * arguments["num_inference_steps"])


def reckon_seconds(config: Mapping[str, Any], arguments: Mapping[str, Any]) -> float:
    """How long ZeroGPU may take for a call, from [`count_flop`] and an assumed speed."""
    pixels = arguments["height"] * arguments["width"] * arguments["num_frames"]
    denoising = count_flop(config, arguments) / ASSUMED_FLOP_PER_SECOND
    return START_SECONDS + denoising + pixels * SECONDS_PER_PIXEL
