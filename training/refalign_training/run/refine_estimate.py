"""What a refinement will take: memory without activations, compute per sample, hours."""

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from refalign.devices import rank_and_processes
from refalign.files import fetch, read_json
from refalign.pipeline_refine_by_align import ReferenceProjector
from refalign_training.method.refinement import Refiner
from refalign_training.run.config import RunCommand, accumulation
from refalign_training.run.estimate import ASSUMED_TFLOPS, ATTENTION, GIB, OPTIMIZER_BYTES
from refalign_training.run.log import check_tracker
from refalign_training.run.optimizers import check_optimizer
from refalign_training.run.order import hold_out, nothing_held_out
from refalign_training.run.refine import open_subjects, read_base
from refalign_training.run.resume import checkpoint_to_resume


def dry_run(command: RunCommand) -> int:
    """Prints what the run would take. Nothing is trained or written, and no weight is read. Raises ValueError if the
    data or the base does not fit."""
    checkpoint_to_resume(command)
    check_tracker(command.log.tracker)
    check_optimizer(command.optimizer)
    folder = fetch(command.model.base, ("*.json", "*/*.json"), command.model.revision)
    index = read_base(folder, command.model.base)
    samples = open_subjects(command.data, command.refine, index["image_size"], index["reference_size"])
    wanted = 0 if command.validation.cache else command.validation.samples
    rows, held_out = hold_out(len(samples.buckets), wanted)
    rank, world_size = rank_and_processes()
    micro_batches = accumulation(command, world_size)
    if rank:
        return 0
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(read_json(folder / "unet/config.json"))
        projector: Any = ReferenceProjector.from_config(read_json(folder / "reference_projector/config.json"))
    refiner = Refiner(unet, projector)
    trained = sum(parameter.numel() for parameter in refiner.parameters())
    average = 4 if command.optimizer.ema_decay is not None else 0
    memory = trained * (4 + 4 + OPTIMIZER_BYTES[command.optimizer.name] + average) / GIB
    flop = count_flop(refiner, samples.reference_side // read_json(folder / "image_encoder/config.json")["patch_size"])
    flop *= 4 / 3 if command.model.gradient_checkpointing else 1
    hours = command.steps * command.batch.size * flop / (ASSUMED_TFLOPS * 1e12 * world_size) / 3600
    taken = f"{micro_batches} x {command.batch.micro} on each of {world_size}"
    print(f"{command.output}: {command.training}, {command.steps:,} steps of {command.batch.size} ({taken}).")
    print(f"{samples.name}: {len(rows):,} samples and {len(held_out)} held out.")
    print(
        f"sample      {samples.side}x{samples.side}, the reference {samples.reference_side}x{samples.reference_side}"
    )
    print(f"parameters  {trained:,} trained")
    print(f"memory      {memory:.1f} GiB of weights, gradients, optimiser and average; activations come on top")
    print(f"compute     {flop / 1e12:.3g} TFLOP a sample: {hours:.3g} hours at {ASSUMED_TFLOPS} TFLOP/s per GPU")
    if command.validation.every and wanted and not len(held_out):
        print(nothing_held_out(len(rows)))
    return 0


def count_flop(refiner: Refiner, grid: int) -> int:
    """The floating-point operations of the forward and backward pass of a sample, whose reference has `grid` x `grid`
    tokens. The networks are on the meta device. The frozen encoders are not counted."""
    side = refiner.unet.config["sample_size"]
    with FakeTensorMode():
        weights = {}
        for name, tensor in (*refiner.named_parameters(), *refiner.named_buffers()):
            weights[name] = torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=tensor.requires_grad)
        patches = torch.empty(1, grid * grid, refiner.reference_projector.config["image_dim"])
        inputs = (torch.empty(1, 9, side, side), torch.tensor([500]), patches, torch.tensor([True]))
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            functional_call(refiner, weights, inputs).sum().backward()
    return counter.get_total_flops()
