"""LoRA files: every key style in use, brought to the native one and written in each, to the same change of weights."""

import json
import logging

import pytest
import torch
from diffusers import WanPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from refalign import RefAlignWanPipeline, keys
from refalign.cli import main
from refalign.keys import LORA_STYLES
from refalign.lora import native_lora, read_lora, write_lora
from tests.tiny_models import FIXTURES, TARGETS


RANK, ALPHA = 4, 6  # 1.5, which bfloat16 rounds
TOP_TARGETS = [
    "proj_out",
    "condition_embedder.time_proj",
    "condition_embedder.text_embedder.linear_1",
    "condition_embedder.text_embedder.linear_2",
    "condition_embedder.time_embedder.linear_1",
    "condition_embedder.time_embedder.linear_2",
]
Q = "blocks.0.self_attn.q"


def add_lora(transformer, alpha: float = ALPHA, targets: list[str] = TARGETS, **options) -> dict[str, torch.Tensor]:
    """Gives the transformer a random adapter; returns its tensors under peft's names."""
    torch.manual_seed(3)
    config = LoraConfig(r=RANK, lora_alpha=alpha, target_modules=targets, init_lora_weights=False, **options)
    transformer.add_adapter(config)
    return {key: tensor.clone() for key, tensor in get_peft_model_state_dict(transformer).items()}


def velocity(transformer, inputs) -> torch.Tensor:
    with torch.no_grad():
        return transformer(**inputs, return_dict=False)[0]


def deltas(layers) -> dict[str, torch.Tensor]:
    """B @ A by layer, in float64."""
    names = {key.rpartition(".lora_")[0] for key in layers}
    pairs = {name: [layers[f"{name}.lora_{m}.weight"].flatten(1).double() for m in "BA"] for name in names}
    return {name: b @ a for name, (b, a) in pairs.items()}


def random_pairs(*names: str, down: str = "lora_A", up: str = "lora_B", rank: int = RANK) -> dict[str, torch.Tensor]:
    tensors = {}
    for name in names:
        tensors |= {f"{name}.{down}.weight": torch.randn(rank, 24), f"{name}.{up}.weight": torch.randn(24, rank)}
    return tensors


@pytest.fixture
def saved(tmp_path):
    """Writes tensors and metadata to a file."""

    def save(tensors, name="lora.safetensors", **metadata):
        save_file(tensors, tmp_path / name, metadata={"format": "pt", **metadata})
        return tmp_path / name

    return save


@pytest.fixture
def trained(transformer) -> dict[str, torch.Tensor]:
    """A native LoRA of an adapter with alpha != rank."""
    return native_lora(add_lora(transformer), ALPHA / RANK)


# Ours, written


@pytest.mark.parametrize("style", LORA_STYLES)
def test_what_is_written_changes_the_model_as_the_adapter_did(pipeline, inputs, tmp_path, style):
    base = velocity(pipeline.transformer, inputs)
    layers = native_lora(add_lora(pipeline.transformer), ALPHA / RANK)
    with_adapter = velocity(pipeline.transformer, inputs)
    pipeline.transformer.delete_adapters("default")
    pipeline.load_lora_weights(write_lora(layers, tmp_path / "lora.safetensors", style))
    torch.testing.assert_close(velocity(pipeline.transformer, inputs), with_adapter, atol=1e-5, rtol=1e-5)
    assert (with_adapter - base).abs().max() > 1e-2


@pytest.mark.parametrize("style", ["native", "diffusers"])
def test_layers_outside_the_blocks_too(pipeline, inputs, tmp_path, style):
    layers = native_lora(add_lora(pipeline.transformer, targets=[*TARGETS, *TOP_TARGETS]), ALPHA / RANK)
    with_adapter = velocity(pipeline.transformer, inputs)
    pipeline.transformer.delete_adapters("default")
    pipeline.load_lora_weights(write_lora(layers, tmp_path / "lora.safetensors", style))
    torch.testing.assert_close(velocity(pipeline.transformer, inputs), with_adapter, atol=1e-5, rtol=1e-5)


