"""What a pipeline does before and after its denoising steps, as bars."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tqdm import tqdm


if TYPE_CHECKING:
    import torch

    from refalign.pipeline_refalign_wan import RefAlignWanPipeline


@contextmanager
def showing_stages(pipeline: "RefAlignWanPipeline", arguments: Mapping[str, Any]) -> Iterator[None]:
    """Inside this context, a call of the pipeline with these arguments (all that decide its work given) shows the
    encoding of references and text and the decoding of the video, each as a bar that counts calls of its network."""
    from refalign.pipeline_refalign_wan import FRAMES_PER_LATENT, guidance_passes

    references = len(arguments["reference_images"] or ())
    scales = (arguments["guidance_scale"], arguments["image_guidance_scale"])
    passes = guidance_passes(*scales, references > 0, bool(arguments["guidance_projection"]))
    takes_negative = any(name != "full" for name, _ in passes)
    frames = (arguments["num_frames"] - 1) // FRAMES_PER_LATENT + 1
    stages = [
        _Stage(pipeline.vae.encoder, "Encoding references", references),
        _Stage(pipeline.text_encoder, "Encoding text", 1 + takes_negative),
        _Stage(pipeline.vae.decoder, "Decoding", frames),
    ]
    try:
        yield
    finally:
        for stage in stages:
            stage.close()


class _Stage:
    """A bar that counts a network's calls. It appears with the first one."""

    def __init__(self, network: "torch.nn.Module", name: str, total: int) -> None:
        self.name, self.total = name, total
        self.bar: tqdm | None = None
        self.hooks = (network.register_forward_pre_hook(self.begin), network.register_forward_hook(self.end))

    def begin(self, *_: Any) -> None:
        if self.bar is None:
            self.bar = tqdm(desc=self.name, total=self.total)

    def end(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.update()
            if self.bar.n == self.total:  # else the next bar would stand below it
                self.bar.close()

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()
        if self.bar is not None:
            self.bar.close()
