"""The option tree, the files that fill it, and the recipes that are shipped."""

import argparse
import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import tyro
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from hypothesis import given, settings
from hypothesis import strategies as st

import refalign_training.run.config as config
from refalign_training.bounds import InvalidOption
from refalign_training.cache.command import CacheCommand
from refalign_training.data.source import Source
from refalign_training.run import resume
from refalign_training.run.checks import check
from refalign_training.run.config import PromptOptions, RunCommand, flatten, to_yaml
from refalign_training.run.config_files import read_command
from refalign_training.run.resume import changed_options
from refalign_training.run.yaml_file import read_yaml


CONFIGS = Path(__file__).parents[3] / "training/configs"
# Wan's. Those of other models are tested where these are
RECIPES = [
    path for path in sorted(CONFIGS.glob("[!sd]*.yaml")) if not path.stem.startswith(("refine", "lora-bernini"))
]
DISTILLATIONS = sorted(CONFIGS.glob("distil-*.yaml"))
ACCELERATE = {path.stem: path for path in (CONFIGS / "accelerate").glob("*.yaml")}
OF_THE_CALL = ("config", "resume", "allow_changes", "dry_run", "gpu_memory")


@pytest.fixture
def read(tmp_path):
    """A file's text, and more of a command line, to the options."""

    def read(text: str, *more: str) -> RunCommand:
        file = tmp_path / "run.yaml"
        file.write_text(text, "utf-8")
        return parse("--config", str(file), *more)

    return read


def parse(*arguments: str) -> RunCommand:
    return read_command(arguments)


def changed(command: RunCommand) -> dict[str, Any]:
    """The options that are not at their default."""
    default = flatten(RunCommand(Path("run")))
    return {name: value for name, value in flatten(command).items() if value != default[name] and name != "config"}


# -- Files ------------------------------------------------------------------------------------------------------------


def test_a_file_fills_sections_at_any_depth(read):
    command = read(
        "output: run\nsteps: 5\noptimizer: {betas: [0.9, 0.95]}\n"
        "data: {source: {annotations: [a.json, b.json], rule: {max_references: 2}}}"
    )
    assert changed(command) == {
        "steps": 5,
        "optimizer.betas": [0.9, 0.95],
        "data.source.annotations": ["a.json", "b.json"],
        "data.source.rule.max_references": 2,
    }


@pytest.mark.parametrize("form", [("--config={}",), ("--config", "{}")])
def test_both_forms_of_the_option_name_the_file(tmp_path, form):
    file = tmp_path / "run.yaml"
    file.write_text("output: run\nsteps: 5")
    assert parse(*(word.format(file) for word in form)).steps == 5


def test_no_file_is_needed():
    assert changed(parse("--output", "run", "--steps", "5")) == {"steps": 5}


@pytest.mark.parametrize(
    ("in_file", "on_the_line", "option", "value"),
    [
        ("steps: 5", ["--steps", "6"], "steps", 6),
        ("lora: {targets: [a, b]}", ["--lora.targets", "c"], "lora.targets", ["c"]),
        ("model: {gradient_checkpointing: false}", ["--model.gradient-checkpointing"], None, None),
        ("allow_changes: true", ["--no-allow-changes"], None, None),
        ("optimizer: {ema_decay: 0.9}", ["--optimizer.ema-decay", "None"], None, None),
    ],
)
@pytest.mark.parametrize("is_first", [True, False])
def test_the_command_line_wins_over_the_file(tmp_path, in_file, on_the_line, option, value, is_first):
    file = tmp_path / "run.yaml"
    file.write_text(f"output: run\n{in_file}")
    named = ["--config", str(file)]
    command = parse(*on_the_line, *named) if is_first else parse(*named, *on_the_line)
    assert changed(command) == ({} if option is None else {option: value})


def test_a_recipe_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = dataclasses.replace(parse("--config", "lora-1.3b"), config=None)
    assert named == dataclasses.replace(parse("--config", str(CONFIGS / "lora-1.3b.yaml")), config=None)


def test_help_shows_what_a_file_says(read, capsys):
    with pytest.raises(SystemExit):
        read("steps: 7654", "--help")
    assert "7654" in capsys.readouterr().out


