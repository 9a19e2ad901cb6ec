"""`refalign prompt`: what a model of transformers' task image-text-to-text writes becomes a prompt, or is told."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from refalign import prompt
from refalign.cli import main
from refalign.prompt import checked_prompt


SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
CHARACTERS = [*map(chr, range(32, 127)), "\n"]
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ '\\n' }}{% endfor %}"
)
BERNINI = ("The woman from ", "image0", " walks the dog from ", "image1", ".", "</s>")
REFALIGN = ("A woman [image0]", " walks her dog", " [image1].", "</s>")


def write_model(folder: Path, answer: tuple[str, ...]) -> Path:
    """A LLaVA of random vision weights, whose language model says the next part of an answer behind each part, and the
    first one behind the end of the conversation."""
    words = [*SPECIAL, *CHARACTERS, *(part for part in answer if part not in SPECIAL + CHARACTERS)]
    numbers = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=["<image>"], **special)
    width = 4 * len(words)  # of two heads, each of an even width
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    sizes = {"hidden_size": width, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = LlamaConfig(
        **sizes, vocab_size=len(words), max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=numbers["<image>"])
    )
    layer = model.model.language_model.layers[0]
    head = torch.zeros(len(words), width)
    for before, after in zip(("\n", *answer[:-1]), answer, strict=True):
        head[numbers[after], numbers[before]] = 1
    with torch.no_grad():
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            weight.zero_()
        model.model.language_model.embed_tokens.weight.copy_(torch.eye(len(words), width))
        model.lm_head.weight.copy_(head)
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        pictures,
        fast,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def writers(tmp_path_factory) -> dict[str, Path]:
    """A model that writes in each family's form."""
    folder = tmp_path_factory.mktemp("writers")
    return {
        "bernini": write_model(folder / "bernini", BERNINI),
        "refalign": write_model(folder / "refalign", REFALIGN),
    }


@pytest.fixture
def pictures(tmp_path) -> list[str]:
    paths = []
    for name, size in (("woman.png", (40, 60)), ("dog.png", (900, 30))):
        Image.new("RGBA", size, (200, 30, 30, 128)).save(tmp_path / name)
        paths.append(str(tmp_path / name))
    return paths


WORDS = "she walks her dog"


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("bernini", "The woman from image0 walks the dog from image1."),
        ("refalign", "A woman walks her dog."),
    ],
)
def test_what_the_model_writes_is_printed_in_the_form_of_the_family(writers, pictures, capsys, family, expected):
    words = ["prompt", "--model", str(writers[family]), "--family", family, "--device", "cpu"]
    assert main([*words, "--reference", *pictures, WORDS]) == 0
    assert capsys.readouterr().out == f"{expected}\n"


def test_the_model_is_asked_about_all_pictures_and_words(pictures):
    images = [prompt._shown(path) for path in pictures]
    (message,) = prompt._messages(WORDS, images, "bernini")
    assert [part["image"].size for part in message["content"] if part["type"] == "image"] == [(40, 60), (768, 26)]
    text = "".join(part.get("text", "") for part in message["content"])
    assert text.startswith("image0:image1:") and WORDS in text and "Generate a video where" in text


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (" \n", "wrote nothing"),
        ("The woman from image0 walks.", "leaves out image1: 'The woman"),
        ("Both image0 and image1 and image7.", "names image7, where there is none"),
        ("image2", "leaves out image0, image1 and names image2"),
    ],
)
@pytest.mark.parametrize("family", ["bernini", "refalign"])
def test_an_answer_that_does_not_fit_the_references_is_told_in_one_line(answer, message, family):
    with pytest.raises(ValueError, match=message) as error:
        checked_prompt(answer, 2, family, "writer")
    assert "\n" not in str(error.value)


def test_names_are_written_as_the_model_was_trained():
    assert checked_prompt('"The woman from Image 0\nand image_1."', 2, "bernini", "x") == (
        "The woman from image0 and image1."
    )


def test_subjects_in_another_order_than_the_pictures_are_told(caplog):
    assert checked_prompt("A dog [image1] and a woman (image0).", 2, "refalign", "x") == "A dog and a woman."
    assert "order of the pictures" in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([WORDS], "There is no reference"),
        (["--reference", "{woman}"], "There are no words"),
        (["--reference", "{woman}", "missing.png", WORDS], "Reference 2: missing.png does not exist"),
        (["--reference", "{woman}", WORDS, "--model", "{clip}"], "is of the kind clip_vision_model, which does not"),
        (["--reference", "{woman}", WORDS, "--model", "{folder}"], "is not a model of transformers"),
    ],
)
def test_what_is_missing_or_wrong_is_told_in_one_line(writers, pictures, tmp_path, capsys, words, message):
    clip = tmp_path / "clip"
    clip.mkdir()
    (clip / "config.json").write_text(json.dumps({"model_type": "clip_vision_model"}))
    places = {"woman": pictures[0], "clip": clip, "folder": tmp_path}
    words = [word.format(**places) for word in words]
    model = [] if "--model" in words else ["--model", str(writers["bernini"])]
    assert main(["prompt", *words, *model, "--device", "cpu"]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_an_answer_without_end_is_cut_and_told(writers, pictures, capsys):
    words = ["prompt", WORDS, "--model", str(writers["bernini"]), "--family", "bernini", "--max-new-tokens", "2"]
    assert main([*words, "--device", "cpu", "--reference", *pictures]) == 1
    assert "leaves out image1: 'The woman from image0'" in capsys.readouterr().err
