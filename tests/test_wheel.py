"""What `python -m build` makes runs outside the clone: code, configs, cards and the tiny model are in it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from refalign.files import files_below
from tests.programs import FORGET, Ended, call_script


ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with what the wheel installs."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("pipelines", "training", "evaluation", "model_cards", "space"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    python = [sys.executable, "-m"]
    subprocess.run([*python, "build", "--wheel", "--no-isolation", source], check=True, capture_output=True)
    (wheel,) = (source / "dist").glob("*.whl")
    target = folder / "installed"
    subprocess.run([*python, "pip", "install", "--quiet", "--no-deps", "--target", target, wheel], check=True)
    return target


COMMAND = """
import importlib, os

os.chdir(os.path.dirname({installed!r}))
sys.path.insert(0, {installed!r})
module = importlib.import_module(sys.argv[1])
assert module.__file__.startswith({installed!r})
sys.exit(module.main(sys.argv[2:]))
"""


def run(installed: Path, *words: str) -> Ended:
    """A command of the wheel, in a folder of its own."""
    return call_script(FORGET + COMMAND.format(installed=str(installed)), *words)


def test_it_makes_a_video_of_the_tiny_model(installed):
    subject = next((installed / "refalign/sprites/subjects").glob("*.png"))
    words = ("--prompt", "In the middle one hops.", "--reference", str(subject), "--steps", "1", "--output", "a.mp4")
    done = run(installed, "refalign.cli", "generate", *words)
    assert done.returncode == 0, done.stderr
    assert (installed.parent / "a.mp4").stat().st_size > 1000


@pytest.mark.parametrize("folder", ["refalign/model_cards", "refalign_training/configs"])
def test_all_cards_and_recipes_are_in_it(installed, folder):
    source = ROOT / "model_cards" if "cards" in folder else ROOT / "training/configs"
    kind = "*.md" if "cards" in folder else "*.yaml"
    assert {file.name for file in (installed / folder).glob(kind)} == {file.name for file in source.glob(kind)}


def test_published_results_and_the_page_of_comparisons_are_in_it(installed):
    folder = installed / "refalign_evaluation"
    assert (folder / "published.json").is_file() and (folder / "compare.html").is_file()


def test_its_training_command_is_there(installed):
    done = run(installed, "refalign_training.cli", "--help")
    assert done.returncode == 0, done.stderr


def test_a_space_gets_the_package_that_it_installs(installed):
    done = run(installed, "refalign.cli", "push-space", "--repo", "org/app", "--dry-run")
    assert done.returncode == 0, done.stderr
    pushed = {line.split()[-1] for line in done.stdout.splitlines()[:-1]}
    files = {file.relative_to(installed).as_posix() for file in files_below(installed / "refalign")}
    not_pushed = re.compile("refalign/(space|model_cards|sprites/(refine|triplets))/|.*__pycache__")
    left = list(filter(not_pushed.match, files))
    assert pushed == files - set(left) | {"app.py", "README.md", "requirements.txt"}
