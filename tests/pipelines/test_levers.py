"""Attention kernels, compilation, caches, tiling and calibration as options: what they do, and what is refused."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from refalign import RefAlignWanTransformer3DModel
from refalign.calibration import PASSES, RATIOS, Calibrate, run
from refalign.levers import apply_levers, check_levers, parse_cache, set_cache
from refalign.loading import load_pipeline
from refalign.transformer_refalign_wan import RefAlignMagCacheConfig
from refalign.video_options import SpeedOptions


CPU = torch.device("cpu")
CALL = {
    "height": 32,
    "width": 32,
    "num_frames": 5,
    "num_inference_steps": 6,
    "output_type": "latent",
    "batch_passes": False,
}


def check(model="no-model", **options):
    check_levers(SpeedOptions(**options), model, None, CPU, torch.float32)


def frames(pipeline, image, **changes):
    generator = torch.Generator().manual_seed(0)
    return pipeline("a", reference_images=[image], generator=generator, **{**CALL, **changes}).frames


@pytest.fixture
def image():
    from PIL import Image

    return Image.new("RGB", (32, 32), "red")


@pytest.fixture(scope="module")
def calibrated(repo_folder, tmp_path_factory):
    folder = shutil.copytree(repo_folder, tmp_path_factory.mktemp("levers") / "model")
    options = {"height": 32, "width": 32, "num_frames": 5, "steps": 6, "device": "cpu"}
    assert run(Calibrate(model=str(folder), **options)) == 0
    return folder


# -- What is refused, in one line and before weights are read ---------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": "faster"}, "--cache faster: known are first-block, mag, taylorseer"),
        ({"cache": "pab"}, "known are"),
        ({"cache": "first-block:much"}, "a number above 0"),
        ({"cache": "mag:-1"}, "a number above 0"),
        ({"cache": "taylorseer:1"}, "every how many steps"),
        ({"attention": "flashy"}, "is not a kernel that diffusers knows. Known are: flash,"),
        ({"attention": "sage"}, "does not run here .device cpu, torch.float32.: .*sageattention"),
        ({"attention": "_native_cudnn"}, "does not run here"),
        ({"attention": "flash_hub"}, "Pass --trust-kernels"),
        ({"quantize": "int3"}, "--quantize int3 is not known"),
    ],
)
def test_what_cannot_be_is_told(options, message):
    with pytest.raises(ValueError, match=message) as error:
        check(**options)
    assert "\n" not in str(error.value)


def test_a_compiler_that_is_missing_is_told(monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler"):
        check(compile=True)


def test_all_is_refused_before_weights_are_read(repo_folder, monkeypatch):
    monkeypatch.setattr("refalign.loading._load_parts", None)
    options = {"base": None, "loras": (), "dtype": "auto", "device": "cpu", "offload": "none"}
    for speed in ({"cache": "mag"}, {"attention": "sage"}, {"quantize": "no.gguf"}):
        with pytest.raises(ValueError, match=r"calibrate|sage|no\.gguf"):
            load_pipeline(str(repo_folder), **options, speed=SpeedOptions(**speed))


# -- What they do -----------------------------------------------------------------------------------------------------


def test_values_of_caches():
    assert [parse_cache(text) for text in ("first-block", "mag:0.2", "taylorseer:3")] == [
        ("first-block", 0.05),
        ("mag", 0.2),
        ("taylorseer", 3),
    ]


def test_an_attention_kernel_is_set(pipeline, image):
    plain = frames(pipeline, image)
    check(attention="_native_math")
    others = _AttentionBackendRegistry.get_active_backend()
    apply_levers(pipeline, SpeedOptions(attention="_native_math"))
    assert _AttentionBackendRegistry.get_active_backend() == others  # of other models of this process
    backends = {block.attn1.processor._attention_backend for block in pipeline.transformer.blocks}
    ours = frames(pipeline, image)
    pipeline.transformer.reset_attention_backend()
    assert backends == {"_native_math"}
    assert torch.allclose(ours, plain, atol=1e-4)


def test_blocks_are_compiled_as_one_graph_inside_of_a_cache(pipeline, image, monkeypatch):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr("torch.compile", lambda function: compile_(function, backend=count))
    torch._dynamo.reset()
    plain = frames(pipeline, image)
    apply_levers(pipeline, SpeedOptions(compile=True))
    set_cache(pipeline, "first-block:0.0001", "no-model", 6)
    assert torch.allclose(frames(pipeline, image), plain, atol=1e-4)
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_tiles_are_decoded(pipeline):
    apply_levers(pipeline, SpeedOptions(vae_tiling=True))
    assert pipeline.vae.use_tiling


@pytest.mark.parametrize("cache", ["first-block:0.3", "taylorseer:2", "mag:0.5"])
def test_a_cache_is_set_for_each_call_and_taken_off(calibrated, pipeline, image, cache):
    plain = frames(pipeline, image)
    set_cache(pipeline, "first-block", str(calibrated), 6)
    set_cache(pipeline, cache, str(calibrated), 6)
    cached = frames(pipeline, image)
    assert not torch.equal(cached, plain)
    assert (cached - plain).abs().mean() < 0.3 * plain.abs().mean()
    set_cache(pipeline, None, str(calibrated), 6)
    assert torch.equal(frames(pipeline, image), plain)


# -- MagCache ---------------------------------------------------------------------------------------------------------


def test_calibration_keeps_ratios_of_each_pass(calibrated):
    ratios = json.loads((calibrated / RATIOS).read_text())["ratios"]
    assert set(ratios) == set(PASSES)
    assert {len(values) for values in ratios.values()} == {6}
    assert ratios["null"] != ratios["full"] != ratios["reference"]
    assert all(0.2 < value < 5 for values in ratios.values() for value in values)


def test_calibration_measures_the_residuals_of_the_blocks(calibrated):
    """diffusers' definition, by hand: mean over tokens of the norm of the residual by the last step's."""
    pipeline = load_pipeline(
        str(calibrated), base=None, loras=(), dtype="float32", device="cpu", offload="none", speed=SpeedOptions()
    )
    from refalign.calibration import Calibrate as Defaults
    from refalign.generate import Generate, Job, filled, prepare
    from refalign.loading import read_defaults

    residuals, inputs = [], []
    pipeline.transformer.blocks[0].register_forward_pre_hook(lambda block, given: inputs.append(given[0]))
    last = pipeline.transformer.blocks[-1]
    last.register_forward_hook(lambda block, given, output: residuals.append((output - inputs[-1]).norm(dim=-1)))
    defaults = Defaults()
    command = Generate(
        prompt=defaults.prompt, reference=defaults.reference, height=32, width=32, num_frames=5, steps=6
    )
    job = filled(Job("job", calibrated, command), read_defaults(str(calibrated)))
    arguments = prepare(job.command)
    arguments["batch_passes"] = False
    pipeline(**arguments, generator=torch.Generator().manual_seed(0), output_type="latent")
    full = residuals[2::3]  # null, reference and full take turns
    expected = [1.0] + [float((after / (before + 1e-8)).mean()) for before, after in pairwise(full)]
    ratios = json.loads((calibrated / RATIOS).read_text())["ratios"]
    assert ratios["full"] == pytest.approx(expected, abs=2e-3)


def test_each_pass_takes_its_own_ratios(transformer, inputs):
    ratios = {"null": [1.0, 1.0], "reference": [0.9, 0.9], "full": [1.1, 1.1]}
    config = RefAlignMagCacheConfig(num_inference_steps=4, pass_ratios=ratios)
    transformer.enable_cache(config)
    for name, value in (("null", 1.0), ("reference_1", 0.9), ("full", 1.1)):
        with transformer.cache_context(name):
            assert torch.allclose(config.mag_ratios, torch.full((4,), value))


def test_a_cache_that_is_emptied_goes_on_with_the_ratios_of_the_step(transformer):
    """As the guidance gate empties it."""
    ratios = {name: [1.0, 2.0, 3.0, 4.0] for name in PASSES}
    config = RefAlignMagCacheConfig(num_inference_steps=4, pass_ratios=ratios)
    transformer.enable_cache(config)
    for step, expected in ((0, [1, 2, 3, 4]), (1, [1, 2, 3, 4])):
        with transformer.cache_context("full", step_index=step):
            assert config.mag_ratios.tolist() == expected
    transformer._reset_stateful_cache()
    for step in (2, 3):
        with transformer.cache_context("full", step_index=step):
            assert config.mag_ratios.tolist() == [3, 4]


def test_a_pass_without_ratios_is_refused():
    with pytest.raises(ValueError, match=r"lacks \['null', 'reference'\]"):
        RefAlignMagCacheConfig(pass_ratios={"full": [1.0]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": None}, "pass one as --model"),
        ({"cache": "mag"}, "--cache leaves out passes or blocks"),
        ({"guidance_gate": (0.5, 0.5)}, "--guidance-gate leaves out"),
        ({"fast": "fast"}, "--fast leaves out"),
        ({"reference": ()}, "needs a reference"),
        ({}, "exists already. Pass --overwrite"),
    ],
)
def test_a_calibration_that_cannot_be_is_told(calibrated, options, message):
    with pytest.raises(ValueError, match=message):
        run(Calibrate(**{"model": str(calibrated), **options}))


@pytest.mark.parametrize(
    "content", ['{"ratios": {"full": [1.0]}}', '{"ratios": {"null": [], "reference": 1, "full": [-1]}}']
)
def test_damaged_ratios_are_told(tmp_path, content):
    (tmp_path / RATIOS).write_text(content)
    with pytest.raises(ValueError, match="does not hold ratios of null, reference, full"):
        check(model=str(tmp_path), cache="mag")


def test_an_export_keeps_the_ratios(calibrated, tmp_path):
    from refalign.hub import export_repo

    assert (export_repo(calibrated, tmp_path / "repo") / RATIOS).is_file()
    assert RefAlignWanTransformer3DModel.from_pretrained(tmp_path / "repo/transformer") is not None
