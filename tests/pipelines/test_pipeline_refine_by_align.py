import logging

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from refalign import ReferenceProjector, RefineByAlignPipeline
from refalign.pipeline_refine_by_align import (
    Square,
    attention_map,
    cross_attention_blocks,
    cut_mask,
    cut_square,
    cut_surroundings,
    encode_patches,
    find_region,
    largest_parts,
    mask_square,
    on_white,
    prepare_reference,
    record_attention,
    reference_pixels,
    reference_square,
    square_around,
    subject_mask,
    unet_input,
)
from refalign.reference_images import bounding_box
from tests.tiny_refine import mask_of, picture, reference, tiny_refine_pipeline


BOX = (30, 20, 50, 45)


@pytest.fixture(scope="module")
def pipe():
    return tiny_refine_pipeline()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- Functions --


def test_block_9_of_stable_diffusion_is_where_the_paper_found_it():
    with torch.device("meta"):
        unet = UNet2DConditionModel(in_channels=9, cross_attention_dim=768)  # the defaults are Stable Diffusion 1.x's
    blocks = cross_attention_blocks(unet)
    assert len(blocks) == 16
    name, module = blocks[9]
    assert name == "up_blocks.1.attentions.2.transformer_blocks.0.attn2"
    assert module is unet.get_submodule(name)


def test_unet_input_has_the_order_of_the_inpainting_pipeline():
    parts = (torch.full((2, 4, 8, 8), 1.0), torch.full((2, 1, 8, 8), 2.0), torch.full((2, 4, 8, 8), 3.0))
    assert unet_input(*parts)[0, :, 0, 0].tolist() == [1.0] * 4 + [2.0] + [3.0] * 4


def test_the_projector_gives_tokens_of_the_unets_width(pipe):
    projector = pipe.reference_projector
    assert projector(torch.randn(2, 5, 16)).shape == (2, 5, 24)
    assert torch.equal(projector.null(2, 5), projector.null_embedding.expand(2, 5, 24))


def test_patches_are_the_last_tokens_alone(pipe):
    pixels = reference_pixels(torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8))
    with torch.no_grad():
        tokens = pipe.image_encoder(pixel_values=pixels).last_hidden_state
        patches = encode_patches(pipe.image_encoder, pixels)
    assert patches.shape == (2, 256, 16)
    assert torch.equal(patches, tokens[:, -256:])


def test_a_reference_is_its_subject_on_white_in_a_square():
    seen = np.asarray(prepare_reference(reference(), 64)[0])
    assert seen.shape == (64, 64, 3)
    assert tuple(seen[0, 0]) == (255, 255, 255)
    assert tuple(seen[32, 10]) == (200, 40, 40)  # the subject fills the square, but for a small margin


def test_white_parts_inside_a_subject_without_alpha_belong_to_it():
    image = on_white(reference())
    image.paste((255, 255, 255), (30, 18, 36, 24))
    assert subject_mask(image)[8:40, 20:52].all()
    assert subject_mask(image).sum() == 32 * 32


@pytest.mark.parametrize("box", [(0, 0, 4, 4), (90, 70, 96, 80), (10, 0, 30, 80), (0, 30, 96, 40)])
def test_the_square_around_a_mask_lies_in_the_image_where_it_fits(box):
    left, top, side = mask_square(np.asarray(mask_of(box)) > 0)
    assert left <= box[0] and top <= box[1] and left + side >= box[2] and top + side >= box[3]
    assert left >= 0 and left + side <= 96
    assert (top >= 0 and top + side <= 80) or side > 80


def test_beyond_the_image_its_edge_goes_on():
    image = picture((6, 4))
    values = np.asarray(image)
    wide = np.asarray(cut_surroundings(image, Square(-2, -3, 10), 10))
    assert np.array_equal(wide, np.pad(values, ((3, 3), (2, 2), (0, 0)), mode="edge"))
    inside = Square(1, 0, 4)
    assert np.array_equal(cut_surroundings(image, inside, 8), cut_square(image, inside, 8))


