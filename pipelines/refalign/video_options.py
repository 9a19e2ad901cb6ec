"""What the commands that make videos have in common: the model, and what it makes them with."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import DisallowNone


@dataclass(frozen=True)
class SpeedOptions:
    """What makes a model smaller or faster, and what it computes a little different."""

    fast: str | None = None
    """Settings for speed at once: exact, balanced or fast. They take the place of options that are not given.
    docs/speed.md has the table, with what each costs."""
    guidance_gate: tuple[float, float] | None = None
    """Two shares of the steps, from 0 to 1, for speed: after the first the null pass is left out, after the second the
    reference pass too, and what they last added is added again. Without it, every step makes all its passes."""
    quantize: str | None = None
    """Keep the blocks' weights in fewer bits: int8 or fp8 (about half the memory of bfloat16), or a GGUF file of this
    model, whose weights are taken."""
    attention: str | None = None
    """The attention kernel, by diffusers' name, such as _flash_3_hub, sage_hub or _native_cudnn. The default is
    PyTorch's own choice."""
    trust_kernels: bool = False
    """Allow --attention to download a kernel from the Hub, which is code, and to run it."""
    compile: Annotated[bool | None, DisallowNone] = None
    """Compile the blocks. The first step takes a minute longer, the others less. By default --fast decides."""
    cache: str | None = None
    """Reuse what changes little from step to step: first-block, mag (after `refalign calibrate`) or taylorseer. A
    :VALUE behind it says how much: the largest error of first-block (0.05) and mag (0.06), the steps from one that is
    computed to the next of taylorseer (5)."""
    batch_passes: Annotated[bool | None, DisallowNone] = None
    """Make the passes of a step as one batch, which is the same up to rounding. By default where videos are so small
    that it is faster, up to 1,000 tokens."""
    vae_tiling: bool = False
    """Decode the video tile by tile, which takes less memory and more time."""


@dataclass(frozen=True)
class VideoOptions(SpeedOptions):
    """What a model makes videos with."""

    model: str | None = None
    """The pipeline that makes the video, as a folder or a Hub id. With --base it is a native checkpoint: a file
    (.safetensors or .gguf), a folder of shards or a Hub id. Without --model, the tiny one of drawn figures in this
    package is taken."""
    base: str | None = None
    """The Wan 2.1 pipeline, as a folder or a Hub id, whose VAE, text encoder and tokenizer complete a native
    checkpoint."""
    height: int | None = None
    """The height of the video in pixels, a multiple of 16. The default is the model's own: 480 for the published
    ones."""
    width: int | None = None
    """The width of the video in pixels, a multiple of 16. The default is the model's own: 832 for the published
    ones."""
    num_frames: int | None = None
    """The number of frames of the video, 4k + 1, which are shown at 16 per second. The default is the model's own: 81
    for the published ones."""
    steps: int | None = None
    """The number of denoising steps. The default is the model's own: 50 for the published ones."""
    seed: int = 0
    """The seed of the noise. The same seed gives the same video."""
    guidance_scale: float | None = None
    """How closely the video follows the prompt. The default is the model's own: 7.5 for the published ones."""
    image_guidance_scale: float | None = None
    """How closely the video follows the references. The default is the model's own: 5 for the published ones. With
    both scales at 1, as distilled LoRAs want it, a step takes one pass."""
    guidance_projection: tuple[float, float, float] | None = None
    """Adaptive projected guidance: eta, the share that is kept of what only makes colours stronger (1 is plain
    guidance), and the largest norms of the references' and of the prompt's guidance (0 is any). The default is the
    model's own: none for RefAlign's, 0.5 50 50 for Bernini-R."""
    reference_long_edge: int | None = None
    """The longer side of a reference in pixels at most, a multiple of 16, for models that read references in their own
    aspect. The default is the model's own: 848 for Bernini-R."""
    negative_prompt: str | None = None
    """A description of what the video should not show. The default is the model's own: Wan's for the published
    ones."""
    cut_out: tuple[Literal["auto", "true", "false"], ...] = ("auto",)
    """Whether subjects are cut out and put on white: one word for all references, or one for each. auto cuts them out
    if BiRefNet is on this machine."""
    lora: tuple[str, ...] = ()
    """The LoRAs to load, as .safetensors files or Hub ids. A :SCALE behind a name sets its strength."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """The dtype of the text encoder and the transformer. auto is bfloat16 on a GPU and float32 on a CPU. The VAE
    always runs in float32."""
    device: str = "auto"
    """The device to compute on: cuda, mps or cpu. auto is a GPU if there is one."""
    offload: Literal["none", "model", "group"] = "none"
    """How to need less memory on the GPU. model moves one part at a time there, group a few layers at a time."""
