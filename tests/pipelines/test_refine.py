"""`refalign refine` and `refalign refine init`, as their users call them."""

import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from refalign import RefAlignWanPipeline, RefineByAlignPipeline
from refalign.cli import main
from refalign.files import read_headers, read_json
from refalign.refine import draw_sheet, load_refine_pipeline
from tests.tiny_refine import mask_of, picture, reference, tiny_refine_pipeline


BOX = (30, 20, 50, 45)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refine") / "model"
    tiny_refine_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    picture().save(folder / "image.png")
    mask_of(BOX).save(folder / "mask.png")
    reference().save(folder / "reference.png")
    return folder


@pytest.fixture
def refine(folder, pictures, tmp_path):
    """Runs `refalign refine` and returns its exit code."""

    def run(*words, model=folder, output="refined.png", **files):
        names = {"image": "image.png", "mask": "mask.png", "reference": "reference.png", **files}
        for option, file in names.items():
            words += (f"--{option}", str(pictures / file)) if file is not None else ()
        words += ("--model", str(model)) if model is not None else ()
        return main(["refine", *map(str, words), "--output", str(tmp_path / output), "--device", "cpu"])

    return run


def test_an_image_is_refined_and_the_map_drawn(refine, tmp_path, capsys):
    assert refine("--map", tmp_path / "map.png") == 0
    refined, original = np.asarray(Image.open(tmp_path / "refined.png")), np.asarray(picture())
    changed = (refined != original).any(-1)
    assert changed.any()
    assert not changed[np.asarray(mask_of(BOX)) == 0].any()
    assert Image.open(tmp_path / "map.png").height == 384
    assert f"Wrote {tmp_path / 'refined.png'}, from the " in capsys.readouterr().out


def test_the_command_gives_what_the_pipeline_gives(refine, folder, tmp_path):
    assert refine("--region", 20, 8, 52, 40, "--steps", 1, "--guidance-scale", 2, "--seed", 3) == 0
    pipeline = RefineByAlignPipeline.from_pretrained(folder)
    arguments = {"region": (20, 8, 52, 40), "num_inference_steps": 1, "guidance_scale": 2}
    generator = torch.Generator().manual_seed(3)
    expected = pipeline(picture(), mask_of(BOX), reference(), generator=generator, **arguments).images[0]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "refined.png")), np.asarray(expected))


def test_the_map_shows_mask_box_and_map():
    pipe = tiny_refine_pipeline()
    output = pipe(picture(), mask_of(BOX), reference(), region=(20, 8, 52, 40), num_inference_steps=1)
    mask = np.asarray(mask_of(BOX)) > 0
    sheet = np.asarray(draw_sheet(picture(), mask, reference(), output.alignments[0], output.images[0]))
    pink = (sheet == (255, 0, 170)).all(-1)
    scale = 384 / 80
    assert pink[round(20 * scale) : round(45 * scale), round(30 * scale)].mean() > 0.9  # the left side of the mask
    first, scale = round(96 * scale) + 8, 384 / 48
    assert pink[round(8 * scale) + 5 : round(40 * scale) - 5, first + round(20 * scale)].all()  # of the region's box


@pytest.mark.parametrize("kind", ["cmyk", "exif", "16 bit"])
def test_images_of_every_kind_are_read_as_references_are(refine, pictures, tmp_path, kind):
    file, expected = pictures / f"{kind}.tif", picture()
    if kind == "cmyk":
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        expected.convert("CMYK").save(file, icc_profile=profile)
        expected = expected.convert("CMYK").convert("RGB")
    elif kind == "exif":
        turned = expected.transpose(Image.Transpose.ROTATE_90)
        exif = turned.getexif()
        exif[0x0112] = 6
        turned.save(file, exif=exif)
    else:
        grey = np.asarray(expected.convert("L"))
        Image.fromarray(grey.astype(np.uint16) * 257).save(file)
        expected = Image.fromarray(grey).convert("RGB")
    assert refine("--region", 20, 8, 52, 40, "--steps", 1, image=file.name) == 0
    outside = np.asarray(mask_of(BOX)) == 0
    refined = np.asarray(Image.open(tmp_path / "refined.png"))
    assert np.array_equal(refined[outside], np.asarray(expected)[outside])