def test_the_patch_embedding_goes_by_diffusers_style(pipeline, inputs, tmp_path):
    layers = native_lora(add_lora(pipeline.transformer, targets=["patch_embedding", "to_q"]), ALPHA / RANK)
    with_adapter = velocity(pipeline.transformer, inputs)
    pipeline.transformer.delete_adapters("default")
    native = write_lora(layers, tmp_path / "native.safetensors", "native")
    write_lora(read_lora(native).layers, tmp_path / "diffusers.safetensors", "diffusers")
    pipeline.load_lora_weights(tmp_path / "diffusers.safetensors")
    torch.testing.assert_close(velocity(pipeline.transformer, inputs), with_adapter, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("style", "targets", "loads"),
    [
        ("native", TARGETS, True),
        ("native", ["to_q"], True),
        ("native", ["proj_out"], False),
        ("native", ["to_q", "patch_embedding"], False),
        ("kohya", TARGETS, True),
        ("kohya", ["to_q"], False),
        ("kohya", [*TARGETS, "proj_out"], False),
        ("diffusers", ["proj_out"], True),
    ],
)
def test_it_warns_of_what_diffusers_itself_cannot_load(pipeline, tmp_path, caplog, style, targets, loads):
    layers = native_lora(add_lora(pipeline.transformer, targets=targets), ALPHA / RANK)
    pipeline.transformer.delete_adapters("default")
    with caplog.at_level(logging.WARNING, "refalign"):
        file = write_lora(layers, tmp_path / "lora.safetensors", style)
    assert ("diffusers cannot load" in caplog.text) is not loads
    try:
        WanPipeline.load_lora_weights(pipeline, file)
    except (ValueError, KeyError, IndexError):
        loaded = False
    else:
        loaded = True
    assert loaded is loads


@pytest.mark.parametrize("style", ["native", "kohya"])
def test_comfyui_knows_every_key(transformer, tmp_path, style):
    """Its map, as model_lora_keys_unet makes it: each native weight under two names, the matrices behind."""
    shapes = json.loads((FIXTURES / "native_checkpoint_shapes.json").read_text("utf-8"))
    weights = {key.removesuffix(".weight") for key in next(iter(shapes.values())) if key.endswith(".weight")}
    known = {f"diffusion_model.{name}" for name in weights}
    known |= {f"lora_unet_{name.replace('.', '_')}" for name in weights}
    layers = add_lora(transformer, targets=[*TARGETS, *TOP_TARGETS, "patch_embedding"])
    file = write_lora(native_lora(layers, 1.0), tmp_path / "lora.safetensors", style)
    suffixes = {"native": ("lora_A.weight", "lora_B.weight"), "kohya": ("lora_up.weight", "lora_down.weight", "alpha")}
    modules = {key.partition(".lora_")[0].removesuffix(".alpha") for key in load_file(file)}
    assert modules <= known and len(modules) == 2 * 10 + 7
    assert load_file(file).keys() == {f"{module}.{suffix}" for module in modules for suffix in suffixes[style]}


@pytest.mark.parametrize("style", LORA_STYLES)
def test_no_scale_is_left_to_be_applied_twice(trained, tmp_path, style):
    file = write_lora(trained, tmp_path / "lora.safetensors", style)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    alphas = {key: tensor.item() for key, tensor in load_file(file).items() if key.endswith("alpha")}
    assert set(alphas.values()) == ({RANK} if style == "kohya" else set())


def test_an_adapters_name_in_the_keys_makes_no_difference(transformer):
    plain = add_lora(transformer)
    named = {key.replace(".weight", ".default.weight"): tensor for key, tensor in plain.items()}
    assert native_lora(named, 1.5).keys() == native_lora(plain, 1.5).keys()


def test_alpha_goes_into_lora_b(transformer):
    layers = add_lora(transformer)
    native = native_lora(layers, 1.5)
    assert torch.equal(native[f"diffusion_model.{Q}.lora_A.weight"], layers["blocks.0.attn1.to_q.lora_A.weight"])
    assert torch.equal(native[f"diffusion_model.{Q}.lora_B.weight"], 1.5 * layers["blocks.0.attn1.to_q.lora_B.weight"])


@pytest.mark.parametrize(("scale", "dtype"), [(0.5, torch.bfloat16), (1.5, torch.float32)])
def test_bfloat16_stays_where_that_loses_nothing(transformer, scale, dtype):
    layers = {key: tensor.bfloat16() for key, tensor in add_lora(transformer).items()}
    native = native_lora(layers, scale)
    expected = scale * layers["blocks.0.attn1.to_q.lora_B.weight"].float()
    assert torch.equal(native[f"diffusion_model.{Q}.lora_B.weight"].float(), expected)
    assert {tensor.dtype for tensor in native.values()} == {dtype}


