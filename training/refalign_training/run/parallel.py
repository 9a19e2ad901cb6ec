"""One process or many, behind one seam: each with all weights (DDP), or each with its part (FSDP2)."""

import os
import resource
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from refalign.devices import find_device
from refalign.owner import owned_folder
from refalign_training.run.config import wants_shards


class Parallel:
    """The processes of a run, as `accelerate launch` or torchrun started them; one, if nothing did. The mode `auto` is
    fsdp2 if accelerate's file says FSDP, else ddp."""

    def __init__(self, mode: Literal["auto", "ddp", "fsdp2"] = "auto", device: str = "auto") -> None:
        found = find_device(device)
        launched = int(os.environ.get("WORLD_SIZE", 1))
        if ":" in device and launched > 1:
            raise ValueError(f"--device {device} is one device for all processes. Pass {found.type}.")
        # Without an accelerator it must be told: else each process takes itself for the only one
        state = PartialState(cpu=found.type == "cpu")
        self.rank, self.world_size, self.is_main = state.process_index, state.num_processes, state.is_main_process
        if self.world_size != launched:
            raise ValueError(f"{launched} processes were started, but {device} lets {self.world_size} work together.")
        self.device = found
        if state.device is not None and device in ("auto", state.device.type):
            self.device = state.device
        self.is_sharded = wants_shards(mode) and self.world_size > 1
        self._with_all_weights: list[DistributedDataParallel] = []

    def wrap(self, module: nn.Module, parts: Iterable[nn.Module] = (), dtype: torch.dtype | None = None) -> nn.Module:
        """A module with the same weights in every process, on this one's device and perhaps in another dtype, ready to
        be trained together if something of it is trained. `parts`, its blocks, are sharded each for itself and moved
        one by one, so that a device never holds all that is sharded."""
        if self.is_sharded:
            # It warns of the tokens that are returned beside the velocity; nothing changes them in place
            warnings.filterwarnings("ignore", message=".*returned a view tensor.*")
            mesh = init_device_mesh(self.device.type, (self.world_size,))
            for part in (*parts, module):
                _move(part, self.device, dtype)
                # Else the outermost one stays whole after a forward pass without a backward pass, as in validation,
                # and the next step computes with what its weights were then
                fully_shard(part, mesh=mesh, reshard_after_forward=True)
            return module
        _move(module, self.device, dtype)
        if self.world_size == 1 or not any(parameter.requires_grad for parameter in module.parameters()):
            return module
        ids = None if self.device.type == "cpu" else [self.device]
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")  # that it will be as we ask for
        # `find_unused_parameters` keeps the buckets as they are: else they are made anew after the first backward
        # pass of a process, and three of them that went on would add in another order than those that did not stop
        # Frozen weights are the same ones everywhere, and may be quantised or in the CPU's memory
        frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, frozen)
        wrapped = DistributedDataParallel(
            module, ids, broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=True
        )
        self._with_all_weights.append(wrapped)
        return wrapped

    @contextmanager
    def accumulate(self, is_last: bool) -> Iterator[None]:
        """A backward pass whose gradients are averaged over the processes only if it is a step's last."""
        with ExitStack() as stack:
            if not is_last:
                for module in self._with_all_weights:  # shards are averaged each time: whole gradients do not fit
                    stack.enter_context(module.no_sync())
            yield

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def most(self, *values: int) -> list[int]:
        """The largest of each value over all processes."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int32, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def peak_memory(self) -> float:
        """The most memory so far in GiB: what tensors took of the GPU, what the process took of the CPU's."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

    def close(self) -> None:
        """Ends the processes' work together."""
        if self.world_size > 1:
            dist.destroy_process_group()


def _move(module: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
    """As `module.to`, without a touch to what is sharded already."""
    for parameter in module.parameters():
        if not isinstance(parameter, DTensor) and not hasattr(parameter, "stays_on_host"):
            parameter.data = parameter.data.to(device, dtype, copy=True)  # no longer mapped from a file
    for child in module.modules():
        for name, buffer in child.named_buffers(recurse=False):
            setattr(child, name, buffer.to(device))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradient_norm(parameters: Sequence[nn.Parameter], max_norm: float = 0.0) -> torch.Tensor:
    """The norm of all gradients together, over all processes; with `max_norm`, they are scaled down to it."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


@contextmanager
def owned_by_all(parallel: Parallel, folder: Path) -> Iterator[None]:
    """Within it, a folder is that of these processes alone. If it is another's, all of them raise ValueError."""
    refusal = None
    with ExitStack() as stack:
        if parallel.is_main:
            try:
                stack.enter_context(owned_folder(folder))
            except (ValueError, OSError) as error:
                refusal = str(error)
        if parallel.world_size > 1:  # one that is not told would wait for the others
            refusal = gather_object([refusal])[0]
        if refusal is not None:
            parallel.close()
            raise ValueError(refusal)
        yield