def test_a_mask_wider_than_the_image_is_high_is_refined_in_its_surroundings(pipe):
    size, box = (96, 40), (8, 10, 88, 30)
    image = picture(size)
    (sample,) = pipe._samples(image, mask_of(box, size), reference(), None)
    assert sample.square == (8, -20, 80)
    pixels, mask = pipe._pixels([sample])
    torch.testing.assert_close(pixels[0, :, 0], pixels[0, :, 12])  # the first row goes on above the image
    assert not mask[0, 0, :16].any()
    refined = pipe(image, mask_of(box, size), reference(), region="whole", num_inference_steps=1).images[0]
    changed = (np.asarray(refined) != np.asarray(image)).any(-1)
    assert changed.any()
    assert not changed[np.asarray(mask_of(box, size)) == 0].any()


def test_recorded_attention_is_plain_softmax_and_changes_nothing(pipe):
    module = cross_attention_blocks(pipe.unet)[5][1]
    hidden, tokens = torch.randn(2, 9, module.to_q.in_features), torch.randn(2, 6, 24)
    with torch.no_grad():
        expected = module(hidden, encoder_hidden_states=tokens)
        with record_attention(module) as recorded:
            found = module(hidden, encoder_hidden_states=tokens)
        query, key = module.to_q(hidden), module.to_k(tokens)
    heads = []
    for one, other in zip(query.chunk(module.heads, -1), key.chunk(module.heads, -1), strict=True):
        heads.append(torch.softmax(one @ other.transpose(1, 2) / one.shape[-1] ** 0.5, dim=-1))
    assert torch.equal(found, expected)
    torch.testing.assert_close(recorded[0], torch.stack(heads).mean(0))
    module(hidden, encoder_hidden_states=tokens)
    assert len(recorded) == 1  # nothing is recorded afterwards


def test_a_map_is_the_sum_over_the_masks_pixels():
    attention = torch.rand(1, 16, 6).softmax(-1)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:6, 4:8] = 1  # four whole cells of the 4 x 4 pixels
    cells = [6, 7, 10, 11]
    torch.testing.assert_close(attention_map(attention, mask, (2, 3)), attention[:, cells].sum(1).reshape(1, 2, 3))


def test_a_mask_smaller_than_a_cell_counts_as_one():
    attention = torch.rand(1, 16, 6).softmax(-1)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 0, 0] = 1
    torch.testing.assert_close(attention_map(attention, mask, (2, 3)), attention[:, 0].reshape(1, 2, 3))


def test_a_peak_becomes_a_region_with_confidence():
    map = torch.full((16, 16), 0.001)
    map[4:7, 8:12] = 1.0
    region = find_region(map, None, 64)
    left, top, right, bottom = region.box
    assert left <= 32 and top <= 16 and right >= 48 and bottom >= 28
    assert (right - left) * (bottom - top) < 0.2 * 64 * 64
    assert region.mask[20, 40] and not region.mask[50, 10]
    assert region.confidence > 0.8


def test_an_even_map_has_no_confidence():
    assert find_region(torch.ones(16, 16), None, 64).confidence == 0
    foreground = torch.zeros(16, 16)
    foreground[4:12, 4:12] = 1
    assert find_region(torch.ones(16, 16), foreground, 64).confidence < 0.01


@pytest.mark.parametrize("share_of_pixels", [0.3, 0.5, 0.7])
def test_the_largest_part_is_what_walking_from_pixel_to_pixel_finds(share_of_pixels):
    mask = torch.rand(40, 30, generator=seeded()) < share_of_pixels
    left, parts = {tuple(place) for place in mask.nonzero().tolist()}, []
    while left:
        part = open_ends = {left.pop()}
        while open_ends:
            around = {(row + i, column + j) for row, column in open_ends for i in (-1, 0, 1) for j in (-1, 0, 1)}
            open_ends = around & left
            left, part = left - open_ends, part | open_ends
        parts.append(part)
    found = largest_parts(mask, torch.ones(40, 30), share=1e-6)
    assert {tuple(place) for place in found.nonzero().tolist()} == max(parts, key=len)


def test_small_parts_of_a_map_are_left_out():
    map = torch.zeros(16, 16)
    map[2:8, 2:8] = 1
    map[13, 13] = 1
    assert not find_region(map, None, 64).mask[48:, 48:].any()