@pytest.mark.parametrize("style", LORA_STYLES)
def test_a_bfloat16_lora_loads(pipeline, inputs, tmp_path, style):
    layers = {key: tensor.bfloat16() for key, tensor in add_lora(pipeline.transformer).items()}
    pipeline.transformer.delete_adapters("default")
    base = velocity(pipeline.transformer, inputs)
    native = native_lora(layers, 0.5)
    pipeline.load_lora_weights(write_lora(native, tmp_path / "lora.safetensors", style))
    assert {t.dtype for t in load_file(tmp_path / "lora.safetensors").values() if t.ndim} == {torch.bfloat16}
    assert not torch.allclose(velocity(pipeline.transformer, inputs), base, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.0.attn1.to_q.base_layer.weight": torch.zeros(2, 2)}, "base_layer"),
        ({"blocks.0.attn2.add_k_proj.lora_A.weight": torch.zeros(2, 2)}, "blocks.0.attn2.add_k_proj"),
        ({"blocks.0.attn1.to_q.alpha": torch.tensor(1.0)}, "blocks.0.attn1.to_q.alpha"),
        ({"blocks.9.attn1.to_q.lora_A.weight": torch.zeros(2, 2)}, "blocks.9.self_attn.q has no lora_B"),
        ({"blocks.0.attn1.to_q.lora_A.other.weight": torch.zeros(2, 2)}, "twice"),
        ({"blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 24)}, "no common rank"),
    ],
    ids=range(6),
)
def test_native_lora_names_what_it_cannot_export(transformer, change, message):
    with pytest.raises(ValueError, match=message):
        native_lora(add_lora(transformer) | change, 1.0)


@pytest.mark.parametrize(
    ("name", "style", "message"),
    [
        ("lora.pt", "native", "must end in .safetensors"),
        ("lora.safetensors", "comfyui", "native, diffusers, kohya"),
        ("there.safetensors", "native", "exists already"),
    ],
)
def test_write_lora_says_what_is_wrong(trained, tmp_path, name, style, message):
    (tmp_path / "there.safetensors").write_bytes(b"precious")
    with pytest.raises(ValueError, match=message):
        write_lora(trained, tmp_path / name, style)
    assert [file.name for file in tmp_path.iterdir()] == ["there.safetensors"]


@pytest.mark.parametrize("layers", [{}, {"blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 2)}], ids=len)
def test_write_lora_takes_native_keys_only(tmp_path, layers):
    with pytest.raises(ValueError, match="must be a native LoRA"):
        write_lora(layers, tmp_path / "lora.safetensors", "native")


# Others', read


@pytest.mark.parametrize("first", LORA_STYLES)
@pytest.mark.parametrize("second", LORA_STYLES)
def test_every_style_becomes_every_other_and_comes_back(trained, tmp_path, first, second):
    layers = trained
    for number, style in enumerate((first, second, first)):
        lora = read_lora(write_lora(layers, tmp_path / f"{number}.safetensors", style))
        assert lora.style == style and set(lora.scales.values()) == {1.0}
        layers = lora.layers
    expected, found = deltas(trained), deltas(layers)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@settings(max_examples=50, deadline=None)
@given(
    layers=st.sets(
        st.one_of(
            st.builds("blocks.{}.{}".format, st.integers(0, 99), st.sampled_from(keys.LORA_BLOCK_LAYERS)),
            st.sampled_from(keys.LORA_TOP_LAYERS),
        ),
        min_size=1,
    ),
    style=st.sampled_from(LORA_STYLES),
)
def test_every_layers_name_survives_every_style(tmp_path_factory, layers, style):
    file = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    native = random_pairs(*(f"diffusion_model.{layer}" for layer in layers))
    back = read_lora(write_lora(native, file, style)).layers
    assert back.keys() == native.keys() and all(torch.equal(back[key], native[key]) for key in native)


@pytest.mark.parametrize("rslora", [False, True])
def test_diffusers_metadata_scales_as_in_diffusers(pipeline, inputs, tmp_path, rslora):
    """With patterns: one layer of another rank, one kind of another alpha."""
    ranks, alphas = {"blocks.1.attn1.to_k": 2}, {"attn2.to_v": 9, "blocks.0.ffn.net.2": 1}
    layers = add_lora(pipeline.transformer, rank_pattern=ranks, alpha_pattern=alphas, use_rslora=rslora)
    config = pipeline.transformer.peft_config["default"].to_dict()
    with_adapter = velocity(pipeline.transformer, inputs)
    pipeline.transformer.delete_adapters("default")
    RefAlignWanPipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=layers, transformer_lora_adapter_metadata=config
    )
    lora = read_lora(tmp_path / "pytorch_lora_weights.safetensors")
    assert lora.style == "diffusers" and len(set(lora.scales.values())) == 4
    pipeline.load_lora_weights(write_lora(lora.layers, tmp_path / "native.safetensors", "native"))
    torch.testing.assert_close(velocity(pipeline.transformer, inputs), with_adapter, atol=1e-5, rtol=1e-5)


def test_an_adapter_saved_without_prefix(transformer, tmp_path):
    layers = add_lora(transformer, targets=[*TARGETS, "patch_embedding"])
    transformer.save_lora_adapter(tmp_path, adapter_name="default")
    lora = read_lora(tmp_path / "pytorch_lora_weights.safetensors")
    expected = deltas(native_lora(layers, ALPHA / RANK))
    assert lora.style == "unprefixed" and set(lora.scales.values()) == {1.5}
    assert all(torch.equal(delta, expected[name]) for name, delta in deltas(lora.layers).items())


@pytest.mark.parametrize("wrapped", ["blocks.0.attn1.to_q", Q])
def test_peft_states_its_scale_in_a_file_beside(saved, tmp_path, wrapped):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 8}), "utf-8")
    lora = read_lora(saved(random_pairs(f"base_model.model.{wrapped}")))
    assert (lora.style, lora.scales) == ("peft", {Q: 2.0})


