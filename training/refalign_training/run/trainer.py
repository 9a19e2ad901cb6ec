"""`refalign-train run`: the training loop, and what it is made of.

    refalign-train run --config training/configs/lora-1.3b.yaml --output runs/mine
    accelerate launch --config_file FILE -m refalign_training.cli run --config ...
    torchrun --nproc_per_node 8 -m refalign_training.cli run --config ...

Killed, it goes on with `--resume latest` from its last checkpoint to the same numbers.
"""

import importlib.metadata
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from tqdm.contrib.logging import logging_redirect_tqdm

from refalign.files import fetch
from refalign_training.cache.encoders import vae_config
from refalign_training.method.objective import Batch
from refalign_training.run import resume
from refalign_training.run.batches import load_batches, read_first
from refalign_training.run.checkpoint import checkpoint_name, read_state, remove_old_checkpoints, save_checkpoint
from refalign_training.run.checks import check
from refalign_training.run.config import RunCommand, accumulation, flatten
from refalign_training.run.config_files import keep_options
from refalign_training.run.inputs import CachedSamples, check_fits, open_samples
from refalign_training.run.lean import check_lean, make_lean
from refalign_training.run.log import Bar, Metrics, RunLog, append_skipped, check_tracker
from refalign_training.run.networks import load_transformer, make_alignment, of_its_family, transformer_config
from refalign_training.run.objectives import make_objective
from refalign_training.run.optimizers import check_optimizer
from refalign_training.run.order import Order, hold_out, nothing_held_out
from refalign_training.run.parallel import Parallel, gradient_norm, owned_by_all
from refalign_training.run.plots import describe_timesteps, plot_timesteps
from refalign_training.run.state import TrainState, learning_rate_factor
from refalign_training.run.stopping import Stopping
from refalign_training.run.validation import Validation
from refalign_training.run.videos import Shown, Videos, encode_prompts


logger = logging.getLogger(__name__)