def test_an_output_that_neither_file_nor_line_names_is_asked_for(read, capsys):
    with pytest.raises(SystemExit) as exit:
        read("steps: 5")
    assert exit.value.code == 2
    assert "--output" in capsys.readouterr().err


# -- A run that goes on -----------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path) -> Path:
    """A run's folder with its options."""
    folder = tmp_path / "own"
    (folder / "checkpoints/step-00000005").mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(replaced(RunCommand(folder), "lora.rank", 7)))
    return folder


@pytest.mark.parametrize("resume", ["latest", "auto"])
def test_a_run_that_goes_on_takes_its_folders_options(own, resume):
    assert parse("--resume", resume, "--output", str(own)).lora.rank == 7


@pytest.mark.parametrize("place", [".", "checkpoints/step-00000005"])
def test_a_run_from_a_checkpoint_takes_the_options_of_its_run(own, place):
    command = parse(f"--resume={own / place}")
    assert (command.lora.rank, command.output) == (7, own)


def test_the_line_wins_over_the_folders_options(own):
    assert parse("--resume", "latest", "--output", str(own), "--lora.rank", "8").lora.rank == 8


def test_a_file_that_is_named_wins_over_the_folders_options(own, read):
    assert read("lora: {rank: 9}", "--resume", "latest", "--output", str(own)).lora.rank == 9


@pytest.mark.parametrize("words", [("--resume", "latest", "--output", "nowhere"), ("--resume", "nowhere")])
def test_a_run_that_is_not_there_is_told(words):
    with pytest.raises(ValueError, match="there is no folder nowhere"):
        check(parse(*words, *(() if "--output" in words else ("--output", "run"))))


def test_a_new_run_takes_nothing_from_its_folder(own):
    assert parse("--output", str(own)).lora.rank == 64


# -- Wrong files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["[1, 2]", "steps", "", "a: [", "\t: 1"])
def test_a_file_of_something_else_is_refused_by_name(read, text):
    with pytest.raises(ValueError, match=r"run\.yaml (cannot be read|must hold)"):
        read(text)


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match=r"nowhere\.yaml does not exist\. .* recipes: .*lora-1\.3b, "):
        parse("--config", "nowhere.yaml")


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"run\.yaml cannot be read"):
        parse("--config", str(tmp_path / "run.yaml"))


def test_a_file_cannot_name_another(read):
    with pytest.raises(ValueError, match="names another file"):
        read("output: run\nconfig: other.yaml")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("step: 1", "step is not an option. Did you mean steps?"),
        ("optimizer: {emma_decay: 1}", "optimizer.emma_decay is not an option. Did you mean optimizer.ema_decay?"),
        ("data: {source: {rule: {max_refs: 1}}}", "Did you mean data.source.rule.max_references?"),
        ("optimiser: {lr: 1}", "optimiser is not an option. Did you mean optimizer?"),
        ("lr: 1", "lr is not an option. Did you mean optimizer.lr?"),
        ("model: {rank: 1}", "model.rank is not an option. Did you mean lora.rank?"),
        ("zzzzzz: 1", "zzzzzz is not an option."),
        ("1: 2", "1 is not an option."),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(read, text, told):
    with pytest.raises(ValueError) as error:
        read(f"output: run\n{text}")
    assert str(error.value).endswith(told)


# -- Values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "option", "value"),
    [
        ("optimizer: {lr: 1e-5}", "optimizer.lr", 1e-5),  # text to YAML, which wants 1.0e-5
        ("optimizer: {lr: 1.0e-5}", "optimizer.lr", 1e-5),
        ("optimizer: {lr: 1}", "optimizer.lr", 1.0),
        ("steps: 20_000", "steps", 20_000),
        ("seed: -1", "seed", -1),
        ("model: {gradient_checkpointing: no}", "model.gradient_checkpointing", False),
        ("model: {gradient_checkpointing: off}", "model.gradient_checkpointing", False),
        ("dry_run: yes", "dry_run", True),
        ("data: {source: {rule: {unscored: false}}}", "data.source.rule.unscored", False),
        ("data: {source: {rule: {max_image_similarity: null}}}", "data.source.rule.max_image_similarity", None),
        ("data: {source: {rule: {max_image_similarity: }}}", "data.source.rule.max_image_similarity", None),
        ("alignment: {layers: 3}", "alignment.layers", [3]),
        ("lora: {targets: to_q}", "lora.targets", ["to_q"]),
        ('model: {revision: "0123"}', "model.revision", "0123"),
        ('model: {base: "null"}', "model.base", "null"),
        ('model: {base: "a folder/with #, é and \'"}', "model.base", "a folder/with #, é and '"),
    ],
)
def test_values_of_yaml(read, text, option, value):
    assert changed(read(f"output: run\n{text}")) == {option: value}