def test_peft_without_its_configuration_is_told(saved, caplog):
    assert read_lora(saved(random_pairs("base_model.model.blocks.0.attn1.to_q"))).scales == {Q: 1.0}
    assert "adapter_config.json" in caplog.text


@pytest.mark.parametrize("names", [("lora_A", "lora_B"), ("lora_down", "lora_up")])
@pytest.mark.parametrize(
    "alpha", [torch.tensor(8), torch.tensor(8.0, dtype=torch.float64), torch.tensor([8.0])], ids=str
)
def test_native_keys_with_alpha(pipeline, inputs, saved, tmp_path, names, alpha):
    """diffusers reads such a file itself: the two have to agree."""
    tensors = random_pairs(f"diffusion_model.{Q}", "diffusion_model.blocks.1.cross_attn.k", down=names[0], up=names[1])
    file = saved({**tensors, f"diffusion_model.{Q}.alpha": alpha})
    lora = read_lora(file)
    assert lora.style == "native" and lora.scales == {Q: 2.0, "blocks.1.cross_attn.k": 1.0}
    pipeline.load_lora_weights(file, adapter_name="theirs")
    theirs = velocity(pipeline.transformer, inputs)
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(write_lora(lora.layers, tmp_path / "ours.safetensors", "diffusers"))
    torch.testing.assert_close(velocity(pipeline.transformer, inputs), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_unet__"])
@pytest.mark.parametrize(
    "layer", [Q, "blocks.12.cross_attn.o", "blocks.1.ffn.0", "text_embedding.0", "time_projection.1", "head.head"]
)
def test_kohyas_underscores_are_resolved(saved, prefix, layer):
    name = prefix + layer.replace(".", "_")
    tensors = random_pairs(name, down="lora_down", up="lora_up")
    lora = read_lora(saved({**tensors, f"{name}.alpha": torch.tensor(2.0)}))
    assert (lora.style, lora.scales) == ("kohya", {layer: 0.5})
    (delta,) = deltas(lora.layers).values()
    torch.testing.assert_close(
        delta, 0.5 * (tensors[f"{name}.lora_up.weight"].double() @ tensors[f"{name}.lora_down.weight"].double())
    )


def test_kohya_as_diffusers_reads_it(pipeline, inputs, saved, tmp_path):
    layers = native_lora(add_lora(pipeline.transformer), 1.0)
    pipeline.transformer.delete_adapters("default")
    tensors = load_file(write_lora(layers, tmp_path / "kohya.safetensors", "kohya"))
    tensors = {key: torch.tensor(1.0) if key.endswith("alpha") else tensor for key, tensor in tensors.items()}
    pipeline.load_lora_weights(saved(tensors), adapter_name="theirs")
    theirs = velocity(pipeline.transformer, inputs)
    pipeline.unload_lora_weights()
    lora = read_lora(tmp_path / "lora.safetensors")
    pipeline.load_lora_weights(write_lora(lora.layers, tmp_path / "native.safetensors", "native"))
    torch.testing.assert_close(velocity(pipeline.transformer, inputs), theirs, atol=1e-5, rtol=1e-5)


def test_metadata_on_native_keys_is_told(saved, caplog):
    metadata = json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 8})
    assert read_lora(saved(random_pairs(f"diffusion_model.{Q}"), lora_adapter_metadata=metadata)).scales == {Q: 1.0}
    assert "diffusers would scale by it" in caplog.text


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("diffusion_model.blocks.0.norm3.diff", "of norms"),
        ("diffusion_model.blocks.0.self_attn.norm_q.diff", "of norms"),
        ("diffusion_model.blocks.0.self_attn.norm_q.lora_A.weight", "of norms"),
        ("diffusion_model.blocks.0.diff_m", "of modulation"),
        ("diffusion_model.head.modulation.diff", "of modulation"),
        ("diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight", "of image-to-video layers"),
        ("transformer.blocks.0.attn2.add_k_proj.lora_A.weight", "of image-to-video layers"),
        ("lora_unet_img_emb_proj_1.lora_down.weight", "of image-to-video layers"),
    ],
)
def test_what_no_layer_takes_is_counted_not_dropped_in_silence(pipeline, saved, caplog, key, kind):
    file = saved({**random_pairs(f"diffusion_model.{Q}"), key: torch.zeros(24), f"{key}2.diff_m": torch.zeros(1)})
    counts = read_lora(file).passed_over
    assert sum(counts.values()) == 2 and kind in counts
    pipeline.load_lora_weights(file)
    assert kind in caplog.text and str(file) in caplog.text


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        (f"diffusion_model.{Q}.dora_scale", "It is a DoRA"),
        (f"diffusion_model.{Q}.lora_magnitude_vector", "It is a DoRA"),
        (f"diffusion_model.{Q}.lora_mid.weight", "It is a LoCon"),
        ("lora_unet_blocks_0_ffn_0.lokr_w1", "It is a LoKr"),
        (f"diffusion_model.{Q}.hada_w1_a", "It is a LoHa"),
        ("lora_te_encoder_0.lora_down.weight", "It is one of a text encoder too"),
        ("lora_te1_text_model_encoder.lora_down.weight", "It is one of a text encoder too"),
        ("text_encoder.layers.0.lora_A.weight", "It is one of a text encoder too"),
        ("diffusion_model.double_blocks.0.img_attn.proj.lora_A.weight", "not of layers of Wan's"),
        ("diffusion_model.blocks.0.self_attn.q.weight", "not of layers of Wan's"),
    ],
)
def test_files_of_other_kinds_are_named(pipeline, saved, key, kind):
    file = saved({**random_pairs(f"diffusion_model.{Q}"), key: torch.zeros(24)})
    for read in (read_lora, pipeline.load_lora_weights):
        with pytest.raises(ValueError, match=f"lora.safetensors: .*{kind}.*"):
            read(file)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({}, {}, "First keys: none"),
        ({"unet.down.lora_A.weight": torch.zeros(2, 2)}, {}, "not of layers of Wan's.*unet.down.lora_A.weight"),
        ({"blocks.0.norm3.diff": torch.zeros(2)}, {}, "No known style"),
        (random_pairs(f"diffusion_model.{Q}", "lora_unet_blocks_1_ffn_0"), {}, "several styles: kohya, native"),
        (random_pairs(f"diffusion_model.{Q}", "lora_unet_blocks_0_self_attn_q"), {}, "twice"),
        (random_pairs(Q, down="lora_A.a", up="lora_B.a") | random_pairs(Q), {}, "twice.*one adapter"),
        ({f"{Q}.lora_A.weight": torch.zeros(2, 2)}, {}, "has no lora_B"),
        ({f"{Q}.alpha": torch.tensor(2.0)}, {}, "has no lora_A"),
        ({**random_pairs(Q), f"{Q}.alpha": torch.zeros(2)}, {}, "must be one number"),
        ({**random_pairs(Q), f"{Q}.alpha": torch.tensor(float("nan"))}, {}, "finite"),
        ({key: tensor.int() for key, tensor in random_pairs(Q).items()}, {}, "floating point"),
        ({f"{Q}.lora_A.weight": torch.zeros(2, 4), f"{Q}.lora_B.weight": torch.zeros(4, 3)}, {}, "no common rank"),
        ({f"{Q}.lora_A.weight": torch.zeros(0, 4), f"{Q}.lora_B.weight": torch.zeros(4, 0)}, {}, "no common rank"),
        (random_pairs(Q), {"r": 8, "lora_alpha": 8}, "rank 4, but the metadata states 8"),
        (random_pairs(Q), {"r": 4}, "lora_alpha as None"),
        (random_pairs(Q), {"r": 4, "lora_alpha": 4, "alpha_pattern": {"(": 1}}, "lora.safetensors: "),
        ({**random_pairs(Q), f"{Q}.alpha": torch.tensor(2.0)}, {"r": 4, "lora_alpha": 8}, "Remove one"),
    ],
    ids=range(17),
)
def test_what_cannot_be_read_is_told(saved, tensors, metadata, message):
    with pytest.raises(ValueError, match=message):
        read_lora(saved(tensors, **({"lora_adapter_metadata": json.dumps(metadata)} if metadata else {})))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("lora.safetensors", b"", "not a whole safetensors file"),
        ("lora.safetensors", b"\x40\0\0\0\0\0\0\0{", "not a whole safetensors file"),
        ("lora.pt", b"\x80\x04.", "run code when they are opened"),
        ("nowhere.safetensors", None, "is not a file"),
    ],
)
def test_broken_files_and_pickles_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_lora(tmp_path / name)


