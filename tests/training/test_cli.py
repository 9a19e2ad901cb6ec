import ast
import subprocess
import sys
from pathlib import Path

import pytest

import refalign
from refalign_training.cli import main


def test_nothing_heavy_is_imported_to_understand_a_command():
    code = (
        "import sys, refalign_training.cli; "
        "print({'torch', 'diffusers', 'transformers', 'av', 'pyarrow'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_nothing_in_refalign_imports_training():
    for file in Path(refalign.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.startswith("refalign_training")], file


@pytest.mark.parametrize("command", ["check", "cache"])
def test_help_names_every_option(capsys, command):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    told = capsys.readouterr().out
    assert exit.value.code == 0
    assert {"--data", "--annotations", "--videos", "--height", "--seed", "--limit"} <= set(
        told.replace(",", " ").split()
    )


def test_help_of_run_names_the_options_of_a_recipe(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    assert {"--config", "--optimizer.lr", "--alignment.layers"} <= set(capsys.readouterr().out.split())


def test_an_unknown_key_of_a_recipe_is_told_in_one_line(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("optimizer: {learning_rate: 1e-4}")
    assert main(["run", "--config", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "run")]) == 1
    told = capsys.readouterr().err
    assert "optimizer.learning_rate is not an option. Did you mean" in told and told.count("\n") == 1


def test_an_error_is_told_in_one_line(tmp_path, capsys):
    assert main(["cache", "--output", str(tmp_path / "cache")]) == 1
    told = capsys.readouterr().err
    assert told.startswith("refalign-train: Pass the dataset") and told.count("\n") == 1
