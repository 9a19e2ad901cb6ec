"""How far a video is, how long it will take, and that it stops."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from refalign import RefAlignWanTransformer3DModel
from refalign.watch import Cancelled, count_flop, duration_in_words, watched
from refalign_training.run.estimate import ATTENTION


ARGUMENTS = {
    "prompt": "a dog",
    "reference_images": None,
    "height": 32,
    "width": 48,
    "num_frames": 5,
    "num_inference_steps": 3,
    "guidance_scale": 2.0,
    "image_guidance_scale": 3.0,
    "max_sequence_length": 16,
}


def run(pipeline, tell, is_stopped=lambda: False):
    with watched(pipeline, ARGUMENTS, tell, is_stopped):
        generator = torch.Generator().manual_seed(0)
        return pipeline(**ARGUMENTS, generator=generator, output_type="latent").frames


def test_it_tells_each_stage_and_never_goes_back(pipeline):
    told = []
    with watched(pipeline, ARGUMENTS, lambda *words: told.append(words)):
        pipeline(**ARGUMENTS, output_type="np")
    shares, words = zip(*told, strict=True)
    assert list(shares) == sorted(shares) and shares[0] >= 0 and shares[-1] < 1
    assert words[0] == "Reading the prompt"
    assert {"Step 1 of 3", "Step 3 of 3, less than 1 s left", "Making pictures, part 2 of 2"} <= set(words)


def test_watching_changes_nothing_and_leaves_nothing_behind(pipeline):
    generator = torch.Generator().manual_seed(0)
    plain = pipeline(**ARGUMENTS, generator=generator, output_type="latent").frames
    assert torch.equal(run(pipeline, lambda *_: None), plain)
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in networks(pipeline))


def networks(pipeline):
    return [pipeline.transformer, pipeline.text_encoder, pipeline.vae.encoder, pipeline.vae.decoder]


def test_it_stops_before_the_next_pass_and_the_next_call_is_whole(pipeline):
    told = []
    with pytest.raises(Cancelled):
        run(pipeline, lambda *words: told.append(words), is_stopped=lambda: len(told) > 3)
    assert len(told) == 4
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(
        run(pipeline, lambda *_: None), pipeline(**ARGUMENTS, generator=generator, output_type="latent").frames
    )


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "less than 1 s"), (12.3, "about 12 s"), (89.9, "about 90 s"), (150, "about 2 min")]
)
def test_times_are_told_as_people_do(seconds, words):
    assert duration_in_words(seconds) == words


def test_what_is_counted_is_what_torch_counts():
    """Two blocks of the 1.3B model, which torch runs without computing. Embeddings and the text's own layers are left
    out; they are few."""
    arguments = {**ARGUMENTS, "height": 240, "width": 416, "num_frames": 17, "max_sequence_length": 512}
    config = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 2}
    with torch.device("meta"):
        transformer = RefAlignWanTransformer3DModel(**config)
        inputs = torch.empty(1, 16, 5, 30, 52), torch.empty(1), torch.empty(1, 512, 4096)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter, torch.no_grad():
        transformer(*inputs)
    passes = 2 * arguments["num_inference_steps"]  # the null reference has no pass without references
    assert count_flop(config, arguments) == pytest.approx(passes * counter.get_total_flops(), rel=0.05)
