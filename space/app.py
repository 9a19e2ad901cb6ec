"""The app in a browser: references and a prompt become a video. A Space on the Hub runs this file, `refalign app` does
so on one's own machine.

It holds what visitors see; what it does for them is done in `refalign`. `REFALIGN_MODEL` names the pipeline, a folder
or a Hub id; without it, the tiny one of drawn figures is taken.
"""

try:
    import spaces  # pyright: ignore[reportMissingImports] (first: on ZeroGPU it takes the place of parts of CUDA)
except ImportError:
    spaces = None

import html
import json
import logging
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from gradio.blocks import Block
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from refalign.command_line import one_line
from refalign.generate import Generate, check_options, kept_settings
from refalign.loading import load_pipeline
from refalign.pipeline_refalign_wan import FRAMES_PER_LATENT, TOKEN_PIXELS, RefAlignWanPipeline
from refalign.sprites import FOLDER
from refalign.video import read_settings, write_video
from refalign.visit import MAX_MEGABYTES, MAX_REFERENCES, Visit, can_cut_out, without_paths
from refalign.watch import Cancelled, reckon_seconds, watched


logger = logging.getLogger(__name__)

MAX_WAITING = 64  # videos in the queue; whoever comes then is told so
MAX_STEPS = 100
MAX_SCALE = 15
LONGEST_PROMPT = 2000  # characters
HOUR = 3600
# Worked examples: a title, a prompt, and subjects of the small world
EXAMPLES = (
    (
        "A star hops, a heart spins",
        "On the left one hops up and down, on the right one spins around, in a meadow.",
        ("crowned-star", "yellow-heart"),
    ),
    ("A ball slides at night", "It slides to the right at night.", ("dotted-ball",)),
    ("Two change places", "The two change places on a beach.", ("hatted-triangle", "striped-ball")),
    ("A square grows", "It grows in the snow.", ("red-square",)),
)
CUT_OUT_HINT = "Cut out people and things, leave places whole."
NO_CUT_OUT_HINT = (
    "People and things are best on a transparent background, places whole. This server cannot remove backgrounds."
)
CSS = """
.gradio-container { max-width: 1200px !important; margin: 0 auto; }
@media (max-width: 768px) { #columns { flex-direction: column; } #columns > * { min-width: 0 !important; } }
#references { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; }
#references > * { min-width: 0 !important; }
#references img { width: 100%; height: 100%; object-fit: contain; background: white; }
#kept { min-width: 0; }
#made video { width: 100%; max-height: 70vh; }
"""
THEME = gr.themes.Soft(
    font=["system-ui", "sans-serif"],  # of the visitor's machine: none is downloaded
    font_mono=["ui-monospace", "monospace"],
).set(
    # Gradio's own greys are too faint to read, and its white fields on white to see
    block_border_width="1px",
    block_border_color="*neutral_200",
    input_border_width="1px",
    input_border_color="*neutral_400",
    checkbox_border_color="*neutral_500",
    button_secondary_border_color="*neutral_300",
    button_border_width="1px",
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_700",
    button_primary_background_fill_dark="*primary_600",
    button_primary_background_fill_hover_dark="*primary_700",
)


# -- What gradio does by itself, and must not -------------------------------------------------------------------------
# In gradio 6.31 a visitor can have the server fetch a URL: by a file's path, in the value of any component, and by the
# routes `file=` and `proxy=`. There is no setting against it.


URL_ROUTE = re.compile("/proxy=|/file=https?:", re.IGNORECASE)


