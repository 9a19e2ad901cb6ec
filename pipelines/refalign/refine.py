"""`refalign refine`: a region of an image or a video that went wrong, made anew from a reference.

Nothing heavy is imported before it is needed, so that `--help` answers at once.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from refalign.files import check_new_file, fetch, new_file, read_json
from refalign.owner import owned
from refalign.sprites import REFINE_FOLDER


if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from refalign.pipeline_refine_by_align import Alignment, RefineByAlignPipeline

SIDE = 384  # the height of a panel of the map's picture, in pixels
GAP = 8
OUTLINE = (255, 0, 170)


@dataclass(frozen=True)
class Refine:
    """Make a masked region of an image, or of a video, anew from a reference. Outside the mask nothing changes."""

    mask: str
    """What went wrong, white on black, in the size of the image. For a video a picture (the same place in all frames,
    or moved by --track), a video, a folder with a picture for each frame, or auto, which only suggests masks and
    refines nothing."""
    reference: str
    """A picture of the subject as it is to be, as a path or URL; best cut out (with transparency) or on white."""
    output: Path
    """The image (.png, .jpg or .webp) or the video (.mp4) to write."""
    image: str | None = None
    """The image to refine, as a path or URL."""
    video: Path | None = None
    """The video to refine, in place of an image."""
    track: Path | None = None
    """For a video whose mask is a picture, of its first frame: a file with a box for each frame, as left, top, right
    and bottom in pixels. The mask is moved and scaled as the box is. A .json file holds a list, a CSV file a box per
    line."""
    map: Path | None = None
    """A picture to write: the image with the mask's outline, the reference with the map and the box of the region that
    was found, and the result."""
    model: str | None = None
    """The Refine-by-Align pipeline, as a folder or a Hub id. The default is the tiny one of drawn figures in this
    package."""
    reference_mask: str | None = None
    """Where the reference shows the subject, white on black, in its size, if it has no transparency."""
    region: tuple[int, int, int, int] | None = None
    """The region of the reference to take, as left, top, right and bottom in its pixels, in place of the one that the
    model finds."""
    steps: int | None = None
    """The number of denoising steps. The default is the model's own: 50."""
    guidance_scale: float | None = None
    """How strongly the reference guides. The default is the model's own: 5."""
    strength: float | None = None
    """For a video: how much of what the frame before shows in the mask is replaced, above 0 and at most 1. The default
    is 0.6."""
    seed: int = 0
    """The seed of the noise. The same seed gives the same image."""
    device: str = "auto"
    """The device to compute on: cuda, cuda:1, mps or cpu. auto takes this machine's accelerator if it has one."""
    offload: Literal["none", "model"] = "none"
    """What stays in main memory until it is needed, to save the accelerator's: nothing, or the parts that rest."""
    overwrite: bool = False
    """Replace files that exist."""


def run(command: Refine) -> int:
    """Refines and returns the exit code."""
    check(command)
    with owned(*written(command)):
        check_written(command)  # again: who had them may have made them
        reference = load_reference(command)
        return run_image(command, reference) if command.video is None else run_video(command, command.video, reference)


def run_image(command: Refine, reference: "Image.Image") -> int:
    import torch

    from refalign.pipeline_refine_by_align import check_mask, load_mask
    from refalign.reference_images import load_reference_image

    image = load_reference_image(command.image or "")
    mask = load_mask(command.mask, image.size)
    check_mask(mask)
    pipeline = load_refine_pipeline(command.model, command.device, command.offload)
    generator = torch.Generator().manual_seed(command.seed)
    output = pipeline(image, mask, reference, generator=generator, **call_settings(command))
    (result,), (alignment,) = output.images, output.alignments
    with new_file(command.output, command.overwrite) as file:
        saved(result, command.output).save(file, quality=95)
    print(f"Wrote {command.output}{told(alignment)}.")
    if command.map is not None:
        write_map(command, draw_sheet(image, mask, reference, alignment, result))
    return 0


def run_video(command: Refine, video: Path, reference: "Image.Image") -> int:
    from PIL import Image

    from refalign.refine_masks import read_masks
    from refalign.refine_video import flicker, read_clip, refine_frames
    from refalign.video import write_video

    frames, rate = read_clip(video)
    if command.mask == "auto":
        return suggest(command, frames, rate, reference)
    masks = read_masks(command.mask, video, frames.shape, command.track)
    pipeline = load_refine_pipeline(command.model, command.device, command.offload)
    pipeline.set_progress_bar_config(disable=True)
    options = {"seed": command.seed, **call_settings(command)}
    if command.strength is not None:
        options["strength"] = command.strength
    refined = refine_frames(pipeline, frames, masks, reference, **options)
    write_video(refined.frames, command.output, rate, overwrite=command.overwrite)
    print(f"Wrote {command.output}{told(refined.alignment)}.")
    flickers = f"{flicker(frames, masks):.2f} before, {flicker(refined.frames, masks):.2f} after"
    print(f"Flicker inside the mask, the mean difference of neighbouring frames (of 255): {flickers}.")
    if command.map is not None:
        key = refined.key_frame
        before_and_after = [Image.fromarray(array[key]) for array in (frames, refined.frames)]
        write_map(
            command, draw_sheet(before_and_after[0], masks[key], reference, refined.alignment, before_and_after[1])
        )
    return 0


