"""Two gloo processes on one machine, for what runs in parallel."""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import ContextParallelConfig
from safetensors.torch import load_file, save_file


def run_on_two_ranks(model, inputs: dict) -> list[tuple[torch.Tensor, tuple[torch.Tensor, ...]]]:
    """What each of two context-parallel ranks returns: the velocity, and the reference tokens of both blocks."""
    sources = inputs["reference_hidden_states"]
    if not isinstance(sources, torch.Tensor):
        inputs = {k: v for k, v in inputs.items() if k != "reference_hidden_states"}
        inputs |= {f"source_{index}": latents for index, latents in enumerate(sources)}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model.save_pretrained(folder / "model")
        save_file(inputs, folder / "inputs.safetensors")
        # Forks, which spares the imports
        mp.start_processes(_rank, args=(folder, type(model)), nprocs=2, start_method="fork")
        outputs = [load_file(folder / f"{rank}.safetensors") for rank in range(2)]
    return [(output["sample"], (output["block_0"], output["block_1"])) for output in outputs]


def _rank(rank: int, folder: Path, model_class: type) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.accelerator.device_count = lambda: 2  # diffusers divides by it, and it is 0 without accelerators
    model = model_class.from_pretrained(folder / "model").eval()
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    inputs = load_file(folder / "inputs.safetensors")
    sources = [inputs.pop(f"source_{index}") for index in range(len(inputs)) if f"source_{index}" in inputs]
    if sources:
        inputs["reference_hidden_states"] = sources
    with torch.no_grad():
        output = model(**inputs, output_reference_layers=(0, 1))
    tensors = {"sample": output.sample}
    for index, tokens in enumerate(output.reference_hidden_states):
        tensors[f"block_{index}"] = torch.cat(tokens, dim=1) if sources else tokens
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"{rank}.safetensors")
    dist.destroy_process_group()
