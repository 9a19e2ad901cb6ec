"""Pictures of a run: they are there, of a size to look at, and show something, however little was logged."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from refalign_training.run.plots import describe_timesteps, plot_losses, plot_timesteps


def logged(steps, every=10):
    """What a run with alignment logs."""
    return [
        {
            "step": step,
            "loss": 0.2 + math.exp(-step / 100),
            "loss/diffusion": 0.2 + 0.5 * math.exp(-step / 100),
            "loss/mse": 0.3,
            "loss/alignment": math.exp(-step / 50),
            "alignment/cosine": 1 - math.exp(-step / 50),
        }
        for step in range(every, steps + 1, every)
    ]


def without(lines, *names):
    return [{name: value for name, value in line.items() if name not in names} for line in lines]


def picture(lines, folder):
    file = folder / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_losses(file, folder / "losses.png")
    return opened(folder / "losses.png")


def opened(file):
    with Image.open(file) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def colored(pixels):
    """Share of pixels that are neither white nor grey: those of curves."""
    return (np.ptp(pixels, axis=2) > 30).mean()


def assert_shows_curves(pixels):
    assert pixels.shape[1] >= 800 and pixels.shape[0] >= 400
    assert 0.0001 < colored(pixels) < 0.5


@pytest.mark.parametrize(
    "lines",
    [
        logged(1000),
        logged(10),
        without(logged(500), "loss/alignment", "alignment/cosine"),
        without(logged(500), "alignment/cosine"),
        [*logged(500), {"step": 500, "validation/mse": 0.4}],
        [{"step": 500, "validation/mse": 0.4}],
        [{"step": 10, "loss": 0.0, "loss/diffusion": 0.0, "loss/mse": 0.0, "loss/alignment": 0.0}],
        [{**line, "loss": None} if line["step"] % 20 else line for line in logged(200)],
        [{**line, "loss/alignment": None, "alignment/cosine": None} for line in logged(200)],
    ],
    ids=["all", "point", "no-alignment", "no-cosine", "validation", "validation-alone", "zeros", "nulls", "all-null"],
)
def test_losses_are_drawn(tmp_path, lines):
    assert_shows_curves(picture(lines, tmp_path))


def test_the_alignment_has_a_panel_of_its_own(tmp_path):
    with_it = picture(logged(500), tmp_path)
    assert len(with_it) > 1.3 * len(picture(without(logged(500), "loss/alignment"), tmp_path))


def test_a_spike_does_not_press_the_rest_flat(tmp_path):
    lines = without(logged(5000), "loss/alignment", "alignment/cosine")
    plain = picture(lines, tmp_path)
    lines[250]["loss"] = 1000.0
    spiked = picture(lines, tmp_path)
    assert colored(spiked) > 0.8 * colored(plain)
    rows = [np.flatnonzero((np.ptp(pixels[:, 100:], axis=2) > 100).any(1)) for pixels in (plain, spiked)]
    assert abs(np.ptp(rows[1]) - np.ptp(rows[0])) < 0.2 * np.ptp(rows[0])


def test_a_picture_is_replaced(tmp_path):
    first = picture(logged(100), tmp_path)
    assert (picture(logged(200), tmp_path) != first).any()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["losses.png", "metrics.jsonl"]


@pytest.mark.parametrize("lines", [[], [{"step": 10, "lr": 1e-4}], [{"step": 10, "loss": None}]])
def test_nothing_to_draw_is_said(tmp_path, lines):
    with pytest.raises(ValueError, match=r"metrics\.jsonl holds no loss yet"):
        picture(lines, tmp_path)
    assert not (tmp_path / "losses.png").exists()


@pytest.mark.parametrize("preset", ["refalign", "logit_normal"])
@pytest.mark.parametrize("gate_power", [3, 0])
def test_timesteps_are_drawn(tmp_path, preset, gate_power):
    plot_timesteps(preset, tmp_path / "timesteps.png", gate_power)
    assert_shows_curves(opened(tmp_path / "timesteps.png"))


def test_timesteps_are_described():
    assert describe_timesteps("refalign") == (
        "Timesteps (refalign): a tenth below 360, half below 834, a tenth above 978.\n"
        "Weights w(t): 0.00 to 2.08, mean 1.00; half of all weight below 677."
    )


@pytest.mark.parametrize("call", [describe_timesteps, lambda preset: plot_timesteps(preset, "timesteps.png")])
def test_an_unknown_preset_is_refused(call):
    with pytest.raises(ValueError, match="'sigmoid'; known are refalign, logit_normal"):
        call("sigmoid")


def test_nothing_heavy_is_imported_before_it_draws():
    code = "import sys, refalign_training.run.plots; print({'matplotlib', 'torch'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_pyplot_is_left_alone(tmp_path):
    from matplotlib import pyplot

    plot_timesteps("refalign", tmp_path / "timesteps.png")
    picture(logged(100), tmp_path)
    assert pyplot.get_fignums() == []
