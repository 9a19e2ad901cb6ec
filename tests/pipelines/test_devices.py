"""Which device a name means, on machines with and without accelerators."""

import pytest
import torch

from refalign.devices import find_device


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


def test_auto_takes_the_accelerator(two_gpus):
    assert find_device() == torch.device("cuda")


def test_auto_takes_the_cpu_where_there_is_nothing_else(no_gpu):
    assert find_device() == torch.device("cpu")


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:1"])
def test_what_is_there_is_found(two_gpus, name):
    assert find_device(name) == torch.device(name)


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_of_the_processes_started_together_takes_its_own(name, two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_device(name) == torch.device("cuda:1")


def test_what_is_asked_for_is_taken_by_all_processes(two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (find_device("cuda:0"), find_device("cpu")) == (torch.device("cuda:0"), torch.device("cpu"))


@pytest.mark.parametrize("name", ["cuda:2", "mps", "meta", "toaster"])
def test_what_is_not_there_is_refused(two_gpus, name):
    with pytest.raises(
        ValueError, match=f"--device {name} cannot be used here: (this machine has 2 of type cuda|it is)"
    ):
        find_device(name)


def test_a_machine_with_a_cpu_alone_says_so(no_gpu):
    with pytest.raises(ValueError, match="--device cuda cannot be used here: this machine has a CPU alone"):
        find_device("cuda")
