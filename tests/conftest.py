"""What holds for all tests. Their fixtures are in tiny_models.py."""

import gc
import os
import signal
import tempfile
from pathlib import Path

import pytest


# Two test processes share two cores; and nothing may reach for the network
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

# Where code of repos is copied when it is loaded: processes that copy at once would read half a file
MODULES = tempfile.TemporaryDirectory(prefix="refalign-tests-")
os.environ["HF_MODULES_CACHE"] = MODULES.name

# A shell that starts the tests in the background lets them, and all that they start, ignore Ctrl-C
signal.signal(signal.SIGINT, signal.default_int_handler)

# Files that take long, longest first. Begun late, they would leave the other test process without work
LONG = (
    "training/run/test_parallel.py",
    "space/test_app.py",
    "training/run/test_trainer.py",
    "training/run/test_resume.py",
    "training/run/test_refine.py",
    "pipelines/test_demo.py",
    "test_documents.py",
    "training/run/test_estimate.py",
    "training/run/test_config.py",
    "pipelines/test_pipeline_refalign_wan.py",
    "evaluation/test_artifacts.py",
    "evaluation/test_generate.py",
    "pipelines/test_lora.py",
    "pipelines/test_cli.py",
    "test_wheel.py",
    "training/run/test_checkpoint.py",
    "evaluation/test_whole_path.py",
    "evaluation/test_sprites.py",
    "training/publish/test_export.py",
    "training/cache/test_cache_processes.py",
    "training/test_whole_path.py",
    "pipelines/test_processes.py",
    "pipelines/test_hub.py",
    "pipelines/test_pipeline_refine_by_align.py",
    "pipelines/test_refine_video.py",
    "training/run/test_bernini.py",
    "training/run/test_recipes.py",
    "training/run/test_inputs.py",
    "training/run/test_distillation.py",
    "training/run/test_plots.py",
    "training/sprites/test_world.py",
    "training/run/test_validation.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; the others keep their order."""
    tests = Path(__file__).parent
    ranks = {tests / name: rank for rank, name in enumerate(LONG)}
    items.sort(key=lambda item: ranks.get(item.path, len(LONG)))


def pytest_configure(config: pytest.Config) -> None:
    """The process that only hands tests to others spares the seconds of importing models."""
    if config.getoption("dist", "no") == "no":
        config.pluginmanager.import_plugin("tests.tiny_models")


def pytest_collection_finish() -> None:
    """What was imported stays: each fork and each end of a process would search a million objects for garbage."""
    gc.collect()
    gc.freeze()
