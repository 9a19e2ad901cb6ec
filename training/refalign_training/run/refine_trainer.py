"""The trainer of the objective `refine`: another network on other samples, in the same loop."""

import dataclasses
import logging
from functools import partial

import torch

from refalign_training.method.refinement import Refinement, Refiner
from refalign_training.run import resume
from refalign_training.run.batches import load_batches
from refalign_training.run.checks import check
from refalign_training.run.config import RunCommand
from refalign_training.run.log import Bar
from refalign_training.run.order import Order, hold_out, nothing_held_out
from refalign_training.run.refine import (
    RefineEncoders,
    RefineValidation,
    load_base,
    make_refine_batch,
    open_subjects,
)
from refalign_training.run.refine_estimate import dry_run
from refalign_training.run.state import TrainState
from refalign_training.run.trainer import Trainer, train


logger = logging.getLogger(__name__)


def run(command: RunCommand) -> int:
    """Trains, or with `dry_run` says what would be done, as [`refalign_training.run.trainer.run`]."""
    check(command)
    return dry_run(command) if command.dry_run else train(command, RefineTrainer)


class RefineTrainer(Trainer):
    """A run of Refine-by-Align."""

    def _open_samples(self) -> None:
        command, batch = self.command, self.command.batch
        self.pipeline = load_base(command.model)
        self.encoders = RefineEncoders(self.pipeline, self.parallel.device)
        self.sizes = int(self.pipeline.config["image_size"]), int(self.pipeline.config["reference_size"])
        self.samples = open_subjects(command.data, command.refine, *self.sizes)
        wanted = command.validation.samples if command.validation.cache is None else 0
        self.rows, self.held_out = hold_out(len(self.samples.buckets), wanted)
        self.order = Order(self.samples.buckets, self.rows, batch.size, batch.micro, command.seed)

    def _open_validation(self) -> None:
        self.prompts, self.held_out_examples = [], None
        options, samples, rows = self.command.validation, self.samples, self.held_out.tolist()
        if not options.every:
            return
        if options.cache is not None:
            data = dataclasses.replace(self.command.data, cache=options.cache)
            samples = open_subjects(data, self.command.refine, *self.sizes)
            rows = range(min(options.samples, len(samples.buckets)))
        if not rows:
            logger.warning("%s", nothing_held_out(len(self.rows)))
            return
        validation = RefineValidation(samples, rows, self.encoders)
        if validation.count:
            self.held_out_examples = validation

    def _make_networks(self, resumes: bool) -> None:
        command, parallel = self.command, self.parallel
        start = resume.find_start(command, resumes)
        pipeline = self.pipeline
        refiner = Refiner(pipeline.unet, pipeline.reference_projector).train()
        if command.model.gradient_checkpointing:
            pipeline.unet.enable_gradient_checkpointing()
        if command.model.compile:
            pipeline.unet.compile(dynamic=False)
        self.frozen, self.base, self.refiner = "", command.model.base, refiner
        wrapped = parallel.wrap(refiner, refiner.blocks, torch.float32)
        self.objective = Refinement(
            transformer=wrapped,
            alignment=None,
            options=command.alignment,
            dtype=getattr(torch, command.model.precision),
            scheduler=pipeline.scheduler,
            outside_weight=command.refine.outside_weight,
        )
        self.state = TrainState({"refiner": refiner}, command.optimizer, command.steps)
        if start.checkpoint is not None:
            resume.check_start(start.checkpoint, command, self.frozen)
            self.state.load_weights(start.checkpoint, parallel.world_size > 1)

    def _start_reading(self) -> None:
        command, objective = self.command, self.command.objective
        make = partial(
            make_refine_batch, samples=self.samples, order=self.order, options=objective, encoders=self.encoders
        )
        self.batches = load_batches(
            self.samples,
            self.order,
            objective,
            rank=self.parallel.rank,
            world_size=self.parallel.world_size,
            first_step=self.step,
            steps=command.steps,
            workers=command.data.workers,
            encodes=True,
            make=make,
        )

    def _plot_timesteps(self) -> None:
        """They are drawn evenly: there is nothing to see."""

    def _describe_timesteps(self) -> str:
        shift = self.command.refine.timestep_shift
        return f"Timesteps are drawn from 0 to 999, {'evenly' if shift == 1 else f'with a shift of {shift:g}'}."

    def _validate(self, bar: Bar) -> None:
        """Losses and how well the attention finds the true region, by the averaged weights if there are some."""
        held_out = self.held_out_examples
        if held_out is None:
            return
        with self.state.averaged():
            values = held_out.losses(self.objective, self.step - 1)
            values |= held_out.maps(self.objective, self.refiner)
        self._tell_validation(bar, values)