@pytest.mark.parametrize("option", ["ema_decay", "projector_lr"])
def test_null_is_none(read, option):
    assert getattr(read(f"output: run\noptimizer: {{{option}: null}}").optimizer, option) is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("steps: [1, 2]", "steps is [1, 2]: it must be a whole number."),
        ("steps: {a: 1}", "steps is {'a': 1}: it must be a whole number."),
        ("steps: yes", "steps is True: it must be a whole number."),
        ("steps:", "steps is None: it must be a whole number."),
        ("steps: 1e4", "steps is 10000.0: it must be a whole number."),
        ("steps: 1.5", "steps is 1.5: it must be a whole number."),
        ('steps: "5"', "steps is '5': it must be a whole number."),
        ("steps: 0", "steps is 0: it must be above 0."),
        ("output:", "output is None: it must be text; put it in quotes."),
        ("training: all", "training is 'all': it must be 'lora' or 'full'."),
        ("model: {base: null}", "model.base is None: it must be text; put it in quotes."),
        ("log: {tracker: no}", "log.tracker is False: it must be 'tensorboard', 'trackio', 'wandb' or 'none'."),
        ("optimizer: {lr: fast}", "optimizer.lr is 'fast': it must be a number."),
        ("optimizer: {lr: yes}", "optimizer.lr is True: it must be a number."),
        ("optimizer: {lr: .inf}", "optimizer.lr is inf: it must be a finite number."),
        ("optimizer: {betas: 0.9}", "optimizer.betas is 0.9: it must be a list."),
        ("optimizer: {betas: [0.9]}", "optimizer.betas lacks a value."),
        (
            "optimizer: {betas: [0.9, 0.9, 0.9]}",
            "optimizer.betas is (0.9, 0.9, 0.9): it must be a list of 2 or fewer.",
        ),
        ("alignment: {layers: true}", "alignment.layers is True: it must be a whole number."),
        ("alignment: {layers: [[1]]}", "alignment.layers is [1]: it must be a whole number."),
        ("alignment: {layers: [a]}", "alignment.layers is 'a': it must be a whole number."),
        ("alignment: {layers: []}", "alignment.layers is []: it must be a list of 1 or more."),
        ("lora: {targets: null}", "lora.targets is None: it must be text; put it in quotes."),
        ("lora: {targets: [yes]}", "lora.targets is True: it must be text; put it in quotes."),
        ("data: {source: {annotations: [null]}}", "data.source.annotations is None: it must be text"),
        (
            "model: {gradient_checkpointing: maybe}",
            "model.gradient_checkpointing is 'maybe': it must be true or false.",
        ),
        ("model: {gradient_checkpointing: null}", "model.gradient_checkpointing is None: it must be true or false."),
        ("model: {gradient_checkpointing: 1}", "model.gradient_checkpointing is 1: it must be true or false."),
        ("model: {revision: 0123}", "model.revision is 83: it must be text; put it in quotes."),
        ("model: {revision: 1e5}", "model.revision is 100000.0: it must be text; put it in quotes."),
        ("output: 2026-01-01", "output is {'date': '2026-01-01'}: it must be text; put it in quotes."),
        ("optimizer:", "optimizer is None: it must be a section with options of its own."),
        ("optimizer: 3", "optimizer is 3: it must be a section with options of its own."),
        ("validation: {prompts: [{seed: 1}]}", "validation.prompts.prompt lacks a value."),
        ("validation: {prompts: [{prompt: a, seeds: 1}]}", "validation.prompts.seeds is not an option."),
        ("validation: {prompts: a dog}", "validation.prompts is 'a dog': it must be a list."),
        ("validation: {prompts: [{prompt: a, seed: -1}]}", "validation.prompts.seed is -1: it must be 0 or more."),
        ("data: {source: folder}", "data.source is 'folder': it must be a section with options of its own."),
    ],
)
def test_a_file_with_a_wrong_value_is_refused(read, text, told):
    with pytest.raises(ValueError) as error:
        read(text if text.startswith("output") else f"output: run\n{text}")
    assert f"run.yaml: {told}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--steps", "0"], "steps is 0: it must be above 0."),
        (["--optimizer.lr", "nan"], "optimizer.lr is nan: it must be a finite number."),
        (["--optimizer.betas", "0.9", "1"], "optimizer.betas is 1.0: it must be below 1."),
        (["--data.recipe.height", "40"], "data.recipe.height is 40: it must be a multiple of 16."),
        (["--data.recipe.num-frames", "80"], "data.recipe.num_frames is 80: it must be 4k + 1, such as 81."),
        (["--alignment.decay-steps", "5"], "alignment.decay_start is None and decay_steps 5: set both."),
    ],
)
def test_a_command_line_with_a_wrong_value_is_refused_in_the_same_words(words, told):
    with pytest.raises(ValueError) as error:
        parse("--output", "run", *words)
    assert str(error.value).startswith(told)