def suggest(command: Refine, frames: "np.ndarray", rate: int, reference: "Image.Image") -> int:
    """Writes masks that may be meant, as a video to pass and as a picture to look at."""
    from refalign.refine_masks import suggest_masks
    from refalign.video import write_video

    masks_file, picture = written(command)
    pipeline = load_refine_pipeline(command.model, command.device, command.offload)
    masks = suggest_masks(pipeline, frames, reference)
    white = (masks[..., None].repeat(3, axis=-1) * 255).astype("uint8")
    write_video(white, masks_file, rate, overwrite=command.overwrite)
    with new_file(picture, command.overwrite) as file:
        draw_suggestion(frames, masks).save(file)
    print(f"Nothing is refined yet. {picture} shows what looks unlike the reference; if that is what went wrong, run")
    print(f"this again with --mask {masks_file}, else paint a mask.")
    return 0


def check(command: Refine) -> None:
    """Raises ValueError for options that do not go together, before anything is made or loaded."""
    if (command.image is None) == (command.video is None):
        raise ValueError("Pass --image FILE or --video FILE, one of the two.")
    endings = (".mp4",) if command.image is None else (".png", ".jpg", ".jpeg", ".webp")
    if command.output.suffix.lower() not in endings:
        raise ValueError(f"--output is {command.output}, but must end in {', '.join(endings)}.")
    if command.map is not None and command.map.suffix.lower() != ".png":
        raise ValueError(f"--map is {command.map}, but must end in .png.")
    if command.map is not None and command.map.resolve() == command.output.resolve():
        raise ValueError(f"--map and --output are both {command.map}. Name another file for one of them.")
    if command.image is not None and command.mask == "auto":
        raise ValueError("--mask auto looks at neighbouring frames, so it goes with --video alone. Pass a mask.")
    if command.track is not None and (command.video is None or command.mask == "auto"):
        raise ValueError("--track moves the mask of a video, so it goes with --video and a picture as --mask.")
    if command.strength is not None and (command.video is None or command.mask == "auto"):
        raise ValueError("--strength is for the frames of a video that are refined. Leave it out.")
    _check_numbers(command)
    _check_inputs_stay(command)
    check_written(command)


def _check_numbers(command: Refine) -> None:
    """Raises ValueError for what the pipeline would refuse once it is loaded."""
    if not -(2**63) <= command.seed < 2**64:
        raise ValueError(f"--seed is {command.seed}, more than 64 bits.")
    steps, scale, strength, region = command.steps, command.guidance_scale, command.strength, command.region
    if steps is not None and steps < 1:
        raise ValueError(f"--steps is {steps}, but must be 1 or more.")
    if scale is not None and not 0 <= scale < math.inf:
        raise ValueError(f"--guidance-scale is {scale}, but must be a number from 0 up.")
    if strength is not None and not 0 < strength <= 1:
        raise ValueError(f"--strength is {strength}, but must be above 0 and at most 1.")
    if region is not None and (min(region[:2]) < 0 or region[0] >= region[2] or region[1] >= region[3]):
        told = " ".join(map(str, region))
        raise ValueError(f"--region is {told}, but must be left, top, right and bottom of a box with something in it.")


def _check_inputs_stay(command: Refine) -> None:
    """Raises ValueError for an output that would take the place of an input, unless it is what is refined."""
    for file in written(command):
        inputs = [command.mask, command.reference, command.reference_mask, command.track]
        if file != command.output:  # which may take the place of what is refined
            inputs += [command.image, command.video]
        if file.resolve() in [Path(name).resolve() for name in inputs if name is not None]:
            raise ValueError(f"{file} is one of the files to read, and would be lost. Name another file to write.")


def check_written(command: Refine) -> None:
    """Raises ValueError for a file that exists, unless it may be replaced."""
    for file in written(command):
        if file.is_file() and not command.overwrite:
            raise ValueError(f"{file} exists already. Name another output, or pass --overwrite.")
        check_new_file(file, command.overwrite)


def written(command: Refine) -> list[Path]:
    """The files that a command writes, whose options are checked."""
    if command.mask == "auto":
        return [command.output.with_suffix(f".mask.{kind}") for kind in ("mp4", "png")]
    return [command.output] if command.map is None else [command.output, command.map]


def load_reference(command: Refine) -> "Image.Image":
    """The reference, with its mask as transparency if one is given."""
    from refalign.pipeline_refine_by_align import with_mask
    from refalign.reference_images import load_reference_image

    reference = load_reference_image(command.reference)
    return reference if command.reference_mask is None else with_mask(reference, command.reference_mask)