PACKAGES = ("refalign", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")


def run(command: RunCommand) -> int:
    """Trains, or with `dry_run` says what would be done. Returns the exit code: 143 if it was stopped by SIGTERM, 130
    by Ctrl-C. Raises ValueError if the options, the data or a checkpoint do not fit, or another run has the folder."""
    check(command)
    if command.dry_run:
        from refalign_training.run.estimate import dry_run

        return dry_run(command)
    return train(command, Trainer)


def train(command: RunCommand, kind: "type[Trainer]") -> int:
    """Trains by a kind of trainer, as [`run`]."""
    with owned_by_all(Parallel(command.parallel, command.device), command.output):
        trainer = kind(command)
        code = trainer.train()
        trainer.parallel.close()
    return code


class Trainer:
    """All that a run is made of, ready for its next step."""

    def __init__(self, command: RunCommand) -> None:
        command = self.command = of_its_family(command)
        self.parallel = Parallel(command.parallel, command.device)
        check_tracker(command.log.tracker)
        check_optimizer(command.optimizer)
        if not self.parallel.is_main:
            logging.getLogger("refalign_training").setLevel(logging.ERROR)
        checkpoint = resume.checkpoint_to_resume(command)
        self.accumulation = accumulation(command, self.parallel.world_size)
        self._open_samples()
        self._open_validation()
        self._make_networks(resumes=checkpoint is not None)
        self.step, self.skipped_in_a_row, self.resumed_from = 0, 0, checkpoint
        if checkpoint is not None:
            resume.check_unchanged(checkpoint, command, self.frozen, self._dataset())
            self.state.load(checkpoint, self.parallel.world_size > 1)
            state = read_state(checkpoint)
            self.step, self.skipped_in_a_row = state["step"], state["skipped_in_a_row"]
        self._start_reading()
        self._start_log()

    def train(self) -> int:
        """The loop."""
        command, parallel = self.command, self.parallel
        with Stopping() as stopping, self._bar() as bar, logging_redirect_tqdm():
            self._show_untrained()
            for step in range(self.step, command.steps):
                taken = []
                for number in range(self.accumulation):
                    batch = self._next_batch()
                    if number == 0 and _is_due(step, command.log.gradients_every):
                        self._measure_gradients(batch, step)
                    with parallel.accumulate(is_last=number + 1 == self.accumulation):
                        torch.manual_seed(batch.seed)
                        losses = self.objective(batch, step)
                        (losses.total.mean() / self.accumulation).backward()
                    self.metrics.add(losses, batch.timesteps)
                    taken.append((batch.ids, losses.total.detach()))
                norm = self.state.clip_gradients()
                is_finite = math.isfinite(norm) and all(total.isfinite().all() for _, total in taken)
                stop_signal, is_bad = parallel.most(stopping.signal, not is_finite)
                if is_bad:
                    self._skip(step, norm, taken)
                else:
                    self._update(step, norm)
                self.state.optimizer.zero_grad()
                self.step = step + 1
                bar.update()
                is_last = bool(stop_signal) or self.step == command.steps
                self._log(bar, is_last)
                if is_last or _is_due(self.step, command.checkpoints.every):
                    self._save()
                if stop_signal:
                    return self._finish(stop_signal)
                if is_last or _is_due(self.step, command.validation.every):
                    self._validate(bar)
        return self._finish()

    # -- Setting up ------------------------------------------------------------------------------------------------

    def _open_samples(self) -> None:
        command = self.command
        batch = command.batch
        self.samples = open_samples(command.data, command.model, bool(command.alignment.weight), self.parallel.device)
        wanted = command.validation.samples if command.validation.cache is None else 0
        self.rows, self.held_out = hold_out(len(self.samples.buckets), wanted)
        if len(self.rows) < batch.size:
            logger.warning("Only %d samples for batches of %d: some come twice per step.", len(self.rows), batch.size)
        self.order = Order(self.samples.buckets, self.rows, batch.size, batch.micro, command.seed)

    def _open_validation(self) -> None:
        options, model = self.command.validation, self.command.model
        self.validation: Validation | None = None
        self.prompts: list[Shown] = []
        self.vae_folder: Path | None = None  # only the main process decodes
        if not options.every:
            return
        self.validation = self._read_held_out()
        if options.prompts:
            self.prompts = encode_prompts(self.command, self.samples, self.parallel)
        self.videos = Videos(options, self.command.objective.max_sequence_length, self.parallel)
        shows = bool(self.prompts) or (self.validation is not None and bool(options.videos))
        if shows and self.parallel.is_main:
            # Now, and not when the first videos are due
            self.vae_folder = fetch(model.base, ["vae/*"], model.revision)
            vae_config(self.vae_folder)

    def _read_held_out(self) -> Validation | None:
        options = self.command.validation
        samples, rows = self.samples, self.held_out.tolist()
        if options.cache is not None:
            samples = CachedSamples(options.cache, bool(self.command.alignment.weight))
            check_fits(samples, self.command.model)
            rows = range(min(options.samples, len(samples.buckets)))
        if not rows:
            if options.samples:
                logger.warning("%s", nothing_held_out(len(self.rows)))
            return None
        validation = Validation(samples, rows, options, self.command.objective, self.parallel)
        if validation.values:
            return validation
        logger.warning("There is no validation: none of its %d samples can be read.", len(rows))
        return None

    def _make_networks(self, resumes: bool) -> None:
        command, parallel = self.command, self.parallel
        start = resume.find_start(command, resumes)
        check_lean(command.model, transformer_config(command.model), parallel.device)
        transformer = load_transformer(command, start, resumes)
        self.frozen = resume.frozen_fingerprint(transformer)
        self.base = command.model.base
        if start.transformer and self.frozen:
            self.base = str(command.model.start)
        modules = {"transformer": transformer}
        if command.alignment.weight:
            value = read_first(self.samples, self.order)
            config, teacher_dim = transformer.config, value["teacher_features"][0].shape[-1]
            modules["alignment"] = make_alignment(command.alignment, config, teacher_dim, start, command.seed)
        make_lean(transformer, command.model, parallel.device)
        if command.model.compile:
            # Each bucket for itself: loops of known length are faster
            transformer.compile_repeated_blocks(dynamic=False)
        self.transformer = transformer
        dtype = torch.float32 if command.training == "full" else None
        wrapped = parallel.wrap(transformer, transformer.blocks, dtype)
        alignment = parallel.wrap(modules["alignment"]) if "alignment" in modules else None
        self.objective = make_objective(command, wrapped, alignment, transformer, self.samples, parallel)
        self.state = TrainState(modules, command.optimizer, command.steps)
        if start.checkpoint is not None:
            resume.check_start(start.checkpoint, command, self.frozen)
            self.state.load_weights(start.checkpoint, parallel.world_size > 1)

    def _start_reading(self) -> None:
        self.batches = load_batches(
            self.samples,
            self.order,
            self.command.objective,
            rank=self.parallel.rank,
            world_size=self.parallel.world_size,
            first_step=self.step,
            steps=self.command.steps,
            workers=self.command.data.workers,
            encodes=self.command.data.cache is None,
            pin_memory=self.parallel.device.type == "cuda",
        )

    def _start_log(self) -> None:
        command = self.command
        self.metrics = Metrics(command.alignment.layers if self.objective.alignment else (), self.parallel.device)
        self.extra: dict[str, float] = {}
        self._waited, self._since, self._logged = 0.0, time.perf_counter(), self.step
        self.log: RunLog | None = None
        if self.parallel.is_main:
            command.output.mkdir(parents=True, exist_ok=True)
            keep_options(command)
            self._plot_timesteps()
            self.log = RunLog(command.output, command.log, flatten(command), self.step)
            for line in self._summary().splitlines():
                logger.info("%s", line)
        self.parallel.barrier()

    def _summary(self) -> str:
        command = self.command
        trained = sum(map(torch.Tensor.numel, self.state.parameters.values()))
        epochs = command.steps * self.order.micro_batches / self.order.epoch_length
        begin = f"goes on from {self.resumed_from}" if self.resumed_from else "starts"
        return (
            f"{command.output} {begin}: {command.training}, {trained:,} trained weights, {len(self.rows):,} samples "
            f"of {self.samples.name} ({len(self.held_out)} held out), {command.steps:,} steps of {command.batch.size} "
            f"({epochs:.2g} epochs), processes: {self.parallel.world_size}"
            f"{', sharded' if self.parallel.is_sharded else ''}.\n{self._describe_timesteps()}"
        )

    def _plot_timesteps(self) -> None:
        command = self.command
        picture = command.output / "timesteps.png"
        plot_timesteps(command.objective.timesteps, picture, command.alignment.gate_power)

    def _describe_timesteps(self) -> str:
        return describe_timesteps(self.command.objective.timesteps)

    # -- Parts of a step -------------------------------------------------------------------------------------------

    def _next_batch(self) -> Batch:
        started = time.perf_counter()
        batch = next(self.batches)
        self._waited += time.perf_counter() - started
        for sample_id, reason in batch.unusable:
            logger.warning("%s cannot be used; another sample takes its place: %s", sample_id, reason)
            append_skipped(self.command.output, self.step + 1, [sample_id], reason)
        return batch.to(self.parallel.device)

    def _measure_gradients(self, batch: Batch, step: int) -> None:
        """The norms of the two losses' own gradients on a micro-batch. Leaves no trace."""
        if not self.objective.alignment_weight(step):
            return
        norms = {}
        for name in ("diffusion", "alignment"):
            torch.manual_seed(batch.seed)
            with self.parallel.accumulate(is_last=False):
                losses = self.objective(batch, step)
                part = losses.diffusion if name == "diffusion" else losses.total - losses.diffusion
                part.mean().backward()
            norms[f"gradients/{name}"] = gradient_norm(list(self.state.parameters.values())).item()
            self.state.optimizer.zero_grad()
        # Otherwise the step is about to be skipped, or there is nothing to align
        if all(map(math.isfinite, norms.values())) and batch.keeps_references.any():
            ratio = norms["gradients/alignment"] / max(norms["gradients/diffusion"], 1e-12)
            self.extra |= norms | {"gradients/ratio": ratio}

    def _update(self, step: int, norm: float) -> None:
        self.state.update(step)
        self.metrics.commit()
        self.skipped_in_a_row = 0
        self.extra["gradients/norm"] = norm

    def _skip(self, step: int, norm: float, taken: list[tuple[list[str], torch.Tensor]]) -> None:
        """Leaves the weights as they are. Ends the run if there have been too many such steps in a row."""
        self.metrics.discard()
        self.skipped_in_a_row += 1
        losses: list[tuple[str, float]] = []
        for ids, total in taken:
            losses += zip(ids, total.tolist(), strict=True)
        losses = gather_object(losses)
        bad = [name for name, loss in losses if not math.isfinite(loss)]
        ids = bad or [name for name, _ in losses]
        reason = f"loss or gradient (norm {norm:g}) is not finite"
        logger.warning("Step %d is skipped: %s. Samples: %s", step + 1, reason, ", ".join(ids))
        if self.parallel.is_main:
            append_skipped(self.command.output, step + 1, ids, reason)
        if self.skipped_in_a_row >= self.command.max_skipped_steps:
            raise ValueError(
                f"{self.skipped_in_a_row} steps in a row were not finite, the last one with {', '.join(ids)}. Look at "
                f"these samples, lower optimizer.lr, or go on from an earlier checkpoint; all are listed in "
                f"{self.command.output / 'skipped.jsonl'}."
            )

    # -- Now and then ----------------------------------------------------------------------------------------------

    def _log(self, bar: Bar, is_last: bool) -> None:
        if not is_last and not _is_due(self.step, self.command.log.every):
            return
        values = self.metrics.collect(self.parallel.sum)
        seconds, optimizer = time.perf_counter() - self._since, self.command.optimizer
        values |= self.extra | {
            "learning_rate": optimizer.lr * learning_rate_factor(self.step - 1, self.command.steps, optimizer),
            "speed/samples_per_second": (self.step - self._logged) * self.command.batch.size / seconds,
            "speed/data_wait": self._waited / seconds,
            "memory/peak_gib": self.parallel.peak_memory(),
        }
        bar.tell(values)
        if self.log is not None:
            self.log.log(values, self.step)
        self.extra, self._waited, self._since, self._logged = {}, 0.0, time.perf_counter(), self.step

    def _save(self) -> None:
        command = self.command
        sizes = np.unique(self.samples.buckets[:, :3], axis=0).tolist()
        state = {
            "step": self.step,
            "samples": self.step * command.batch.size,
            "skipped_in_a_row": self.skipped_in_a_row,
            "options": flatten(command),
            "base": str(Path(self.base).resolve()) if Path(self.base).exists() else self.base,
            "frozen": self.frozen,
            "dataset": {**self._dataset(), "sizes": sizes, "teacher": command.data.teacher},
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            "processes": self.parallel.world_size,
        }
        started, folder = time.perf_counter(), command.output / "checkpoints"
        checkpoint = save_checkpoint(folder, self.state.tensors(), state, self.parallel)
        logger.info("Saved %s", checkpoint)
        if self.parallel.is_main:
            remove_old_checkpoints(folder, command.checkpoints.keep_last, command.checkpoints.keep_every)
        self._since += time.perf_counter() - started

    def _dataset(self) -> dict[str, Any]:
        samples = self.samples
        return {"name": samples.name, "samples": len(samples.buckets), "fingerprint": samples.fingerprint}

    def _validate(self, bar: Bar) -> None:
        """Losses and videos, by the averaged weights if there are some: what is exported."""
        if self.validation is None and not self.prompts:
            return
        started, shown = time.perf_counter(), self.prompts
        with self.state.averaged():
            if self.validation is not None:
                values = self.validation.losses(self.objective, self.step - 1)
                values |= self.validation.gains(self.objective, self.step - 1)
                self._tell_validation(bar, values)
                shown = [*self.validation.shown(), *shown]
            self._show(shown)
        self._since += time.perf_counter() - started

    def _tell_validation(self, bar: Bar, values: dict[str, float]) -> None:
        names = {"validation/mse": "loss", "validation/miou": "mIoU"}
        names |= {"validation/reference_gain": "gain", "validation/order_gain": "order gain"}
        told = [f"{name} {values[key]:.4f}" for key, name in names.items() if key in values]
        logger.info("Step %d, held out: %s", self.step, ", ".join(told))
        bar.tell(values)
        if self.log is not None:
            self.log.log(values, self.step)

    def _show_untrained(self) -> None:
        """Videos of one's own prompts before the first step, to compare later ones with."""
        if self.step == 0 and self.prompts:
            with self.state.averaged():
                self._show(self.prompts)
            self._since = time.perf_counter()

    def _show(self, shown: Sequence[Shown]) -> None:
        folder = self.command.output / "samples" / checkpoint_name(self.step)
        if shown:
            pictures = self.videos.write(shown, self.objective, self.transformer, self.vae_folder, folder)
            logger.info("Step %d, videos beside their references: %s", self.step, folder)
            if self.log is not None:
                self.log.log_images({f"samples/{name}": picture for name, picture in pictures.items()}, self.step)
        self.parallel.barrier()

    def _bar(self) -> Bar:
        command = self.command
        return Bar(command.output.name, command.steps, self.step, is_hidden=not self.parallel.is_main)

    def _finish(self, stop_signal: int = 0) -> int:
        del self.batches  # ends the workers
        if self.log is not None:
            self.log.finish()
        if stop_signal:
            logger.info("Stopped after step %d. Go on with: --resume latest", self.step)
            return 128 + stop_signal
        output = self.command.output
        logger.info("All %d steps are done. Next: refalign-train export %s --output FOLDER", self.step, output)
        return 0


def _is_due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0