# Applied: what is read, `load_lora_weights` applies


def dotted(layer: str) -> str:
    return layer


def named_by_diffusers(layer: str) -> str:
    return keys.diffusers_key(f"{layer}.weight").removesuffix(".weight")


def underscored(layer: str) -> str:
    return layer.replace(".", "_")


@pytest.mark.parametrize(
    ("prefix", "name"),
    [
        ("diffusion_model.", dotted),
        ("diffusion_model.", named_by_diffusers),
        ("model.diffusion_model.", dotted),
        ("pipe.dit.", dotted),
        ("unet.", named_by_diffusers),
        ("transformer.", dotted),
        ("transformer.", named_by_diffusers),
        ("base_model.model.", dotted),
        ("base_model.model.", named_by_diffusers),
        ("lora_unet_", dotted),
        ("lora_unet_", underscored),
        ("lora_unet__", underscored),
        ("lora_transformer_", lambda layer: underscored(named_by_diffusers(layer))),
        ("", dotted),
        ("", named_by_diffusers),
    ],
)
@pytest.mark.parametrize("kind", ["lora_A.weight", "lora_A.default.weight", "lora_down.weight"])
def test_what_is_read_is_applied(pipeline, inputs, saved, prefix, name, kind):
    """Two layers of a block alone: diffusers itself asks for whole blocks of kohya's."""
    layers, down = [Q, "blocks.1.cross_attn.o"], kind.replace("lora_", "")
    pairs = random_pairs(*layers)
    state = pipeline.transformer.state_dict()
    for layer in layers:
        b, a = (pairs[f"{layer}.lora_{side}.weight"] for side in "BA")
        state[f"{named_by_diffusers(layer)}.weight"] += b @ a
    pipeline.transformer.load_state_dict(state)
    expected = velocity(pipeline.transformer, inputs)
    for layer in layers:
        b, a = (pairs[f"{layer}.lora_{side}.weight"] for side in "BA")
        state[f"{named_by_diffusers(layer)}.weight"] -= b @ a
    pipeline.transformer.load_state_dict(state)
    up = down.replace("A", "B").replace("down", "up")
    tensors = {}
    for layer in layers:
        tensors[f"{prefix}{name(layer)}.lora_{down}"] = pairs[f"{layer}.lora_A.weight"]
        tensors[f"{prefix}{name(layer)}.lora_{up}"] = pairs[f"{layer}.lora_B.weight"]
    pipeline.load_lora_weights(saved(tensors))
    torch.testing.assert_close(velocity(pipeline.transformer, inputs), expected, atol=1e-3, rtol=1e-3)