def test_transparency_is_kept_in_png_and_put_on_white_in_jpeg(refine, pictures, tmp_path):
    image = picture()
    image.putalpha(mask_of((0, 0, 60, 60)))
    image.save(pictures / "transparent.png")
    arguments = ("--region", 20, 8, 52, 40, "--steps", 1)
    assert refine(*arguments, image="transparent.png") == 0
    assert refine(*arguments, image="transparent.png", output="refined.jpg") == 0
    assert Image.open(tmp_path / "refined.png").getchannel("A").getpixel((70, 70)) == 0
    assert min(Image.open(tmp_path / "refined.jpg").getpixel((80, 70))) > 250


# -- Bad input --


@pytest.mark.parametrize(
    ("words", "files", "told"),
    [
        ((), {"image": None}, "Pass --image FILE or --video FILE"),
        ((), {"output": "refined.gif"}, "must end in .png"),
        (("--map", "map.jpg"), {}, "--map is map.jpg, but must end in .png"),
        ((), {"mask": "reference.png"}, "The mask is 72x48, but its image 96x80"),
        ((), {"mask": "missing.png"}, "missing.png does not exist"),
        ((), {"mask": "empty.png"}, "The mask is empty"),
        ((), {"mask": "full.png"}, "covers the whole image"),
        (("--region", 0, 0, 100, 10), {}, "`region` is (0, 0, 100, 10)"),
        (("--region", 5, 0, 5, 10), {}, "--region is 5 0 5 10, but must be"),
        (("--steps", 0), {}, "--steps is 0, but must be 1 or more"),
        (("--steps", 1001), {}, "`num_inference_steps` is 1001, but the scheduler has 1000 timesteps"),
        (("--guidance-scale", "1e30"), {}, "The image holds numbers that are not finite"),
        (("--seed", 2**64), {}, "--seed is 18446744073709551616, more than 64 bits"),
        (("--guidance-scale", "nan"), {}, "--guidance-scale is nan, but must be"),
        (("--strength", 0.5), {}, "--strength is for the frames of a video"),
        (("--offload", "model"), {}, "but the device is cpu"),
    ],
)
def test_bad_inputs_are_told_in_one_line(refine, pictures, capsys, words, files, told):
    mask_of((0, 0, 0, 0)).save(pictures / "empty.png")
    mask_of((0, 0, 96, 80)).save(pictures / "full.png")
    assert refine(*words, **files) == 1
    error = capsys.readouterr().err
    assert told in error.splitlines()[-1]


def test_a_map_in_the_place_of_the_output_is_told(capsys):
    words = ["--image", "a.png", "--mask", "b.png", "--reference", "c.png", "--output", "d.png", "--map", "./d.png"]
    assert main(["refine", *words]) == 1
    assert "--map and --output are both d.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "map"),
    [("image.png", "reference.png"), ("image.png", "mask.png"), ("mask.png", None), ("a.png", "image.png")],
)
def test_no_input_but_what_is_refined_is_written_over(capsys, output, map):
    words = ["--image", "image.png", "--mask", "mask.png", "--reference", "./reference.png", "--output", output]
    words += ["--map", map] if map else []
    assert main(["refine", *words, "--overwrite"]) == 1
    assert "is one of the files to read, and would be lost" in capsys.readouterr().err


def test_auto_masks_are_for_videos(refine, pictures, capsys):
    assert main(["refine", "--image", "a.png", "--mask", "auto", "--reference", "b.png", "--output", "c.png"]) == 1
    assert "--mask auto looks at neighbouring frames" in capsys.readouterr().err


def test_an_existing_output_is_kept(refine, tmp_path, capsys):
    (tmp_path / "refined.png").write_bytes(b"mine")
    assert refine() == 1
    assert "refined.png exists already. Name another output, or pass --overwrite." in capsys.readouterr().err
    assert (tmp_path / "refined.png").read_bytes() == b"mine"


@pytest.mark.parametrize("output", ["", ".", "new/folder/out.gif"])
def test_a_wrong_output_is_told_before_anything_is_made(monkeypatch, capsys, output):
    monkeypatch.setattr("refalign.refine.owned", None)
    words = ["refine", "--image", "a.png", "--mask", "b.png", "--reference", "c.png", "--output", output]
    assert main(words) == 1
    assert f"--output is {Path(output)}, but must end in .png" in capsys.readouterr().err


