"""A Space: exactly the app, its front matter, its requirements and the package go, and nothing that is private."""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import SpaceCard

from refalign import cli, push_space
from refalign.files import files_below
from refalign.sprites import FOLDER
from tests.mock_hub import MockHub
from tests.programs import FORGET, call_script


ROOT = Path(__file__).parents[2]
TOKEN = "hf_" + "pushingTokenOfTheMockHub" + "0123456789"
COMMANDS = """
import contextlib, io, json, logging, os, sys
from refalign import cli

results = {}
for name, arguments in json.loads(sys.argv[1]).items():
    if name == "no token":
        os.environ["HF_TOKEN"] = ""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["push-space", *arguments])
    logging.getLogger().handlers.clear()  # each command has a stream of its own
    results[name] = {"code": code, "out": out.getvalue(), "err": err.getvalue()}
print(json.dumps(results))
"""


# -- What goes --------------------------------------------------------------------------------------------------------


OF_REFINING = ("triplets", "refine")  # folders of the package: the app makes videos alone


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A copy of the package, which is pushed in its place."""
    here, folder = push_space.PACKAGE, tmp_path / "refalign"
    shutil.copytree(here, folder, ignore=shutil.ignore_patterns("__pycache__", *OF_REFINING))
    monkeypatch.setattr(push_space, "PACKAGE", folder)
    monkeypatch.setattr(push_space, "FOLDER", folder / push_space.FOLDER.relative_to(here))
    return folder


def names_below(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in files_below(folder)}


JUNK = [
    "__pycache__/cli.cpython-311.pyc",
    ".env",
    ".hidden.py",
    "notes.txt",
    "sprites/.DS_Store",
    "sprites/model/optimizer.pt",
    "sprites/model/.cache/token.json",
    "sprites/subjects/.thumbnail.png",
    "model_cards/template.md",
    "space/app.py",
]


def test_the_app_and_the_package_go_and_nothing_else(package, tmp_path):
    own = names_below(tmp_path)
    for name in JUNK:
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).write_text("not to be pushed", "utf-8")
    pushed = push_space.push_space("tester/app", dry_run=True)
    assert set(pushed.sizes) == own | {"app.py", "README.md", "requirements.txt"}
    assert "refalign/cli.py" in own and "refalign/sprites/model/vae/config.json" in own


@pytest.mark.parametrize("name", ["cli.py", "sprites/model/README.md"])
def test_a_token_is_refused_by_file(name, package):
    (package / name).write_text("# hf_" + "aBcDeFgHiJ" * 3 + "kLmN", "utf-8")
    with pytest.raises(ValueError, match=f"^refalign/{name} holds what looks like a token"):
        push_space.push_space("tester/app", dry_run=True)


def test_a_dry_run_connects_to_nothing_and_names_the_space(capsys):
    """These tests' own process is offline: a request would raise."""
    assert cli.main(["push-space", "--repo", "tester/app", "--model", "org/model", "--dry-run"]) == 0
    *lines, summary = capsys.readouterr().out.splitlines()
    assert {"app.py", "refalign/cli.py"} < {line.split("  ")[-1] for line in lines}
    assert re.fullmatch(r"Would push .* files, .* MB, to \S+/spaces/tester/app \(public, if it is new\)\.", summary)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--repo app", "`repo_id` is 'app', but must be ORG/NAME"),
        ("--repo a/b --model c", "`model` is 'c', but must be ORG/NAME"),
        (f"--repo a/b --model {FOLDER}", "is on this machine, where a Space cannot read it. `refalign push` it"),
    ],
)
def test_a_wrong_name_is_told_in_a_line(options, told, capsys):
    assert cli.main(["push-space", *options.split(), "--dry-run"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("refalign: ") and told in line


# -- Where it goes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub with an open and a closed model, and a Space of an earlier version."""
    root = tmp_path_factory.mktemp("hub")
    files = ("tester/model/model_index.json", "tester/closed/model_index.json")
    for name in (*files, "spaces/tester/old/refalign/gone.py", "spaces/tester/old/notes.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}", "utf-8")
    with MockHub(root) as hub:
        hub.private["tester/closed"] = True
        hub.variables["spaces/tester/old"] = {"REFALIGN_MODEL": "tester/model"}
        yield hub


@pytest.fixture(scope="module")
def pushes(hub, tmp_path_factory) -> dict[str, SimpleNamespace]:
    """What was said to these options, in this order."""
    options = {
        "new": "--repo tester/app",
        "old": "--repo tester/old",
        "hidden": "--repo tester/hidden --private --model tester/closed",
        "made private": "--repo tester/app --private --model tester/model",
        "no such model": "--repo tester/other --model tester/none",
        "no token": "--repo tester/new",
    }
    words = json.dumps({name: line.split() for name, line in options.items()})
    environment = hub.environment(tmp_path_factory.mktemp("home"), TOKEN)
    child = call_script(COMMANDS, words, environment=environment)
    assert child.returncode == 0, child.stderr[-4000:]
    results = json.loads(child.stdout.splitlines()[-1])
    return {name: SimpleNamespace(**result) for name, result in results.items()}


def front_matter(hub: MockHub, space: str) -> dict:
    return SpaceCard(hub.uploads[f"spaces/tester/{space}"]["README.md"].decode()).data.to_dict()


def test_every_push_ended_as_it_should(pushes):
    assert [name for name, push in pushes.items() if push.code] == ["made private", "no such model", "no token"]


def test_a_new_space_has_what_the_command_lists(hub, pushes):
    *lines, summary, hint = pushes["new"].out.splitlines()
    uploads = hub.uploads["spaces/tester/app"]
    assert lines == [f"{len(uploads[name]) / 1e6:12,.3f} MB  {name}" for name in sorted(uploads)]
    assert summary.endswith(f", to {hub.url}/spaces/tester/app (public).")
    assert hint == f"Choose its hardware: {hub.url}/spaces/tester/app/settings"


def test_a_new_space_shows_the_embedded_model(hub, pushes):
    assert "refalign/sprites/model/model_index.json" in hub.uploads["spaces/tester/app"]
    assert hub.variables["spaces/tester/app"] == {}
    assert not {"models", "preload_from_hub"} & set(front_matter(hub, "app"))


def test_modules_of_an_earlier_version_go_and_what_is_not_ours_stays(hub, pushes):
    files = hub.files("spaces/tester/old")
    assert "refalign/gone.py" not in files and "refalign/cli.py" in files
    assert files["notes.md"] == b"{}"


def test_an_existing_space_keeps_its_model(hub, pushes):
    front = front_matter(hub, "old")
    assert hub.variables["spaces/tester/old"] == {"REFALIGN_MODEL": "tester/model"}
    assert front["models"] == front["preload_from_hub"] == ["tester/model"]
    assert front["sdk_version"] == SpaceCard.load(ROOT / "space/README.md").data.sdk_version


def test_a_model_that_not_everyone_may_read_is_not_preloaded_and_asks_for_a_token(hub, pushes):
    front = front_matter(hub, "hidden")
    assert hub.variables["spaces/tester/hidden"] == {"REFALIGN_MODEL": "tester/closed"}
    assert front["models"] == ["tester/closed"] and "preload_from_hub" not in front
    assert "tester/closed is not open to everyone: give the Space a secret HF_TOKEN" in pushes["hidden"].err


def test_a_space_is_private_if_wanted_and_public_ones_are_told(hub, pushes):
    assert (hub.private["spaces/tester/hidden"], hub.private["spaces/tester/app"]) == (True, False)
    assert "tester/app exists and is public" in pushes["made private"].err
    assert hub.variables["spaces/tester/app"] == {}


def test_an_unknown_model_is_told_in_a_line_before_anything_is_made(hub, pushes):
    (line,) = pushes["no such model"].err.splitlines()
    assert line.startswith("refalign: The Hub does not give the model tester/none")
    assert not (hub.root / "spaces/tester/other").exists()


def test_a_missing_token_is_told_in_a_line(hub, pushes):
    (line,) = pushes["no token"].err.splitlines()
    assert line.startswith("refalign: The Hub does not let you write to tester/new. Run `hf auth login`")
    assert not (hub.root / "spaces/tester/new").exists()


# -- What it does there -----------------------------------------------------------------------------------------------

IN_THE_SPACE = """
# As in a Space: nothing of this package is there but what was pushed
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.path.insert(0, "")
import tempfile
from pathlib import Path

import app

with tempfile.TemporaryDirectory() as folder:
    demo = app.build(app.Studio(app.load(None), None, Path(folder)))
for name, module in sys.modules.items():
    if name == "app" or name.startswith("refalign"):
        print(module.__file__)
print(app.FOLDER)
print(type(demo).__name__)
"""


def test_the_app_is_built_of_what_was_pushed_alone(tmp_path):
    push_space.write_space(tmp_path)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "REFALIGN_MODEL")}
    with contextlib.chdir(tmp_path):
        child = call_script(FORGET + IN_THE_SPACE, environment=environment)
    assert child.returncode == 0, child.stderr[-4000:]
    *paths, built = child.stdout.splitlines()
    assert built == "Blocks"
    assert {str(tmp_path / "app.py"), str(tmp_path / "refalign/pipeline_refalign_wan.py")} <= set(paths)
    assert [path for path in paths if not path.startswith(str(tmp_path))] == []