SHAPES = {Q: (24, 24), "blocks.1.ffn.0": (32, 24), "head.head": (64, 24), "patch_embedding": (24, 16, 1, 2, 2)}


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("to", [None, "native", "kohya"])
def test_changes_of_whole_weights_and_biases_are_applied(pipeline, inputs, saved, tmp_path, scale, to):
    """As distilled LoRAs have them, beside matrices and without, at any scale; and unloading takes them away."""
    base = velocity(pipeline.transformer, inputs)
    torch.manual_seed(0)
    changes = {}
    for layer, shape in SHAPES.items():
        changes[f"{layer}.diff"] = torch.randn(shape) * 0.1
    for layer in (*SHAPES, "time_embedding.0"):  # the last has a bias alone
        changes[f"{layer}.diff_b"] = torch.randn(SHAPES.get(layer, (24,))[0]) * 0.1
    pair = {key: 0.1 * tensor for key, tensor in random_pairs(Q).items()}
    whole = {key: tensor.clone() for key, tensor in pipeline.transformer.state_dict().items()}
    for name, change in changes.items():
        layer, _, kind = name.rpartition(".")
        whole[f"{named_by_diffusers(layer)}.{'weight' if kind == 'diff' else 'bias'}"] += scale * change
    whole["blocks.0.attn1.to_q.weight"] += scale * (pair[f"{Q}.lora_B.weight"] @ pair[f"{Q}.lora_A.weight"])
    transformer = type(pipeline.transformer).from_config(pipeline.transformer.config).eval()
    transformer.load_state_dict(whole)
    expected = velocity(transformer, inputs)
    file = saved({f"diffusion_model.{key}": tensor for key, tensor in (changes | pair).items()})
    if to is not None:
        assert main(["lora", "convert", str(file), "--output", str(tmp_path / "to.safetensors"), "--to", to]) == 0
        file = tmp_path / "to.safetensors"
    pipeline.load_lora_weights(file, adapter_name="distilled")
    pipeline.set_adapters(["distilled"], [scale])
    torch.testing.assert_close(velocity(pipeline.transformer, inputs), expected, atol=1e-5, rtol=1e-5)
    pipeline.unload_lora_weights()
    assert torch.equal(velocity(pipeline.transformer, inputs), base)


