"""Installs the packages `refalign`, `refalign_training` and `refalign_evaluation` from their source roots.

`pip install .` is light; extras add more.
"""

import re
from pathlib import Path

from setuptools import setup


ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "pipelines/refalign/__init__.py").read_text("utf-8")).group(1)

INSTALL = [
    "accelerate>=1.12",
    "av>=13",
    "diffusers>=0.42.1",
    "ftfy",
    "huggingface_hub>=1.0",
    "numpy",
    "peft>=0.17",
    "pillow>=11",
    "safetensors>=0.8",
    "torch>=2.6",
    "tqdm",
    "transformers>=5.0",
    "tyro>=1.0",
]
BACKGROUND = ["rembg[cpu]>=2.0.86"]
TRAIN = ["matplotlib>=3.9", "pyarrow>=18", "pycocotools>=2.0.8", "pyyaml", "tensorboard>=2.18", "torch>=2.9"]
TEST = [*TRAIN, "hypothesis", "import-linter>=2.17", "pytest", "pytest-xdist", "ruff"]

setup(
    name="refalign",
    version=VERSION,
    description="RefAlign for diffusers: reference-to-video with Wan 2.1 (arXiv 2603.25743)",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # One import package, two source folders: the cards stand at the top of the repository, where people look
    package_dir={
        "refalign": "pipelines/refalign",
        "refalign.model_cards": "model_cards",
        "refalign_training": "training/refalign_training",
        "refalign_training.configs": "training/configs",
        "refalign_evaluation": "evaluation/refalign_evaluation",
    },
    packages=[
        "refalign",
        "refalign.model_cards",
        "refalign.sprites",
        "refalign_evaluation",
        "refalign_training",
        "refalign_training.cache",
        "refalign_training.configs",
        "refalign_training.data",
        "refalign_training.method",
        "refalign_training.publish",
        "refalign_training.run",
        "refalign_training.sprites",
    ],
    package_data={
        "refalign.model_cards": ["*.md"],
        "refalign_training.configs": ["*.yaml"],
        "refalign.sprites": ["subjects/*.png", "model/*", "model/*/*"],
    },
    install_requires=INSTALL,
    extras_require={"background": BACKGROUND, "train": TRAIN, "test": TEST},
    entry_points={
        "console_scripts": [
            "refalign=refalign.cli:main",
            "refalign-train=refalign_training.cli:main",
            "refalign-eval=refalign_evaluation.cli:main",
        ],
    },
)