class RefuseUrls:
    """Answers requests for others' files with 403."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if URL_ROUTE.search(scope.get("path", "")):
            await PlainTextResponse("URLs are not fetched.", status_code=403)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def refuse_urls(demo: gr.Blocks) -> None:
    """Lets no component of the app take a URL in place of a file."""
    for block in demo.blocks.values():
        block.async_move_resource_to_block_cache = _only_files(block)


def _only_files(block: Block) -> Any:
    move = block.async_move_resource_to_block_cache

    async def move_file(path: str | Path | None) -> str | None:
        if "://" in str(path):
            raise gr.Error("URLs are not fetched. Send the file itself.", print_exception=False)
        return await move(path)

    return move_file


@contextmanager
def told() -> Iterator[None]:
    """Within it, or in what it decorates, an error becomes words for visitors: no path, no traceback, no HTML."""
    try:
        yield
    except gr.Error:
        raise
    except Cancelled as cancelled:
        raise gr.Error(str(cancelled), title="Cancelled", print_exception=False) from None
    except (ValueError, OSError, ImportError) as error:
        raise gr.Error(html.escape(without_paths(one_line(error))), print_exception=False) from None
    except Exception as error:
        logger.exception("A request failed")
        words = "Something went wrong on the server, which has noted it. Try again."
        if "out of memory" in str(error):
            words = "There is not enough memory for this: take a smaller size or fewer frames."
        raise gr.Error(words, print_exception=False) from None


# -- What visitors ask for --------------------------------------------------------------------------------------------


class Studio:
    """A pipeline, and what visitors have it do. `root` is a folder whose part `gradio` alone is served."""

    def __init__(self, pipeline: RefAlignWanPipeline, model: str | None, root: Path) -> None:
        self.pipeline, self.model, self.root = pipeline, model, root
        self.defaults = pipeline.call_defaults
        self.sizes = find_sizes(self.defaults["height"], self.defaults["width"])
        self.on_gpu = self.make if spaces is None else spaces.GPU(self.make, duration=self.reckon)

    # References

    def show(self, visit: Visit, size: str) -> list[Any]:
        """The updates of all that shows references."""
        height, width = read_size(size)
        updates: list[Any] = [visit, len(visit.references)]
        for place in range(MAX_REFERENCES):
            if place >= len(visit.references):
                updates += [gr.update(visible=False), None, gr.update(), gr.update()]
                continue
            reference = visit.references[place]
            label = "Cut out already" if reference.has_alpha else "Cut out"
            can_change = not reference.has_alpha and can_cut_out()
            updates += [
                gr.update(visible=True),
                gr.update(value=reference.seen(height, width, self.defaults["reference_long_edge"])),
                gr.update(value=reference.cut_out, label=label, interactive=can_change),
                gr.update(interactive=place > 0),
            ]
        return updates

    @told()
    def add(self, visit: Visit, files: list[str] | None, size: str) -> list[Any]:
        """Adds references: PNG, JPEG, WebP and other images, in this order, up to four in all."""
        for file in files or ():
            try:
                visit.add(file)
            except ValueError as error:
                gr.Warning(html.escape(str(error)), title="Not added")
        return [None, *self.show(visit, size)]

    @told()
    def take_example(self, number: int, visit: Visit, size: str) -> list[Any]:
        _, prompt, subjects = EXAMPLES[number]
        visit.take_subjects(subjects)
        return [prompt, *self.show(visit, size)]

    @told()
    def move_back(self, place: int, visit: Visit, size: str) -> list[Any]:
        if 0 < place < len(visit.references):
            visit.move_back(place)
        return self.show(visit, size)

    @told()
    def remove(self, place: int, visit: Visit, size: str) -> list[Any]:
        if place < len(visit.references):
            visit.remove(place)
        return self.show(visit, size)

    @told()
    def set_cut_out(self, place: int, visit: Visit, size: str, cut_out: bool) -> list[Any]:
        if place < len(visit.references):
            visit.references[place].cut_out = cut_out
        return self.show(visit, size)

    # Videos

    @told()
    def generate(
        self,
        visit: Visit,
        count: float,
        prompt: str,
        size: str,
        num_frames: float,
        steps: float,
        guidance_scale: float,
        image_guidance_scale: float,
        seed: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (gradio's own way)
    ) -> tuple[str, str, str]:
        """Makes a video of the references' subjects, and tells its settings."""
        if not prompt.strip():
            raise ValueError("The prompt is missing: write what happens in the video.")
        if int(count) != len(visit.references):
            raise ValueError("The references are gone after a long pause. Reload the page and add them again.")
        height, width = read_size(size)
        command = Generate(
            model=self.model,
            prompt=prompt.strip(),
            reference=tuple(reference.path.name for reference in visit.references),
            cut_out=tuple("true" if reference.cut_out else "false" for reference in visit.references),
            height=height,
            width=width,
            num_frames=int(num_frames),
            steps=int(steps),
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
            negative_prompt=self.defaults["negative_prompt"],
            guidance_projection=self.defaults["guidance_projection"],
            reference_long_edge=self.defaults["reference_long_edge"],
            seed=int(seed),
        )
        arguments: dict[str, Any] = check_options(command)
        arguments["reference_images"] = visit.seen(height, width, command.reference_long_edge) or None
        self.pipeline.check_inputs(**arguments)
        output = self.root / "gradio" / secrets.token_hex(16) / f"refalign-{command.seed}.mp4"
        since = time.monotonic()
        self.on_gpu(arguments, command, output, visit.stop_file)
        settings = json.dumps(read_settings(output), indent=2, ensure_ascii=False)
        return str(output), settings, f"Made in {time.monotonic() - since:.0f} s."

    @told()  # here too: of other errors, ZeroGPU's process tells this one no more than the class
    def make(self, arguments: dict[str, Any], command: Generate, output: Path, stop: Path) -> None:
        """What needs the GPU. On ZeroGPU it runs in a process of its own."""
        progress = gr.Progress()
        generator = torch.Generator().manual_seed(command.seed)
        with watched(self.pipeline, arguments, lambda share, text: progress(share, desc=text), stop.exists):
            frames = self.pipeline(**arguments, generator=generator, output_type="pil", return_dict=False)[0][0]
        write_video(frames, output, settings=kept_settings(command))

    def reckon(self, arguments: dict[str, Any], *_: Any) -> int:
        """How many seconds of the GPU ZeroGPU is asked for."""
        return round(1.25 * reckon_seconds(self.pipeline.transformer.config, arguments))

    def ready(self, visit: Visit) -> str:
        visit.stop_file.unlink(missing_ok=True)
        return "On its way ..."

    def cancel(self, visit: Visit) -> str:
        visit.stop_file.touch()
        return "Cancelled."