def test_a_blur_joins_the_spots_of_a_region():
    map = torch.zeros(16, 16)
    map[4:10:2, 4:10:2] = 1
    spots, joined = (find_region(map, None, 64, threshold=0.5, mass=0.1, blur=blur).mask for blur in (0, 1.5))
    assert spots.sum() < 100 and joined.sum() > 400


def test_a_blur_keeps_an_even_map_even():
    assert find_region(torch.ones(16, 16), None, 64, blur=2.0).confidence == 0


def test_the_background_of_a_reference_does_not_count():
    map = torch.zeros(16, 16)
    map[0:4, 0:4] = 5.0
    map[8:12, 8:12] = 1.0
    foreground = torch.ones(16, 16)
    foreground[0:4, 0:4] = 0
    assert bounding_box(find_region(map, foreground, 64).mask)[0] >= 28


# -- The pipeline --


def test_align_is_the_plain_formula_on_recorded_attention():
    pipe = tiny_refine_pipeline(alignment_block=6, alignment_seeds=1, alignment_step=1.0)
    mask = mask_of(BOX)
    found = pipe.attention_maps(picture(), mask, reference(), blocks=[6], generator=seeded())[0, 0, 0]

    module = cross_attention_blocks(pipe.unet)[6][1]
    calls = []
    handle = module.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    pipe.align(picture(), mask, reference(), generator=seeded())
    handle.remove()
    (args, kwargs) = calls[0]
    with torch.no_grad():
        query, key = module.to_q(args[0])[0], module.to_k(kwargs["encoder_hidden_states"])[0]
    total = 0
    for one, other in zip(query.chunk(module.heads, -1), key.chunk(module.heads, -1), strict=True):
        total = total + torch.softmax(one @ other.T / one.shape[-1] ** 0.5, dim=-1) / module.heads
    square = square_around(BOX, 2.5, (96, 80))
    weights = cut_mask(np.asarray(mask) > 0, square, 64).numpy()
    side = int(len(total) ** 0.5)
    cells = torch.tensor(weights.reshape(side, 64 // side, side, 64 // side).mean((1, 3))).flatten().float()
    plain = sum(weight * row for weight, row in zip(cells, total, strict=True)).reshape(16, 16)
    torch.testing.assert_close(found, plain)


def test_an_alignment_has_the_references_size(pipe):
    found = pipe.align(picture(), mask_of(BOX), reference(), generator=seeded())
    assert found.map.shape == found.mask.shape == (48, 72)
    assert 0 <= found.map.min() <= found.map.max() <= 1
    assert 0 <= found.confidence <= 1


def test_the_map_of_an_alignment_is_as_blurred_as_the_configuration_says(pipe, monkeypatch):
    map = torch.zeros(1, 16, 16)
    map[0, 4:10:2, 4:10:2] = 1
    monkeypatch.setattr(RefineByAlignPipeline, "_maps", lambda *_: map)
    spots = pipe.align(picture(), mask_of(BOX), reference())
    joined = tiny_refine_pipeline(map_blur=2.0).align(picture(), mask_of(BOX), reference())
    assert joined.mask.sum() > 2 * spots.mask.sum()


def test_a_map_lies_where_the_references_subject_is(pipe):
    sample = pipe._sample(picture(), mask_of(BOX), reference(), None)
    map = torch.zeros(16, 16)
    map[4:7, 11:14] = 1.0  # the blue dot of the reference
    map[5, 12] = 2.0
    found = pipe._alignment(sample, map)
    square = reference_square(sample.foreground)
    rows, columns = np.unravel_index(found.map.argmax(), found.map.shape)
    assert abs(columns - (square.left + 12.5 / 16 * square.side)) < 2
    assert abs(rows - (square.top + 5.5 / 16 * square.side)) < 2
    assert found.box[0] < columns < found.box[2] and found.box[1] < rows < found.box[3]
    assert not found.uses_whole


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_outside_the_mask_no_bit_changes(pipe, data):
    width, height = data.draw(st.integers(20, 100)), data.draw(st.integers(20, 100))
    left, top = data.draw(st.integers(0, width - 2)), data.draw(st.integers(0, height - 2))
    right, bottom = data.draw(st.integers(left + 1, width - 1)), data.draw(st.integers(top + 1, height))
    mask = mask_of((left, top, right, bottom), (width, height))
    image = picture((width, height))
    refined = pipe(image, mask, reference(), region="whole", num_inference_steps=1, guidance_scale=1.0).images[0]
    changed = (np.asarray(refined) != np.asarray(image)).any(-1)
    assert refined.size == image.size
    assert not (changed & (np.asarray(mask) == 0)).any()


def test_inside_the_mask_the_image_is_another(pipe):
    refined = pipe(picture(), mask_of(BOX), reference(), generator=seeded()).images[0]
    inside = np.asarray(mask_of(BOX)) > 0
    assert (np.asarray(refined) != np.asarray(picture())).any(-1)[inside].mean() > 0.9


def test_a_batch_gives_what_single_calls_give(pipe):
    images, masks = [picture(), picture((64, 64), 1)], [mask_of(BOX), mask_of((5, 5, 30, 20), (64, 64))]
    references = [reference(), on_white(reference((72, 60)))]
    batch = pipe(images, masks, references, generator=[seeded(1), seeded(2)])
    for number in range(2):
        single = pipe(images[number], masks[number], references[number], generator=seeded(number + 1))
        difference = np.abs(np.asarray(batch.images[number]).astype(int) - np.asarray(single.images[0]))
        assert difference.max() <= 1
        assert batch.alignments[number].box == single.alignments[0].box
        np.testing.assert_allclose(batch.alignments[number].map, single.alignments[0].map, atol=1e-3)


def test_one_reference_serves_all_images_of_a_batch(pipe):
    found = pipe.align([picture(), picture(seed=1)], mask_of(BOX), reference())
    assert len(found) == 2


@pytest.mark.parametrize("region", [(30, 8, 50, 30), mask_of((30, 8, 50, 30), (72, 48))])
def test_a_given_region_skips_the_alignment(pipe, region):
    output = pipe(picture(), mask_of(BOX), reference(), region=region, generator=seeded())
    assert output.alignments[0].box == (30, 8, 50, 30)
    assert output.alignments[0].map is None
    assert not output.alignments[0].uses_whole


def test_the_region_decides_what_is_painted(pipe):
    regions = [(20, 8, 36, 24), (36, 12, 50, 26), "whole"]
    arguments = {"guidance_scale": 1.0, "output_type": "latent"}
    painted = []
    for region in regions:
        output = pipe(picture(), mask_of(BOX), reference(), region=region, generator=seeded(), **arguments)
        painted.append(output.images)
    assert not torch.equal(painted[0], painted[1])
    assert not torch.equal(painted[0], painted[2])


def test_a_transparent_image_keeps_its_alpha(pipe):
    image = picture()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    refined = pipe(image, mask_of(BOX), reference(), region="whole", generator=seeded()).images[0]
    assert np.array_equal(np.asarray(refined)[..., 3], np.asarray(image)[..., 3])
    assert np.array_equal(np.asarray(refined)[60:], np.asarray(image)[60:])


def test_output_types_agree(pipe):
    outputs = {}
    for kind in ("pil", "np", "pt"):
        output = pipe(picture(), mask_of(BOX), reference(), region="whole", generator=seeded(), output_type=kind)
        outputs[kind] = output.images[0]
    assert np.array_equal(np.asarray(outputs["pil"]), np.rint(outputs["np"] * 255))
    assert np.array_equal(outputs["pt"].permute(1, 2, 0).numpy(), outputs["np"])
    latents = pipe(picture(), mask_of(BOX), reference(), region="whole", output_type="latent").images
    assert latents.shape == (1, 4, 16, 16)


def test_callbacks_see_and_change_the_latents(pipe):
    steps = []

    def zero(pipeline, step, timestep, tensors):
        steps.append(step)
        return {"latents": torch.zeros_like(tensors["latents"])}

    arguments = {"region": "whole", "num_inference_steps": 3, "output_type": "latent"}
    latents = pipe(picture(), mask_of(BOX), reference(), callback_on_step_end=zero, **arguments).images
    assert steps == [0, 1, 2]
    assert not latents.any()


def test_half_the_strength_makes_half_the_steps(pipe):
    steps = []
    arguments = {"region": "whole", "num_inference_steps": 4, "strength": 0.5}
    pipe(picture(), mask_of(BOX), reference(), callback_on_step_end=lambda *a: steps.append(a[1]), **arguments)
    assert len(steps) == 2


# -- Doors --


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("refine") / "model"
    pipe.save_pretrained(folder)
    return folder


def refine(pipe):
    pipe.set_progress_bar_config(disable=True)
    return np.asarray(pipe(picture(), mask_of(BOX), reference(), generator=seeded()).images[0])


def test_a_saved_pipeline_is_the_same_with_the_package(pipe, folder):
    loaded = RefineByAlignPipeline.from_pretrained(folder)
    assert type(loaded.reference_projector) is ReferenceProjector
    assert loaded.config["alignment_seeds"] == 2
    assert np.array_equal(refine(loaded), refine(pipe))


def test_a_saved_pipeline_is_the_same_by_the_code_it_carries(pipe, folder):
    loaded = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    modules = (type(loaded).__module__, type(loaded.reference_projector).__module__)
    assert not any(module.startswith("refalign") for module in modules)
    assert np.array_equal(refine(loaded), refine(pipe))


def test_a_pipeline_saved_by_the_code_it_carries_opens_with_the_package(folder, tmp_path):
    DiffusionPipeline.from_pretrained(folder, trust_remote_code=True).save_pretrained(tmp_path)
    assert {file.relative_to(tmp_path) for file in tmp_path.rglob("*.*")} == {
        file.relative_to(folder) for file in folder.rglob("*.*")
    }
    RefineByAlignPipeline.from_pretrained(tmp_path)


def test_a_saved_pipeline_does_not_tell_where_it_came_from(folder, tmp_path):
    RefineByAlignPipeline.from_pretrained(folder).save_pretrained(tmp_path)
    for file in tmp_path.rglob("*.json"):
        assert str(folder) not in file.read_text("utf-8")


@pytest.mark.parametrize("offload", ["model", "group leaf"])
def test_offload_changes_nothing(pipe, folder, offload):
    """On the CPU, so that only the moving is tried."""
    offloaded = RefineByAlignPipeline.from_pretrained(folder)
    if offload == "model":
        offloaded.enable_model_cpu_offload(device="cpu")
    else:
        offloaded.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    difference = np.abs(refine(offloaded).astype(int) - refine(pipe))
    assert difference.max() <= 1


def test_a_reference_to_video_pipeline_is_told(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": ["pipeline_refalign_wan", "RefAlignWanPipeline"]}')
    with pytest.raises(ValueError, match=r"is of a RefAlignWanPipeline, .*`refalign generate` takes it"):
        RefineByAlignPipeline.from_pretrained(tmp_path)


def test_other_formats_than_safetensors_are_not_written(pipe, tmp_path):
    with pytest.raises(ValueError, match="run code"):
        pipe.save_pretrained(tmp_path, safe_serialization=False)


def test_parts_that_do_not_fit_are_told(pipe):
    with pytest.raises(ValueError, match="goes from 8 to 24 channels, but the image encoder and the UNet have 16"):
        RefineByAlignPipeline(**{**pipe.components, "reference_projector": ReferenceProjector(8, 24)})
    with pytest.raises(ValueError, match="has 4 input channels, but Refine-by-Align needs 9"):
        RefineByAlignPipeline(**{**pipe.components, "unet": unet_with(pipe, in_channels=4)})
    with pytest.raises(ValueError, match="and the UNet predicts 8: both must be 4"):
        RefineByAlignPipeline(**{**pipe.components, "unet": unet_with(pipe, out_channels=8)})
    with pytest.raises(ValueError, match="have 16 and 32"):
        RefineByAlignPipeline(**{**pipe.components, "unet": unet_with(pipe, cross_attention_dim=32)})


def unet_with(pipe, **changes):
    return UNet2DConditionModel.from_config({**pipe.unet.config, **changes})


# -- Bad input --


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mask_image": mask_of((0, 0, 0, 0))}, "The mask is empty"),
        ({"mask_image": mask_of((0, 0, 96, 80))}, "covers the whole image"),
        ({"mask_image": mask_of(BOX, (80, 80))}, "The mask is 80x80, but its image 96x80"),
        ({"reference_image": Image.new("RGB", (40, 40), "white")}, "shows no subject"),
        ({"reference_mask": mask_of(BOX)}, "The reference's mask is 96x80"),
        ({"image": [picture()], "reference_image": [reference()] * 2}, "different lengths"),
        ({"region": (30, 8, 90, 30)}, "inside the reference's 72x48"),
        ({"generator": [seeded()] * 2}, "2 entries for 1 images"),
        ({"num_inference_steps": 0}, "`num_inference_steps`"),
        ({"guidance_scale": float("nan")}, "`guidance_scale`"),
        ({"strength": 0}, "`strength`"),
        ({"output_type": "jpg"}, "`output_type`"),
    ],
)
def test_bad_inputs_are_told(pipe, changes, words):
    arguments = {"image": picture(), "mask_image": mask_of(BOX), "reference_image": reference()}
    with pytest.raises(ValueError, match=words):
        pipe(**{**arguments, **changes})


def test_an_unknown_block_is_told():
    pipe = tiny_refine_pipeline(alignment_block=10)
    with pytest.raises(ValueError, match="no cross-attention 10: they are 0 to 9"):
        pipe.align(picture(), mask_of(BOX), reference())


def test_a_scheduler_that_would_cut_latents_is_told(pipe, caplog):
    with caplog.at_level(logging.WARNING):
        RefineByAlignPipeline(**pipe.components)
        assert "clip_sample" not in caplog.text
        RefineByAlignPipeline(**{**pipe.components, "scheduler": DDIMScheduler(clip_sample=True)})
    assert "clip_sample, which cuts latents at 1. Set it to false in scheduler/scheduler_config.json" in caplog.text


def test_grey_of_a_mask_is_cut_at_half_and_told(pipe, caplog):
    grey = mask_of(BOX)
    grey.paste(100, (0, 0, 10, 10))
    with caplog.at_level(logging.WARNING):
        image = pipe(picture(), grey, reference(), region="whole").images[0]
    assert np.array_equal(np.asarray(image)[:10, :10], np.asarray(picture())[:10, :10])
    assert "The mask has grey values" in caplog.text


def test_a_low_confidence_is_told_and_the_whole_reference_used(caplog):
    pipe = tiny_refine_pipeline(min_confidence=1.0)
    with caplog.at_level(logging.WARNING):
        found = pipe.align(picture(), mask_of(BOX), reference())
    assert found.uses_whole and found.box == (0, 0, 72, 48)
    assert "was not found in the reference" in caplog.text


def test_at_real_sizes_block_9_sees_the_image_and_the_reference_as_16_by_16():
    """Stable Diffusion 1.x's levels and DINOv2's patches, with few channels."""
    unet = UNet2DConditionModel(
        in_channels=9, block_out_channels=(4, 4, 4, 4), norm_num_groups=2, attention_head_dim=2, cross_attention_dim=8
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=2,
    )
    encoder = Dinov2Model(Dinov2Config(image_size=518, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    pipe = RefineByAlignPipeline(vae, unet, encoder, ReferenceProjector(8, 8), DDIMScheduler(), alignment_seeds=1)
    with record_attention(cross_attention_blocks(unet)[9][1]) as recorded:
        maps = pipe.attention_maps(picture((832, 480)), mask_of((300, 200, 360, 240), (832, 480)), reference())
    assert recorded[0].shape == (1, 256, 256)
    assert maps.shape == (1, 16, 1, 16, 16)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"image_size": "big"}, "image_size of model_index.json is 'big': it must be a whole number of 8 or more"),
        ({"image_size": 66}, "image_size of model_index.json is 66, but the VAE takes steps of 4 .* such as 64"),
        ({"reference_size": 63}, "reference_size of model_index.json is 63, but the image encoder .* such as 64"),
        ({"alignment_seeds": 0}, "alignment_seeds of model_index.json is 0"),
        ({"map_threshold": None}, "map_threshold of model_index.json is None: it must be a number from 0 to 1"),
        ({"map_blur": -1}, "map_blur of model_index.json is -1: it must be a number of 0 or more"),
        ({"crop_scale": float("nan")}, "crop_scale of model_index.json is nan: it must be a number of 1 or more"),
    ],
)
def test_a_setting_that_cannot_be_is_told_when_the_pipeline_is_made(settings, told):
    with pytest.raises(ValueError, match=told):
        tiny_refine_pipeline(**settings)
