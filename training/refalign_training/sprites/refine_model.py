"""The last stage of `refalign-train sprites --refine`: a trained refining model as a Hub repo, chosen and measured."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from refalign.files import new_folder, read_headers, read_json
from refalign_training.sprites.recipe import PRODUCTS, SpritesCommand, read_measured


CHOSEN_ON = 100  # triplets of subjects that were trained on
MEASURED_ON = 200  # triplets of subjects that never were
CALL = {"num_inference_steps": 10, "guidance_scale": 1.5}  # what a call takes by default; more of either errs more


def make_refine_model(command: SpritesCommand) -> None:
    """
    The latest checkpoint's average as a Hub repo in float16. The block, the step and the threshold of its alignment
    are chosen on triplets of known subjects; then it is measured on those of held-out ones.
    """
    import torch

    from refalign.hub import REFINE_PIPELINE_TAG, complete_repo, fill_card
    from refalign_training.publish.refiner import write_refiner
    from refalign_training.run.checkpoint import find_checkpoint, read_state

    checkpoint = find_checkpoint(command.output / "refine-run")
    state = read_state(checkpoint)
    base = str(command.output / PRODUCTS["refine-base"])
    with new_folder(command.output / PRODUCTS["refine-model"]) as folder:
        write_refiner(folder, checkpoint, base, None, average=True, dtype=torch.float16)
        index = folder / "model_index.json"
        index.write_text(json.dumps(read_json(index) | CALL, indent=2) + "\n", "utf-8")
        figures = measure_refiner(command.output, folder)
        seen = state["step"] * state["options"]["batch.size"]
        numbers = {"steps": state["step"], "seen": seen, "weights": count_weights(folder)}
        parts = {name: read_measured(command.output / PRODUCTS[f"refine-{name}"]) for name in ("vae", "encoder")}
        facts = {**card_rows(figures), **numbers, "figures": figures, "parts": parts}
        card = fill_card("refine-sprites", None, None, pipeline_tag=REFINE_PIPELINE_TAG, **facts)
        (folder / "README.md").write_text(card, "utf-8")
        complete_repo(folder)


def measure_refiner(output: Path, model: Path) -> dict[str, Any]:
    """Chooses a model's block, step and threshold, and measures it; all figures stay beside it in `output`."""
    known, held_out = output / "refine-triplets-known", output / "refine-triplets"
    chosen = ["--benchmark", known, "--sprites", CHOSEN_ON, "--seen", "--grid", "--choose"]
    _evaluate(model, *chosen, "--json", output / "refine-grid.json", "--plot", output / "refine-grid.png")
    figures = output / "refine-model.json"
    shown = ["--json", figures, "--sheet", output / "refine-sheet.png"]
    _evaluate(model, "--benchmark", held_out, "--sprites", MEASURED_ON, *shown)
    return read_json(figures)


def _evaluate(model: Path, *options: Any) -> None:
    words = ["artifacts", "--model", model, *options]
    code = subprocess.run([sys.executable, "-m", "refalign_evaluation.cli", *map(str, words)]).returncode
    if code:
        raise ValueError(f"refalign-eval ended with exit code {code}.")


def count_weights(folder: Path) -> int:
    """The number of weights in a pipeline folder."""
    total = 0
    for file in folder.glob("*/*.safetensors"):
        total += sum(math.prod(tensor.shape) for tensor in read_headers([file]).values())
    return total


def card_rows(figures: dict[str, Any]) -> dict[str, list[tuple[str, ...]]]:
    """The figures as the card's tables show them."""
    alignment, arms = [], []
    for name, both in figures["alignment"].items():
        alignment.append((name, _shown(both["mask"]), _shown(both["box"])))
    for name, error in figures["error"].items():
        arms.append((name, _shown(error), _shown(figures["similarity"][name])))
    less = [(name, _shown(value)) for name, value in figures["less_error"].items()]
    return {"alignment": alignment, "arms": arms, "less": less}


def _shown(value: dict[str, float]) -> str:
    return f"{value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