def test_an_output_that_another_run_made_meanwhile_is_kept(refine, tmp_path, monkeypatch, capsys):
    @contextmanager
    def owned_after_another(*outputs):
        outputs[0].write_bytes(b"another's")
        yield

    monkeypatch.setattr("refalign.refine.owned", owned_after_another)
    monkeypatch.setattr("refalign.refine.load_reference", None)
    assert refine() == 1
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "refined.png").read_bytes() == b"another's"


def test_a_reference_to_video_model_is_told(refine, repo_folder, capsys):
    assert refine(model=repo_folder) == 1
    assert f"{repo_folder} is of a RefAlignWanPipeline, not of Refine-by-Align's" in capsys.readouterr().err


def test_a_folder_of_refine_is_told_by_generate(folder, tmp_path, capsys):
    words = ["generate", "--model", str(folder), "--prompt", "a cat", "--output", str(tmp_path / "out.mp4")]
    assert main(words) == 1
    assert (
        f"{folder} is Refine-by-Align's, which makes no videos: `refalign refine` takes it" in capsys.readouterr().err
    )
    with pytest.raises(ValueError, match="`refalign refine` takes it"):
        RefAlignWanPipeline.from_pretrained(folder)


def test_a_folder_that_is_not_a_pipeline_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"is not a pipeline folder: it has no model_index.json"):
        load_refine_pipeline(str(tmp_path))


# -- refalign refine init --


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Stand-ins for an inpainting model (its UNet, VAE and scheduler) and a DINOv2, in folders."""
    folder, pipe = tmp_path_factory.mktemp("parts"), tiny_refine_pipeline(seed=1)
    for name in ("unet", "vae", "scheduler"):
        getattr(pipe, name).save_pretrained(folder / "inpainting" / name)
    config = Dinov2Config(image_size=28, patch_size=2, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    Dinov2Model(config).save_pretrained(folder / "encoder")
    return folder


def init(parts, output, inpainting="inpainting", encoder="encoder"):
    words = ["--inpainting", str(parts / inpainting), "--image-encoder", str(parts / encoder)]
    return main(["refine", "init", *words, "--output", str(output)])


def test_init_makes_a_pipeline_of_public_parts(parts, tmp_path, capsys):
    output = tmp_path / "base"
    assert init(parts, output) == 0
    assert "It is untrained" in capsys.readouterr().out
    assert "is not trained" in (output / "README.md").read_text("utf-8")
    assert str(parts) not in (output / "README.md").read_text("utf-8")
    pipe = RefineByAlignPipeline.from_pretrained(output)
    headers = read_headers(sorted(output.glob("*/*.safetensors")))
    assert {tensor.dtype for tensor in headers.values()} == {torch.float16}
    assert (pipe.config["image_size"], pipe.config["reference_size"]) == (64, 32)
    assert pipe.config["alignment_block"] == 5  # of 10, as 9 of 16
    expected = tiny_refine_pipeline(seed=1).unet.conv_in.weight.half().float()
    assert torch.equal(pipe.unet.conv_in.weight, expected)
    assert pipe.reference_projector(torch.zeros(1, 3, 16)).shape == (1, 3, 24)


def test_what_init_made_runs(parts, tmp_path):
    output = tmp_path / "base"
    init(parts, output)
    pipe = load_refine_pipeline(str(output), "cpu")
    assert pipe.unet.dtype == torch.float32
    pipe(picture(), mask_of(BOX), reference(), num_inference_steps=1)


def test_init_takes_inpainting_models_alone(parts, tmp_path, capsys):
    config = read_json(parts / "inpainting/unet/config.json")
    (parts / "plain/unet").mkdir(parents=True)
    (parts / "plain/unet/config.json").write_text(json.dumps({**config, "in_channels": 4}))
    assert init(parts, tmp_path / "base", inpainting="plain") == 1
    assert "takes 4 channels" in capsys.readouterr().err
    assert init(parts, tmp_path / "base", inpainting="encoder") == 1
    assert "it has no unet/config.json" in capsys.readouterr().err
    assert not (tmp_path / "base").exists()


def test_init_takes_dinov2_alone(parts, tmp_path, capsys):
    config = ViTConfig(image_size=28, patch_size=2, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    ViTModel(config).save_pretrained(parts / "vit")
    assert init(parts, tmp_path / "base", encoder="vit") == 1
    assert "is not DINOv2 in transformers' format: its config.json says vit" in capsys.readouterr().err