def load_refine_pipeline(model: str | None, device: str = "auto", offload: str = "none") -> "RefineByAlignPipeline":
    """
    The pipeline of a folder or a Hub id, in bfloat16 on an accelerator; by default the tiny one of this package.

    Raises:
        ValueError: if there is none, it is of another kind, or the device is not here.
    """
    if model is None and not (REFINE_FOLDER / "model_index.json").is_file():
        raise ValueError("Pass --model: this package has no Refine-by-Align model of its own.")
    name = str(REFINE_FOLDER) if model is None else model
    if model is None:
        print("No --model: taking the tiny one of this package, which knows drawn figures alone.")
    index = fetch(name, ("model_index.json",)) / "model_index.json"
    if not index.is_file():
        raise ValueError(f"{name} is not a pipeline folder: it has no model_index.json.")
    import torch

    from refalign.devices import find_device
    from refalign.pipeline_refine_by_align import RefineByAlignPipeline, check_is_refine_pipeline
    from refalign.transformer_refalign_wan import check_finite

    check_is_refine_pipeline(read_json(index), name)
    where = find_device(device)
    if offload == "model" and where.type == "cpu":
        raise ValueError("--offload model moves parts to a GPU, but the device is cpu. Use --offload none.")
    weights = torch.float32 if where.type == "cpu" else torch.bfloat16
    pipeline = RefineByAlignPipeline.from_pretrained(name, dtype={"default": weights, "vae": torch.float32})
    for part, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            check_finite(module.named_parameters(), f"The {part} of {name}")
    if offload == "model":
        pipeline.enable_model_cpu_offload(device=where)
        return pipeline
    return pipeline.to(where)


def call_settings(command: Refine) -> dict[str, Any]:
    """What a call of the pipeline takes of the options."""
    return {
        "region": command.region,
        "num_inference_steps": command.steps,
        "guidance_scale": command.guidance_scale,
    }


def told(alignment: "Alignment") -> str:
    """What was used of the reference, in words."""
    if alignment.confidence is None:
        return ""
    used = f"the region {', '.join(map(str, alignment.box))}"
    if alignment.uses_whole:
        used = "the whole reference"
    return f", from {used} (confidence {alignment.confidence:.2f})"


def saved(image: "Image.Image", output: Path) -> "Image.Image":
    """An image as its file can hold it: a JPEG has no transparency, so it is put on white."""
    from refalign.pipeline_refine_by_align import on_white

    return on_white(image) if output.suffix.lower() in (".jpg", ".jpeg") else image


def write_map(command: Refine, sheet: "Image.Image") -> None:
    """Writes the picture that `--map` asks for."""
    if command.map is not None:
        with new_file(command.map, command.overwrite) as file:
            sheet.save(file)
        print(f"Wrote {command.map}: the mask, the region that was found, and the result.")


def draw_sheet(
    image: "Image.Image", mask: "np.ndarray", reference: "Image.Image", alignment: "Alignment", result: "Image.Image"
) -> "Image.Image":
    """One picture: the image with the outline of its mask, bool `(height, width)`, the reference with the map and the
    box, and the result."""
    return _beside(_outlined(_panel(image), mask), _mapped(reference, alignment), _panel(result))


def draw_suggestion(frames: "np.ndarray", masks: "np.ndarray") -> "Image.Image":
    """One picture: three frames with the outlines of their masks."""
    import numpy as np
    from PIL import Image

    masked = np.flatnonzero(masks.any(axis=(1, 2)))
    shown = masked[np.linspace(0, len(masked) - 1, 3).round().astype(int)]
    return _beside(*[_outlined(_panel(Image.fromarray(frames[number])), masks[number]) for number in shown])


def _beside(*panels: "Image.Image") -> "Image.Image":
    from PIL import Image

    width = sum(panel.width + GAP for panel in panels) - GAP
    sheet = Image.new("RGB", (width, SIDE), "white")
    left = 0
    for panel in panels:
        sheet.paste(panel, (left, 0))
        left += panel.width + GAP
    return sheet


def _panel(image: "Image.Image") -> "Image.Image":
    from PIL import Image

    from refalign.pipeline_refine_by_align import on_white

    size = (max(1, round(image.width * SIDE / image.height)), SIDE)
    return on_white(image).resize(size, Image.Resampling.BICUBIC)


def _outlined(panel: "Image.Image", mask: "np.ndarray") -> "Image.Image":
    from PIL import Image, ImageChops, ImageFilter

    large = Image.fromarray(mask).convert("L").resize(panel.size, Image.Resampling.NEAREST)
    edge = ImageChops.subtract(large.filter(ImageFilter.MaxFilter(5)), large.filter(ImageFilter.MinFilter(3)))
    panel.paste(OUTLINE, (0, 0), edge)
    return panel


def _mapped(reference: "Image.Image", alignment: "Alignment") -> "Image.Image":
    """A reference with its map as a veil, and the box that is used."""
    import numpy as np
    from PIL import Image, ImageDraw

    panel = _panel(reference)
    if alignment.map is not None:
        veil = Image.fromarray(np.rint(alignment.map * 160).astype(np.uint8)).resize(panel.size)
        panel.paste(OUTLINE, (0, 0), veil)
    scale = panel.height / reference.height
    left, top, right, bottom = (round(value * scale) for value in alignment.box)
    ImageDraw.Draw(panel).rectangle((left, top, right - 1, bottom - 1), outline=OUTLINE, width=3)
    return panel