def test_diffusers_style_cannot_hold_them(saved, tmp_path, capsys):
    file = saved({**random_pairs(f"diffusion_model.{Q}"), f"diffusion_model.{Q}.diff_b": torch.zeros(24)})
    words = ["lora", "convert", str(file), "--output", str(tmp_path / "to.safetensors"), "--to", "diffusers"]
    assert main(words) == 1
    assert "Write native style" in capsys.readouterr().err


def test_a_lora_of_another_width_is_told_with_both_names(pipeline, saved):
    pair = {"lora_A": torch.zeros(1, 5120), "lora_B": torch.zeros(5120, 1)}
    file = saved({f"diffusion_model.{Q}.{name}.weight": tensor for name, tensor in pair.items()})
    with pytest.raises(ValueError, match=r"lora.safetensors is for Wan 2.1 14B, but this model is .* of width 24"):
        pipeline.load_lora_weights(file)
    assert not pipeline.get_list_adapters()


def test_blocks_that_the_model_lacks_are_counted(pipeline, saved, caplog):
    pipeline.load_lora_weights(saved(random_pairs(*(f"diffusion_model.blocks.{n}.self_attn.q" for n in range(5)))))
    assert "3 of its layers are not in this model, and are not applied (of 3 blocks" in caplog.text
    assert pipeline.get_list_adapters()


def test_a_lora_of_missing_blocks_alone_is_refused(pipeline, saved):
    with pytest.raises(ValueError, match="changes no layer of this model"):
        pipeline.load_lora_weights(saved(random_pairs("diffusion_model.blocks.29.self_attn.q")))


@pytest.mark.parametrize(
    ("key", "shape"), [(f"diffusion_model.{Q}.diff_b", 23), ("diffusion_model.blocks.0.ffn.0.diff", (24, 24))]
)
def test_differences_of_another_shape_are_named(pipeline, saved, key, shape):
    with pytest.raises(ValueError, match=f"{key} has shape"):
        pipeline.load_lora_weights(saved({**random_pairs(f"diffusion_model.{Q}"), key: torch.zeros(shape)}))


def test_matrices_of_another_shape_are_named(pipeline, saved):
    pair = {"lora_A": torch.zeros(2, 24), "lora_B": torch.zeros(31, 2)}
    file = saved({f"diffusion_model.blocks.0.ffn.0.{name}.weight": tensor for name, tensor in pair.items()})
    with pytest.raises(ValueError, match=r"blocks.0.ffn.0 has matrices of .*, which do not make \(32, 24\)"):
        pipeline.load_lora_weights(file)


def test_numbers_that_are_not_finite_are_refused(pipeline, saved):
    file = saved({key: tensor * float("nan") for key, tensor in random_pairs(f"diffusion_model.{Q}").items()})
    for read in (read_lora, pipeline.load_lora_weights):
        with pytest.raises(ValueError, match="not finite"):
            read(file)


def test_a_bias_of_lora_b_is_scaled_with_it(saved):
    tensors = {**random_pairs(Q), f"{Q}.alpha": torch.tensor(2.0), f"{Q}.lora_B.bias": torch.ones(24)}
    assert torch.equal(read_lora(saved(tensors)).differences[f"diffusion_model.{Q}.diff_b"], torch.full((24,), 0.5))


@pytest.mark.parametrize("where", ["folder", "weight_name", "tensors"])
def test_a_lora_comes_from_a_folder_or_tensors_too(pipeline, saved, tmp_path, where):
    tensors = random_pairs("pipe.dit." + Q)
    file = saved(tensors)
    options = {"weight_name": file.name} if where == "weight_name" else {}
    if where == "weight_name":
        saved(tensors, "other.safetensors")
    pipeline.load_lora_weights(tensors if where == "tensors" else tmp_path, adapter_name="a", **options)
    assert pipeline.get_list_adapters() == {"transformer": ["a"]}


