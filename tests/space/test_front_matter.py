"""The Space's front matter is what Hugging Face accepts, and its requirements are the package's."""

import tomllib
import unicodedata
from pathlib import Path

import pytest
from huggingface_hub import SpaceCard, SpaceHardware
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet


ROOT = Path(__file__).parents[2]
SPACE = ROOT / "space"

# https://huggingface.co/docs/hub/spaces-config-reference
COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
KEYS = {
    *("title", "emoji", "colorFrom", "colorTo", "sdk", "sdk_version", "python_version", "app_file", "app_port"),
    *("suggested_hardware", "suggested_storage", "base_path", "fullWidth", "header", "short_description", "models"),
    *("datasets", "tags", "thumbnail", "pinned", "license", "hf_oauth", "disable_embedding", "custom_headers"),
    *("startup_duration_timeout", "preload_from_hub"),
}
LONGEST_DESCRIPTION = 60  # characters
ZERO_GPU = {"python_version": {"3.12.12", "3.10.13"}, "torch": ("2.8.0", "2.11.0")}


@pytest.fixture(scope="module")
def front() -> dict:
    return SpaceCard.load(SPACE / "README.md").data.to_dict()


def test_every_key_is_known(front):
    assert set(front) <= KEYS


def test_its_looks_are_allowed(front):
    assert {front["colorFrom"], front["colorTo"]} <= COLOURS
    assert len(front["emoji"]) == 1 and unicodedata.category(front["emoji"]) == "So"
    assert 0 < len(front["short_description"]) <= LONGEST_DESCRIPTION


def test_texts_are_texts_and_not_numbers(front):
    """YAML reads 6.31 as a number."""
    texts = [value for key, value in front.items() if key != "tags"]
    assert [value for value in texts if not isinstance(value, str)] == []


def test_it_runs_on_zero_gpu_with_the_gradio_that_is_tested(front):
    constraints = (ROOT / "constraints.txt").read_text("utf-8")
    assert front["sdk"] == "gradio"
    assert f"gradio=={front['sdk_version']}" in constraints.splitlines()
    assert front["python_version"] in ZERO_GPU["python_version"]
    assert front["suggested_hardware"] == SpaceHardware.ZERO_A10G
    assert front["app_file"] == "app.py"


def test_its_python_is_one_of_the_packages(front):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert front["python_version"] in SpecifierSet(project["requires-python"])


def requirements(lines: list[str]) -> dict[str, str]:
    """The ranges of versions by name."""
    parsed = map(Requirement, lines)
    return {requirement.name: str(requirement.specifier) for requirement in parsed}


def test_its_requirements_are_the_packages_but_for_the_torch_of_zero_gpu():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = (SPACE / "requirements.txt").read_text("utf-8").splitlines()
    asked = requirements([line for line in lines if not line.startswith("#")])
    torch = asked.pop("torch")
    own = requirements([*project["dependencies"], *project["optional-dependencies"]["app"]])
    assert asked == {name: versions for name, versions in own.items() if name != "torch"}
    least, greatest = ZERO_GPU["torch"]
    assert least in SpecifierSet(own["torch"]) & SpecifierSet(torch) and greatest in SpecifierSet(torch)
    assert list(SpecifierSet(torch).filter(["2.7.1", "2.12.0", "2.13.0"])) == []