def test_a_word_of_a_wrong_type_is_told(capsys):
    with pytest.raises(SystemExit) as exit:
        parse("--output", "run", "--steps", "1.5")
    assert exit.value.code == 2
    assert "--steps" in capsys.readouterr().err


# -- Round trip -------------------------------------------------------------------------------------------------------

TEXTS = st.text("abz019 ./_:#'\"é-", min_size=1, max_size=8).map(lambda text: f"x{text}")
FLOATS = st.floats(0, 1e6, allow_nan=False) | st.sampled_from([5e-5, 1e-8, 1e16])
BETAS = st.floats(0, 1, exclude_max=True)
PROMPTS = st.builds(PromptOptions, TEXTS, st.lists(TEXTS, max_size=2), st.integers(0, 9))
VALUES = {
    "steps": st.integers(1, 10**9),
    "seed": st.integers(-(10**6), 10**6),
    "training": st.sampled_from(["lora", "full"]),
    "model.base": TEXTS,
    "model.revision": st.none() | TEXTS | st.sampled_from(["0123", "null", "yes", "1e5", "2026-01-01"]),
    "model.start": st.none() | TEXTS.map(Path),
    "model.gradient_checkpointing": st.booleans(),
    "lora.alpha": FLOATS,
    "lora.targets": st.lists(TEXTS, min_size=1, max_size=3).map(tuple),
    "data.cache": st.none() | TEXTS.map(Path),
    "data.source.data": st.sampled_from([None, "folder", "samples"]),
    "data.source.annotations": st.lists(TEXTS.map(Path), max_size=3).map(tuple),
    "data.source.rule.unscored": st.booleans(),
    "data.source.rule.max_image_similarity": st.none() | FLOATS,
    "optimizer.lr": FLOATS,
    "optimizer.projector_lr": st.none() | FLOATS,
    "optimizer.betas": st.tuples(BETAS, BETAS),
    "alignment.layers": st.lists(st.integers(0, 99), min_size=1, max_size=5).map(tuple),
    "alignment.spatial_norm": st.booleans(),
    "alignment.stop_step": st.none() | st.integers(0, 10**6),
    "validation.prompts": st.lists(st.builds(PromptOptions, TEXTS, st.lists(TEXTS, max_size=2)), max_size=2).map(
        tuple
    ),
    "log.tracker": st.sampled_from(["tensorboard", "none"]),
    "allow_changes": st.booleans(),
    "resume": st.none() | TEXTS,
}


def replaced(options: Any, name: str, value: Any) -> Any:
    """The tree with another value at a dotted name."""
    section, _, rest = name.partition(".")
    new = replaced(getattr(options, section), rest, value) if rest else value
    return dataclasses.replace(options, **{section: new})


