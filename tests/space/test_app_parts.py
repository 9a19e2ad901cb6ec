"""What the app does that no browser shows: errors in words for visitors, ZeroGPU, and a machine without gradio."""

from types import SimpleNamespace

import gradio as gr
import pytest
import torch

import refalign.cli
from refalign import RefAlignWanPipeline
from refalign.space import app
from refalign.sprites import FOLDER


@pytest.fixture(scope="module")
def pipeline() -> RefAlignWanPipeline:
    return RefAlignWanPipeline.from_pretrained(FOLDER)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("/tmp/x/cat<b>.png cannot be read."), "cat&lt;b&gt;.png cannot be read."),
        (torch.OutOfMemoryError("CUDA out of memory at 0x7f"), "There is not enough memory for this: take a smaller"),
        (KeyError("secret"), "Something went wrong on the server"),
    ],
)
def test_errors_are_words_for_visitors(error, words):
    with pytest.raises(gr.Error) as told, app.told():
        raise error
    assert told.value.message.startswith(words)
    assert "secret" not in told.value.message and "/tmp" not in told.value.message


def test_without_gradio_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(refalign.cli, "find_spec", lambda name: None)
    assert refalign.cli.main(["app"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        'refalign: The app needs gradio: `pip install "refalign[app]"`, in a clone `pip install ".[app]"`.'
    ]


def test_zero_gpu_is_asked_for_what_a_video_takes(pipeline, monkeypatch, tmp_path):
    asked = []

    def gpu(make, duration):
        def run(*arguments):
            asked.append(duration(*arguments))
            return make(*arguments)

        return run

    monkeypatch.setattr(app, "spaces", SimpleNamespace(GPU=gpu))
    studio = app.Studio(pipeline, None, tmp_path)
    visit = app.Visit(tmp_path / "visits")
    (video, *_) = studio.generate(visit, 0, "It grows in the snow.", "64x64", 1, 1, 3, 3, 0)
    assert video.endswith("refalign-0.mp4") and len(asked) == 1
    assert isinstance(asked[0], int) and 15 < asked[0] < 60


def test_more_work_is_given_more_time():
    config = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}
    small = {"height": 240, "width": 416, "num_frames": 33, "num_inference_steps": 20, "reference_images": [None]}
    small |= {"guidance_scale": 7.5, "image_guidance_scale": 5.0}
    seconds = [app.reckon_seconds(config, small | {"num_inference_steps": steps}) for steps in (10, 20, 40)]
    assert seconds[2] - seconds[1] == pytest.approx(2 * (seconds[1] - seconds[0]))
    assert app.reckon_seconds(config, small | {"num_frames": 81}) > 1.5 * seconds[1]


def test_sizes_begin_with_the_models_own_and_fit_its_tokens():
    sizes = [app.read_size(value) for _, value in app.find_sizes(480, 832)]
    assert sizes[0] == (480, 832) and (832, 480) in sizes and (240, 416) in sizes
    assert all(height % 16 == 0 and width % 16 == 0 for height, width in sizes)
    assert len(set(sizes)) == len(sizes)