def test_a_mistyped_path_is_told_before_the_hub_is_asked(pipeline, tmp_path, monkeypatch, caplog):
    (tmp_path / "loras").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="loras/mistyped is not a file or folder here"):
        pipeline.load_lora_weights("loras/mistyped")
    assert caplog.text.count("There is no folder loras/mistyped here") == 1


def test_a_plain_file_keeps_its_metadata(pipeline, tmp_path):
    """So that the adapter can be saved again as it was."""
    layers = add_lora(pipeline.transformer)
    config = pipeline.transformer.peft_config["default"].to_dict()
    pipeline.transformer.delete_adapters("default")
    where = {"transformer_lora_layers": layers, "transformer_lora_adapter_metadata": config}
    RefAlignWanPipeline.save_lora_weights(tmp_path, **where)
    pipeline.load_lora_weights(tmp_path, adapter_name="a")
    assert pipeline.transformer.peft_config["a"].lora_alpha == ALPHA


def test_metadata_without_target_modules_scales_too(pipeline, inputs, saved):
    tensors = random_pairs("transformer.blocks.0.attn1.to_q")
    metadata = json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 2 * RANK})
    pipeline.load_lora_weights(saved(tensors, lora_adapter_metadata=metadata), adapter_name="a")
    found = velocity(pipeline.transformer, inputs)
    pipeline.load_lora_weights(saved(tensors, "plain.safetensors"), adapter_name="b")
    pipeline.set_adapters(["b"], [2.0])
    torch.testing.assert_close(velocity(pipeline.transformer, inputs), found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["lora.bin", "lora.gguf"])
def test_no_lora_is_unpickled(pipeline, tmp_path, name):
    torch.save(random_pairs(f"diffusion_model.{Q}"), tmp_path / name)
    for source, options in ((tmp_path / name, {}), (tmp_path, {"weight_name": name})):
        with pytest.raises(ValueError, match=name):
            pipeline.load_lora_weights(source, **options)


# The commands


def test_inspect_shows_what_there_is(saved, capsys):
    tensors = {
        "lora_unet_blocks_0_ffn_0.lora_down.weight": torch.ones(2, 1536),
        "lora_unet_blocks_0_ffn_0.lora_up.weight": torch.ones(8960, 2),
        "lora_unet_blocks_3_ffn_0.lora_down.weight": torch.zeros(2, 1536),
        "lora_unet_blocks_3_ffn_0.lora_up.weight": torch.ones(8960, 2),
        "lora_unet_blocks_0_ffn_0.alpha": torch.tensor(1),
    }
    assert main(["lora", "inspect", str(saved(tensors))]) == 0
    out = capsys.readouterr().out
    largest = (torch.ones(8960, 1536).double()).norm().item()
    for part in ("kohya style", "4 F32, 1 I64", "rank: 2, scale (alpha / rank): 0.5, 1", "fits: Wan 2.1 1.3B"):
        assert part in out
    words = out.splitlines()[-1].split()
    assert words == ["ffn.0", "2", "(0-3)", f"{largest / 2:.4g}", f"{largest:.4g}"]


@pytest.mark.parametrize(
    ("width", "layer", "base"),
    [
        (5120, Q, "Wan 2.1 14B"),
        (3072, Q, "Wan 2.2 5B"),
        (2048, Q, "unknown base"),
        (1536, "text_embedding.0", "Wan 2.1 1.3B"),
    ],
)
def test_inspect_tells_the_base_by_its_width(saved, capsys, width, layer, base):
    narrow = 4096 if layer == "text_embedding.0" else width
    pair = {"lora_A": torch.zeros(1, narrow), "lora_B": torch.zeros(width, 1)}
    file = saved({f"diffusion_model.{layer}.{name}.weight": tensor for name, tensor in pair.items()})
    assert main(["lora", "inspect", str(file)]) == 0
    assert f"fits: {base} (width {width})" in capsys.readouterr().out


@pytest.mark.parametrize("style", LORA_STYLES)
def test_convert_writes_the_style(trained, tmp_path, capsys, style):
    source = write_lora(trained, tmp_path / "source.safetensors", "native")
    words = ["lora", "convert", source, "--output", tmp_path / "out.safetensors", "--to", style]
    assert main(list(map(str, words))) == 0
    assert read_lora(tmp_path / "out.safetensors").style == style
    assert "out.safetensors" in capsys.readouterr().out


def test_convert_tells_mistakes_in_a_line_and_leaves_nothing(tmp_path, capsys):
    (tmp_path / "lora.ckpt").write_bytes(b"")
    words = ["lora", "convert", tmp_path / "lora.ckpt", "--output", tmp_path / "out.safetensors", "--to", "native"]
    assert main(list(map(str, words))) == 1
    assert "not a safetensors file" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["lora.ckpt"]