@settings(max_examples=15, deadline=None)
@given(changes=st.fixed_dictionaries({}, optional=VALUES))
def test_what_is_written_is_read_again(tmp_path_factory, changes):
    command = RunCommand(Path("run"))
    for name, value in changes.items():
        command = replaced(command, name, value)
    file = tmp_path_factory.mktemp("written") / "config.yaml"
    file.write_text(to_yaml(command), "utf-8")
    again = parse("--config", str(file))
    default = RunCommand(Path("run"))
    for name in OF_THE_CALL:
        assert name not in yaml.safe_load(file.read_text("utf-8"))
        command, again = (dataclasses.replace(c, **{name: getattr(default, name)}) for c in (command, again))
    assert again == command


# -- Going on with other options --------------------------------------------------------------------------------------


def flat(**changes: Any) -> dict[str, Any]:
    return flatten(RunCommand(Path("run"))) | {name.replace("__", "."): value for name, value in changes.items()}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"optimizer__lr": 1e-3}, ["optimizer.lr: 5e-05 -> 0.001"]),
        ({"seed": 1, "batch__size": 4}, ["batch.size: 8 -> 4", "seed: 0 -> 1"]),
        ({"output": "elsewhere", "resume": "latest", "device": "cpu", "parallel": "ddp", "dry_run": True}, []),
        ({"checkpoints__every": 1, "log__tracker": "none", "data__workers": 0, "validation__every": 1}, []),
        ({"validation__prompts": [{"prompt": "a", "references": [], "seed": 0}]}, []),
        ({"validation__samples": 1}, ["validation.samples: 16 -> 1"]),
        ({"steps": 20_000}, []),
        ({"new__option": 1}, ["new.option: None -> 1"]),
    ],
)
def test_options_that_matter_are_told(changes, told):
    assert changed_options(flat(), flat(**changes)) == told


def test_steps_matter_where_the_learning_rate_depends_on_them():
    old, new = (flat(optimizer__schedule="cosine", steps=steps) for steps in (1, 2))
    assert changed_options(old, new) == ["steps: 1 -> 2"]


def test_an_option_that_is_gone_is_told():
    assert changed_options(flat(gone=1), flat()) == ["gone: 1 -> None"]


def test_a_checkpoint_holds_options_as_json_gives_them_back():
    assert changed_options(json.loads(json.dumps(flat())), flat()) == []


def test_free_options_exist():
    known = flatten(RunCommand(Path("run")))
    for free in resume.FREE_OPTIONS:
        assert any(name == free or name.startswith(f"{free}.") for name in known), free


# -- Values that cannot be meant --------------------------------------------------------------------------------------


def cached(**changes: Any) -> RunCommand:
    command = replaced(RunCommand(Path("run")), "data.cache", Path("cache"))
    for name, value in changes.items():
        command = replaced(command, name.replace("__", "."), value)
    return command