def find_sizes(height: int, width: int) -> list[tuple[str, str]]:
    """Sizes to choose from, as words and values: the model's own first, then others of about the same area, and of a
    quarter of it."""
    shapes = [width / height, height / width, 1.0, 3 / 2, 2 / 3]
    found = {f"{width}x{height}": f"{width} x {height}"}
    for area in (height * width, height * width / 4):
        for shape in shapes:
            w = max(1, round((area * shape) ** 0.5 / TOKEN_PIXELS)) * TOKEN_PIXELS
            h = max(1, round((area / shape) ** 0.5 / TOKEN_PIXELS)) * TOKEN_PIXELS
            found[f"{w}x{h}"] = f"{w} x {h}"
    return [(words, value) for value, words in found.items()]


def read_size(size: str) -> tuple[int, int]:
    """Height and width, in pixels, of a value of [`find_sizes`]."""
    width, _, height = size.partition("x")
    return int(height), int(width)


# -- What they see ----------------------------------------------------------------------------------------------------


def build(studio: Studio) -> gr.Blocks:
    """The page."""
    defaults = studio.defaults
    private: dict[str, Any] = {"api_visibility": "private"}
    with gr.Blocks(title="RefAlign", delete_cache=(HOUR // 6, HOUR), analytics_enabled=False) as demo:
        visit = gr.State(Visit(studio.root / "visits"), time_to_live=6 * HOUR, delete_callback=Visit.close)
        count = gr.Number(0, visible=False, label="References", precision=0)
        gr.Markdown(
            "# RefAlign\nYour pictures and a sentence become a video in which those very subjects act. "
            "Add pictures, look at what the model will see, say what happens."
        )
        with gr.Row(elem_id="columns"):
            with gr.Column():
                drop = gr.File(
                    label=f"1 to {MAX_REFERENCES} reference images",
                    file_count="multiple",
                    file_types=["image"],
                    height=180,
                )
                gr.Markdown(CUT_OUT_HINT if can_cut_out() else NO_CUT_OUT_HINT)
                with gr.Row(elem_id="references"):
                    cards = [_card(place) for place in range(MAX_REFERENCES)]
                prompt = gr.Textbox(
                    label="Prompt",
                    info="What happens, and where. Name the subjects as the pictures show them.",
                    lines=3,
                    max_length=LONGEST_PROMPT,
                    elem_id="prompt",
                )
                gr.Markdown("Or begin with an example:")
                with gr.Row():
                    examples = [gr.Button(title, size="sm", min_width=140) for title, _, _ in EXAMPLES]
                with gr.Accordion("Settings", open=False, elem_id="settings"):
                    settings = _settings(studio, defaults)
            with gr.Column():
                with gr.Row():
                    start = gr.Button("Generate", variant="primary")
                    cancel = gr.Button("Cancel", variant="stop")
                status = gr.HTML("", html_template='<p role="status">${value}</p>', elem_id="status")
                video = gr.Video(label="Video", autoplay=True, loop=True, elem_id="made", interactive=False)
                kept = gr.Code(
                    label="Settings of this video",
                    language="json",
                    interactive=False,
                    max_lines=20,
                    wrap_lines=True,
                    elem_id="kept",
                )
        size = settings[0]
        shown = [visit, count, *(part for card in cards for part in card[:4])]
        adding: dict[str, Any] = {"concurrency_limit": 2, "concurrency_id": "references"}
        drop.upload(
            studio.add, [visit, drop, size], [drop, *shown], api_name="add_references", show_progress_on=drop, **adding
        )
        size.change(told()(studio.show), [visit, size], shown, show_progress="hidden", **adding, **private)
        for number, button in enumerate(examples):
            button.click(_at(studio.take_example, number), [visit, size], [prompt, *shown], **adding, **private)
        for place, (_, _, cut_out, earlier, removal) in enumerate(cards):
            earlier.click(_at(studio.move_back, place), [visit, size], shown, **adding, **private)
            removal.click(_at(studio.remove, place), [visit, size], shown, **adding, **private)
            cut_out.input(_at(studio.set_cut_out, place), [visit, size, cut_out], shown, **adding, **private)
        ready = gr.on([start.click, prompt.submit], studio.ready, visit, status, queue=False, **private)
        making = ready.then(
            studio.generate,
            [visit, count, prompt, *settings],
            [video, kept, status],
            api_name="generate",
            concurrency_limit=1,
            concurrency_id="video",
            show_progress_on=video,
        )
        cancel.click(studio.cancel, visit, status, queue=False, **private)
        cancel.click(None, cancels=making)
    demo.queue(max_size=MAX_WAITING)
    refuse_urls(demo)
    return demo


def _card(place: int) -> tuple[gr.Column, gr.Image, gr.Checkbox, gr.Button, gr.Button]:
    """What shows a reference: the card, its picture, its switch, and what moves and removes it."""
    number = place + 1
    with gr.Column(visible=False, min_width=140, elem_id=f"reference-{number}") as card:
        gr.Markdown(f"**{number}**, as the model sees it")
        picture = gr.Image(
            show_label=False,
            alt_text=f"Reference {number}, as the model sees it",
            format="png",
            interactive=False,
            buttons=["fullscreen"],
            height=160,
        )
        cut_out = gr.Checkbox(label="Cut out")
        with gr.Row():
            earlier = gr.Button(f"Move {number} up", size="sm", min_width=100)
            removal = gr.Button(f"Remove {number}", size="sm", min_width=100)
    return card, picture, cut_out, earlier, removal


def _settings(studio: Studio, defaults: dict[str, Any]) -> list[Any]:
    """The size first, then the others in the order of [`Studio.generate`]."""
    frames, steps = defaults["num_frames"], defaults["num_inference_steps"]
    sizes = studio.sizes
    size = gr.Radio(sizes, value=sizes[0][1], label="Size", info="Width and height in pixels. Smaller is quicker.")
    return [
        size,
        gr.Slider(
            1, frames, frames, step=FRAMES_PER_LATENT, label="Frames", info="16 are a second. Fewer are quicker."
        ),
        gr.Slider(1, MAX_STEPS, steps, step=1, label="Steps", info="More are finer, and take longer."),
        gr.Slider(
            0,
            MAX_SCALE,
            defaults["guidance_scale"],
            step=0.5,
            label="Prompt guidance",
            info="How closely the video follows the prompt. Too much makes colours harsh.",
        ),
        gr.Slider(
            0,
            MAX_SCALE,
            defaults["image_guidance_scale"],
            step=0.5,
            label="Reference guidance",
            info="How closely it follows the pictures. Too much makes it stiff.",
        ),
        gr.Number(
            0, precision=0, minimum=0, maximum=2**32 - 1, label="Seed", info="Another seed gives another video."
        ),
    ]


def _at(handler: Any, place: int) -> Any:
    """A handler with its first argument given."""

    def handle(*values: Any) -> Any:
        return handler(place, *values)

    return handle


# -- Serving it -------------------------------------------------------------------------------------------------------


def load(model: str | None) -> RefAlignWanPipeline:
    """The pipeline, on the GPU if there is one. On ZeroGPU too: from this process on it looks as if there were."""
    name = model or str(FOLDER)
    if not torch.cuda.is_available() or torch.accelerator.is_available():
        return load_pipeline(name, base=None, loras=(), dtype="auto", device="auto", offload="none")
    pipeline = load_pipeline(name, base=None, loras=(), dtype="bfloat16", device="cpu", offload="none")
    return pipeline.to("cuda")


def serve(model: str | None = None, port: int | None = None) -> None:
    """
    Serves the app until it is interrupted.

    Args:
        model (`str`, *optional*): the pipeline, a folder or a Hub id; by default `REFALIGN_MODEL`'s, or the tiny one.
        port (`int`, *optional*): by default the first that is free from 7860 on.
    """
    model = model or os.environ.get("REFALIGN_MODEL") or None
    pipeline = load(model)
    pipeline.set_progress_bar_config(disable=True)
    with tempfile.TemporaryDirectory(prefix="refalign-app-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "gradio")  # ours alone, so that all of it can go
        demo = build(Studio(pipeline, model, Path(folder)))
        try:
            demo.launch(
                server_port=port,
                theme=THEME,
                css=CSS,
                max_file_size=f"{MAX_MEGABYTES}mb",
                footer_links=["api", "settings"],
                ssr_mode=False,
                app_kwargs={"middleware": [Middleware(RefuseUrls)]},
            )
        finally:
            demo.close(verbose=False)  # gradio does so after Ctrl-C alone


if __name__ == "__main__":
    serve()
