"""The tiny model that comes with this package, a Hub repo's folder as any other, and pictures of its subjects."""

from pathlib import Path


FOLDER = Path(__file__).parent / "model"
REFINE_FOLDER = Path(__file__).parent / "refine"  # the tiny model that refines images
TRIPLETS = Path(__file__).parent / "triplets"  # pictures to refine, with masks and references
ONE_PASS = Path(__file__).parent / "one-pass.safetensors"  # a LoRA with which the model needs no guidance
SUBJECTS = Path(__file__).parent / "subjects"  # the model was not trained on these


def subject_names() -> list[str]:
    """The subjects that there are pictures of."""
    return sorted(file.stem for file in SUBJECTS.glob("*.png"))