def test_the_defaults_pass():
    check(cached())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"batch__size": 3, "batch__micro": 2}, "batch.size is 3, which 1 processes with batch.micro 2"),
        ({"optimizer__warmup_steps": 10_001}, "optimizer.warmup_steps is 10001, more than the 10000 steps"),
        (
            {"validation__prompts": (PromptOptions("a", "nowhere.png"),)},
            "validation.prompts, prompt 1: the reference nowhere.png does not exist.",
        ),
        ({"data__cache": None}, "Pass either data.cache"),
        ({"data__teacher": "t"}, "data.teacher goes with a dataset"),
        ({"data__cache": None, "data__source__data": "folder"}, "data.teacher must name"),
        (
            {
                "data__cache": None,
                "data__source__data": "folder",
                "data__teacher": "t",
                "validation__cache": Path("other"),
            },
            "validation.cache goes with data.cache",
        ),
    ],
)
def test_options_that_do_not_fit_each_other_are_refused_by_name(changes, told):
    with pytest.raises(ValueError) as error:
        check(cached(**changes))
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"steps": 0}, "steps is 0: it must be above 0."),
        ({"batch__micro": 0}, "micro is 0"),
        ({"lora__rank": 0}, "rank is 0"),
        ({"checkpoints__keep_last": 0}, "keep_last is 0"),
        ({"checkpoints__keep_every": 0}, "keep_every is 0"),
        ({"data__workers": -1}, "workers is -1: it must be 0 or more."),
        ({"optimizer__lr": -1.0}, "lr is -1.0"),
        ({"optimizer__lr": float("nan")}, "lr is nan"),
        ({"optimizer__lr": float("inf")}, "lr is inf"),
        ({"optimizer__projector_lr": -1.0}, "projector_lr is -1.0"),
        ({"objective__no_text": 0.9}, "with no_references and neither it must be 1 or less in sum, but is 1.1"),
        ({"alignment__decay_start": 5}, "decay_start is 5 and decay_steps 0: set both"),
        ({"alignment__layers": ()}, "layers is (): it must be a list of 1 or more"),
        ({"optimizer__ema_decay": 1.0}, "ema_decay is 1.0: it must be below 1."),
        ({"optimizer__ema_decay": -0.1}, "ema_decay is -0.1"),
        ({"lora__dropout": 1.0}, "dropout is 1.0"),
        ({"model__compile": 1}, "compile is 1: it must be true or false."),
    ],
)
def test_values_that_cannot_be_meant_are_refused(changes, told):
    with pytest.raises(InvalidOption) as error:
        cached(**changes)
    assert told in str(error.value)


def test_a_cache_may_stand_beside_what_it_is_made_of():
    check(cached(data__source__data="folder", data__teacher="t", validation__cache=Path("other")))


def test_without_alignment_no_teacher_is_needed():
    check(cached(data__cache=None, data__source__data="folder", alignment__weight=0.0))


# -- Recipes ----------------------------------------------------------------------------------------------------------


def comments(path: Path) -> str:
    """The comments' text, lines that go on joined."""
    lines = [line.strip().lstrip("#").strip() for line in path.read_text("utf-8").splitlines() if "#" in line]
    return "\n".join(lines).replace("\\\n", " ")


def test_all_recipes_are_there():
    sizes, kinds = ("1.3b", "14b"), ("refalign-{}-stage1", "refalign-{}-stage2", "lora-{}")
    both = {kind.format(size) for size in sizes for kind in kinds}
    assert {path.stem for path in RECIPES} == both | {"lora-1.3b-few-clips", "lora-1.3b-12gb", "lora-14b-24gb"}


def test_the_recipe_of_the_small_world_is_understood_and_passes_the_checks():
    check(parse("--config", str(CONFIGS / "sprites.yaml")))


@pytest.mark.parametrize("path", DISTILLATIONS, ids=lambda path: path.stem)
def test_a_recipe_that_distils_is_understood_and_passes_the_checks(path):
    command = parse("--config", str(path))
    check(command)
    assert command.objective.kind == "distil"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
class TestRecipe:
    def test_is_understood_and_passes_the_checks(self, path):
        check(parse("--config", str(path)))

    def test_is_the_papers(self, path):
        command = parse("--config", str(path))
        large, stage_2 = "14b" in path.stem, "stage2" in path.stem
        assert command.model.base == f"Wan-AI/Wan2.1-T2V-{'14' if large else '1.3'}B-Diffusers"
        assert command.objective == config.ObjectiveOptions()
        assert command.alignment == config.AlignmentOptions()
        if command.training == "full":
            assert command.optimizer.lr == (1e-5 if stage_2 else 5e-5)
            assert command.batch == config.BatchOptions(14 * 8 if large else 32, 1)

    def test_writes_where_its_name_says(self, path):
        assert parse("--config", str(path)).output == Path("runs", path.stem)

    def test_tells_how_its_cache_is_made(self, path):
        line = re.search(r"^refalign-train (cache .+)$", comments(path), re.MULTILINE).group(1)
        cache = tyro.cli(CacheCommand, args=shlex.split(line)[1:])
        command = parse("--config", str(path))
        assert cache.output == command.data.cache
        assert cache.model == command.model.base
        assert cache.teacher == f"facebook/dinov3-vit{'l' if '14b' in path.stem else 'b'}16-pretrain-lvd1689m"
        assert isinstance(cache.source, Source) and cache.source.data is not None

    def test_tells_how_it_is_launched(self, path):
        told = comments(path)
        lines = re.findall(r"^(?:refalign-train|accelerate launch .*-m refalign_training.cli) (run .+)$", told, re.M)
        for line in lines:
            words = shlex.split(line, comments=True)
            assert parse(*words[1:]).config == path.relative_to(CONFIGS.parents[1])
        assert lines

    def test_names_files_that_are_there(self, path):
        named = re.findall(r"training/configs/[\w/.-]+\.yaml", path.read_text("utf-8"))
        assert named and all((CONFIGS.parents[1] / name).is_file() for name in named)


