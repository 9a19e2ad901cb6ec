"""With diffusers alone, in a process that cannot import this package: a plain script and `diffusers-cli run`."""

import contextlib
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.drawn_references import draw_face, draw_pet
from tests.programs import WITHOUT_PACKAGE, call_script


ROOT = Path(__file__).parents[2]
SMALL = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2}
SEED = 3

CHILD = """
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.commands.diffusers_cli import main

repo, call, command = json.loads(sys.argv[1])
pipe = DiffusionPipeline.from_pretrained(repo, trust_remote_code=True)
generator = torch.Generator().manual_seed(SEED)
np.save("script.npy", pipe(**call, generator=generator).frames[0])
sys.argv = command
main()
print("modules", [name for name in sys.modules if name.startswith("refalign.")])
"""


@pytest.fixture(scope="module")
def documented() -> list[str]:
    """The call of `diffusers-cli` that the guide shows."""
    guide = (ROOT / "docs/hub.md").read_text("utf-8")
    (line,) = re.findall(r"^diffusers-cli run .*?[^\\]$", guide, re.MULTILINE | re.DOTALL)
    return shlex.split(line.replace("\\\n", " "))


@pytest.fixture(scope="module")
def made(documented, repo_folder, tmp_path_factory) -> SimpleNamespace:
    """What script and command leave in their folder, with the same seed and a small size."""
    folder = tmp_path_factory.mktemp("diffusers")
    draw_face(0.1).save(folder / "woman.png")
    draw_pet(0.4).save(folder / "dog.png")
    place = documented.index("--pipeline-kwargs") + 1
    call = json.loads(documented[place]) | SMALL
    command = [*documented, "--device-map", "cpu", "--seed", str(SEED)]
    command[place], command[command.index("ORG/NAME")] = json.dumps(call), str(repo_folder)
    script = WITHOUT_PACKAGE + CHILD.replace("SEED", str(SEED))
    with contextlib.chdir(folder):
        done = call_script(script, json.dumps([str(repo_folder), call, command]))
    assert done.returncode == 0, done.stderr[-4000:]
    frames = sorted(folder.glob("walk-frames/*.png"))
    return SimpleNamespace(
        call=call,
        told=done.stdout,
        script=np.load(folder / "script.npy"),
        command=np.stack([np.asarray(Image.open(file)) for file in frames]),
        folder=folder,
    )


def test_nothing_of_this_package_was_imported(made):
    assert made.told.splitlines()[-1] == "modules []"


def test_a_plain_script_gives_what_the_package_gives(made, pipeline, monkeypatch):
    monkeypatch.chdir(made.folder)
    own = pipeline(**made.call, generator=torch.Generator().manual_seed(SEED)).frames[0]
    assert made.script.shape == (5, 32, 48, 3)
    np.testing.assert_allclose(made.script, own, rtol=0, atol=1e-5)


def test_diffusers_cli_gives_what_the_script_gives(made):
    assert made.command.shape == (5, 32, 48, 3)
    assert np.abs(made.command / 255 - made.script).max() <= 1 / 255


def test_the_references_change_what_they_give(made, pipeline):
    call = {name: value for name, value in made.call.items() if name != "reference_images"}
    own = pipeline(**call, generator=torch.Generator().manual_seed(SEED)).frames[0]
    assert np.abs(own - made.script).max() > 1e-3