@pytest.mark.parametrize("size", ["1.3b", "14b"])
def test_stage_2_starts_from_stage_1(size):
    first, second = (parse("--config", str(CONFIGS / f"refalign-{size}-stage{stage}.yaml")) for stage in (1, 2))
    assert second.model.start == first.output
    assert second.training == first.training


# -- accelerate's files -----------------------------------------------------------------------------------------------


def launched(path: Path, *more: str) -> argparse.Namespace:
    """What `accelerate launch` makes of a file and a line."""
    words = ["--config_file", str(path), *more, "-m", "refalign_training.cli", "run"]
    return _validate_launch_command(launch_command_parser().parse_args(words))[0]


@pytest.mark.parametrize("name", ["one_gpu", "fsdp2_8_gpus", "multi_node"])
def test_precision_is_left_to_the_trainer(name):
    assert load_config_from_file(str(ACCELERATE[name])).mixed_precision == "no"
    assert launched(ACCELERATE[name]).mixed_precision == "no"


def test_one_gpu_is_one_process_and_not_sharded():
    made = launched(ACCELERATE["one_gpu"])
    assert (made.num_processes, made.use_fsdp, made.multi_gpu) == (1, False, False)


@pytest.mark.parametrize(("name", "processes", "machines"), [("fsdp2_8_gpus", 8, 1), ("multi_node", 112, 14)])
def test_files_of_many_gpus_tell_the_trainer_to_shard(monkeypatch, name, processes, machines):
    free_port, other_machine = ["--main_process_port", "0"], ["--machine_rank", "3"]
    made = launched(ACCELERATE[name], *(free_port if machines == 1 else other_machine))
    environment = prepare_multi_gpu_env(made)
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    assert environment["FSDP_VERSION"] == "2"
    # Else transformers loads frozen models empty in all processes but one
    assert environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    assert (made.num_processes, int(made.nproc_per_node) * machines) == (processes, processes)


def test_a_machine_of_many_names_its_rank_on_the_line():
    made = launched(ACCELERATE["multi_node"], "--machine_rank", "3", "--main_process_ip", "10.1.1.1")
    prepare_multi_gpu_env(made)
    assert (made.node_rank, made.nnodes, made.rdzv_backend) == (3, "14", "static")
    assert made.rdzv_endpoint == "10.1.1.1:29500"


# -- Hostile files ----------------------------------------------------------------------------------------------------

LAUGHS = "\n".join([f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 'ha'}]" for n in range(9)])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("steps: " + "[" * 21 + "]" * 21, "has more than 10,000 values or 20 levels"),
        ("steps: " + "[" * 100_000, "has more than 10,000 values or 20 levels"),
        (LAUGHS, "has more than 10,000 values or 20 levels"),
        ("steps: &a [*a]", r"has a value that holds itself \(\*a\)"),
        ("# " + "x" * 1_000_000, "has more than 1,000,000 bytes"),
    ],
    ids=["deep", "deeper", "aliases", "circle", "long"],
)
def test_a_hostile_yaml_file_is_refused_before_it_is_built(text, told, tmp_path):
    (tmp_path / "run.yaml").write_text(text, "utf-8")
    with pytest.raises(ValueError, match=rf"run\.yaml {told}"):
        read_yaml(tmp_path / "run.yaml")


def test_an_alias_is_understood(tmp_path):
    (tmp_path / "run.yaml").write_text("one: &a {lr: 1e-5}\ntwo: *a\n", "utf-8")
    assert read_yaml(tmp_path / "run.yaml")["two"] == {"lr": 1e-5}
