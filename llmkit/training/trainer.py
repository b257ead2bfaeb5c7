"""transformers' Trainer with the parts that we own: the step, the loss, evaluation, checkpoints and what is logged.

The loop, the optimizer, the schedule, mixed precision and distribution are transformers' and accelerate's.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback

from llmkit.context import RunContext
from llmkit.errors import DataError, GateError, StoppedEarly
from llmkit.training import checkpoints
from llmkit.training.batching import Batch, Part
from llmkit.training.checkpoints import Manifest
from llmkit.training.meter import Meter
from llmkit.training.objective import Objective
from llmkit.training.sharding import Shards, whole_model

STATE_FILE = "trainer_state.json"
SCHEDULER_NAME = "scheduler.pt"


class LlmkitTrainer(Trainer):
    """``train_batches`` and ``eval_batches`` are loaders of :class:`Batch`, already this rank's share.

    ``fingerprint`` names the training sequences, ``batch`` how many of them all ranks together take in a step, ``keep``
    how many checkpoints stay (None: all); ``keep_best`` saves the best evaluation's weights. ``shards`` divides weights,
    gradients or optimizer states among processes; ``filler`` is a part with nothing to learn; ``describe`` writes what
    makes a checkpoint a model into its folder.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: TrainingArguments,
        *,
        ctx: RunContext,
        objective: Objective,
        train_batches: DataLoader[Batch],
        eval_batches: DataLoader[Batch] | None,
        meter: Meter,
        keep: int | None,
        keep_best: bool,
        fingerprint: str,
        batch: int,
        callbacks: list[TrainerCallback],
        filler: Part | None = None,
        shards: Shards | None = None,
        describe: Callable[[Path], None] | None = None,
    ) -> None:
        self.shards = shards
        held_out = eval_batches.dataset if eval_batches is not None else None
        super().__init__(
            model=model, args=args, train_dataset=train_batches.dataset, eval_dataset=held_out, callbacks=callbacks
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.ctx = ctx
        self.objective: Objective = objective
        self.meter: Meter = meter
        self._train_batches, self._eval_batches = train_batches, eval_batches
        self._keep, self._keep_best = keep, keep_best
        self.agree = any_rank(ctx)
        self.last_loss: float | None = None
        self.folder = Path(str(args.output_dir))
        engine = shards.name if shards is not None else ""
        self._manifest = Manifest(step=0, world_size=ctx.world_size, batch=batch, data=fingerprint, engine=engine)
        self._filler, self._describe = filler, describe
        self._prepared: Any = None
        self._parts: list[int] = []
        self._step_rows: list[str] = []
        self._step_loss = 0.0

    # The step

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """Sharded by our own sampler: accelerate must not shard it again."""
        return self._train_batches

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Any]:
        """The batches of one optimizer step, and the supervised tokens in them over all ranks."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        supervised = self._sum(sum(batch.supervised for batch in batches))
        if batches and not supervised:
            raise DataError(
                f"Step {self.state.global_step + 1}: none of its tokens is to be learned. Rows: {_named(batches)}"
            )
        self._step_rows = [row for batch in batches for row in batch.rows]
        self._step_loss = 0.0
        self._parts = self._agreed_parts([len(batch.parts) for batch in batches])
        return batches, supervised

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one batch, a part at a time; the gradients of the parts add up to the batch's.

        The loss is the sum over supervised tokens divided by their number in the whole step (all accumulated batches,
        all ranks), so that neither accumulation nor the number of processes changes the step.
        """
        batch: Batch = inputs
        model.train()
        self.meter.start()
        total = torch.zeros((), device=self.args.device)
        parts = batch.parts if self.shards is None else self._filled_up(batch.parts, self._parts.pop(0))
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            with contextlib.nullcontext() if last or self.shards else self.accelerator.no_sync(model):
                # DDP and the engines average gradients over ranks; the sum is wanted.
                loss = self.objective(model, part) / num_items_in_batch
                if self.shards is not None:
                    complete = last and self.accelerator.sync_gradients
                    self.shards.backward(loss * self.ctx.world_size, last=complete)
                else:
                    self.accelerator.backward(loss * self.ctx.world_size)
            total += loss.detach()
        self.meter.add(batch)
        self._step_loss += float(total) if self.args.device.type == "cpu" else 0.0
        # Trainer averages this over the ranks for the log.
        return total * self.ctx.world_size

    def _agreed_parts(self, counts: list[int]) -> list[int]:
        """Parts of each batch on the rank that has most: an engine's ranks wait for each other in every one."""
        if self.shards is None or self.ctx.world_size == 1:
            return counts
        most = torch.tensor(counts, device=self.args.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        return [int(count) for count in most]

    def _filled_up(self, parts: list[Part], count: int) -> list[Part]:
        if count == len(parts):
            return parts
        assert self._filler is not None
        return [*parts, *[self._filler] * (count - len(parts))]

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self.shards is not None:
            return self.shards.norm(self.args.max_grad_norm)
        return super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Refuse to step on a loss or gradients that are not finite; gradients of a loss scaler are its own business."""
        if self.shards is not None:
            norm = self.shards.norm(0.0) if grad_norm is None else grad_norm
        else:
            norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        scaled = self.args.fp16 and (self.accelerator.scaler is not None or self.shards is not None)
        finite = math.isfinite(self._step_loss) and (scaled or norm is None or math.isfinite(float(norm)))
        if not finite:
            self._stop_at_non_finite(math.nan if norm is None else float(norm))
        return norm

    def _stop_at_non_finite(self, norm: float) -> None:
        last, _ = checkpoints.last_complete(self.folder)
        kept = f"The last good checkpoint is {last}." if last else "No checkpoint had been written yet."
        raise GateError(
            f"Step {self.state.global_step + 1}: the loss ({self._step_loss:g}) or the gradient (norm {norm:g}) is not"
            f" finite; training stopped before the weights were touched. {kept}\n"
            f"Rows of the step: {_some(self._step_rows)}\n"
            "Usual reasons: a learning rate that is too high, float16 without loss scaling, or broken rows."
        )

    def floating_point_ops(self, inputs: Any) -> int:
        """Counted by the meter."""
        return 0

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss per supervised token of the held-out rows over all ranks, its perplexity, and their number."""
        metrics = self.held_out_loss(leave=False)  # the checkpoint of this step comes after it
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def held_out_loss(self, *, leave: bool = True) -> dict[str, float]:
        """``eval_loss`` (nats per token), ``eval_perplexity``, ``eval_tokens``, ``eval_seconds``.

        ``leave`` obeys a stop in the middle of it: right before and after the training, wrong between two steps.
        """
        batches = self._eval_batches
        if batches is None:
            return {}
        self.meter.stop()
        started = time.perf_counter()
        # Ranks have different numbers of parts here: nothing in the loop may wait for another rank, and DDP's forward
        # would (it broadcasts the buffers). Where weights are divided every forward does; there parts are made equal.
        ddp = isinstance(self.model_wrapped, nn.parallel.DistributedDataParallel)
        model: Any = self.model_wrapped.module if ddp else self.model_wrapped
        model.eval()
        loss, tokens = 0.0, 0
        with torch.no_grad(), self.ctx.progress.task("evaluating", len(batches), "batches") as task:
            for batch in batches:
                if leave and self.ctx.world_size == 1:
                    self.leave_if_asked()
                for part in self._parts_to_evaluate(batch):
                    loss += float(self.objective(model, part))
                    tokens += part.supervised
                task.advance()
        loss, tokens = self._sum(loss), int(self._sum(tokens))
        mean = loss / tokens
        return {
            "eval_loss": mean,
            "eval_perplexity": math.exp(min(mean, 700.0)),
            "eval_tokens": float(tokens),
            "eval_seconds": time.perf_counter() - started,
        }

    def _parts_to_evaluate(self, batch: Batch) -> list[Part]:
        useful = [part for part in batch.parts if part.supervised]
        if self.shards is None or not self.shards.partitioned:
            return useful
        return self._filled_up(useful, self._agreed_parts([len(useful)])[0])

    def leave_if_asked(self) -> None:
        """Outside the steps a stop is obeyed at once: whatever was trained is in a checkpoint already."""
        if self.agree(self.ctx.stop.requested):
            raise StoppedEarly(
                f"Stopped by {self.ctx.stop.reason or 'another process'} at step {self.state.global_step}."
                " The same command goes on from the last checkpoint, if there is one."
            )

    def _sum(self, value: float) -> Any:
        if self.ctx.world_size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.args.device)
        torch.distributed.all_reduce(total)
        return float(total)

    # Checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Everything that a resumed run needs, complete or invisible."""
        self.meter.stop()
        folder = self.folder
        step = self.state.global_step
        work = folder / f".checkpoint-{step}.partial"
        if self.args.should_save:
            work = checkpoints.staging(folder, step)
        self._barrier()
        if self.state.best_global_step == step:
            self.state.best_model_checkpoint = str(folder / f"checkpoint-{step}")
        if self.shards is None:
            self.save_model(str(work), _internal_call=True)
            self._save_optimizer_and_scheduler(str(work))
            self._save_scaler(str(work))
        else:
            self.shards.save(work)
            if self.args.should_save:
                assert self.lr_scheduler is not None
                torch.save(self.lr_scheduler.state_dict(), work / SCHEDULER_NAME)
        self._save_rng_state(str(work))
        self._barrier()
        if self.args.should_save:
            if self._describe is not None:
                self._describe(work)
            self._remember_callbacks()
            self.state.save_to_json(str(work / STATE_FILE))
            made = checkpoints.publish(work, folder, replace(self._manifest, step=step))
            best = Path(self.state.best_model_checkpoint) if self.state.best_model_checkpoint else None
            self._publish(made, best)
            checkpoints.rotate(folder, self._keep, best)
        elif self.ctx.outbox is not None:  # what this machine has of it; rank 0 is on another one
            self.ctx.outbox.publish_part(work, folder / f"checkpoint-{step}")
            shutil.rmtree(work)
        self._barrier()

    def _publish(self, made: Path, best: Path | None) -> None:
        """The same checkpoints in an object store as here, and those that only it has."""
        self.ctx.publish(made, divided=True)
        if self.ctx.outbox is not None:
            for old in checkpoints.beyond(self.ctx.outbox.published(self.folder), self._keep, best):
                self.ctx.outbox.retire(old)

    # Weights, gradients or optimizer states divided among processes

    def open_engine(self) -> None:
        """Divide the model now: evaluation and answers before the training need it as much as the training itself."""
        assert self.shards is not None
        if self._prepared is not None:
            return

        def make_optimizer() -> torch.optim.Optimizer:
            self.create_optimizer()
            assert self.optimizer is not None
            return self.optimizer

        if self.args.gradient_checkpointing:
            model: Any = self.model
            model.gradient_checkpointing_enable(self.args.gradient_checkpointing_kwargs)
        wrapped, real = self.shards.wrap(self.model, make_optimizer)
        self.optimizer = real
        self.create_scheduler(num_training_steps=self.args.max_steps, optimizer=real)
        self.model_wrapped = wrapped
        self._prepared = wrapped

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """transformers' own, unless an engine has the model: then only what it keeps is to be told."""
        if self.shards is None:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)  # type: ignore[no-untyped-call]
        self.open_engine()
        stepper = _EngineStep(self.shards, self.optimizer)
        self.optimizer = stepper  # type: ignore[assignment]
        self.accelerator._optimizers = [stepper]
        if resume_from_checkpoint is not None:
            scheduler = torch.load(Path(resume_from_checkpoint) / SCHEDULER_NAME, weights_only=True)
            assert self.lr_scheduler is not None
            self.lr_scheduler.load_state_dict(scheduler)
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.callback_handler.train_dataloader = train_dataloader
        return self._prepared, train_dataloader

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.shards is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        self.open_engine()
        self.shards.load(Path(resume_from_checkpoint))

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """An engine moves it a share at a time."""
        if self.shards is None:
            super()._move_model_to_device(model, device)

    def whole_model(self) -> Any:
        """The trained model in one piece and in the types it came in; on the first rank only, elsewhere as it is."""
        if self.shards is None:
            return self.model
        found = dict(self.shards.weights())
        self.shards.close()
        return whole_model(self.model, found) if self.ctx.is_main else self.model

    def have(self, checkpoint: Path) -> None:
        """Have a checkpoint on this machine that may be in an object store only."""
        if self.ctx.outbox is not None and checkpoints.problem(checkpoint) is not None:
            self.ctx.outbox.fetch(checkpoint)
        self._barrier()

    def check_fits(self, checkpoint: Path) -> None:
        """Raises UsageError for a checkpoint that this run cannot go on from."""
        checkpoints.check_fits(checkpoint, self._manifest)

    def load_state(self, checkpoint: Path) -> TrainerState:
        """The history and the best evaluation of the interrupted run."""
        self.state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
        if self.state.best_model_checkpoint:  # the folder may have been moved since
            self.state.best_model_checkpoint = str(self.folder / Path(self.state.best_model_checkpoint).name)
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        self.last_loss = losses[-1] if losses else None
        return self.state

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any = None) -> bool:
        """The best weights are saved when they are seen, whatever ``save_steps`` is."""
        best = super()._determine_best_metric(metrics, trial)
        if best and self._keep_best:
            self.control.should_save = True
        return best

    def _remember_callbacks(self) -> None:
        remembered: Any = self.state.stateful_callbacks
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                remembered[type(callback).__name__] = callback.state()

    def _barrier(self) -> None:
        if self.ctx.world_size > 1:
            torch.distributed.barrier()

    # What is logged

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """To the history, the tracker and the terminal."""
        if "train_runtime" in logs:
            return  # Trainer's own summary of its whole run: the result has these figures from the meter
        if "loss" in logs:
            self.last_loss = logs["loss"]
            logs |= self.meter.since_last()
        if self.state.epoch is not None:
            logs["epoch"] = self.state.epoch
        step = self.state.global_step
        self.state.log_history.append({**logs, "step": step})
        if self.ctx.is_main:
            self.ctx.tracker.metrics(logs, step)
            self.ctx.progress.log(step, self.state.max_steps, logs)
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)


class _EngineStep:
    """What transformers' loop takes for an optimizer, while an engine has the real one."""

    def __init__(self, shards: Shards, real: Any) -> None:
        self._shards, self._real = shards, real
        self.step_was_skipped = False

    @property
    def param_groups(self) -> Any:
        return self._real.param_groups

    def step(self) -> None:
        self.step_was_skipped = not self._shards.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The loop clears the gradients of the model."""


class Watch(TrainerCallback):
    """Looks after each step: shows progress, saves on time, and stops when asked to (all ranks together)."""

    def __init__(self, ctx: RunContext, *, save_minutes: float | None, time_limit_minutes: float | None) -> None:
        self._ctx, self._agree = ctx, any_rank(ctx)
        self._save_seconds = save_minutes * 60 if save_minutes else math.inf
        self._limit = time.monotonic() + time_limit_minutes * 60 if time_limit_minutes else math.inf
        self._saved_at = time.monotonic()
        self.stopped = ""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self._ctx.is_main:
            self._ctx.progress.step(state.global_step, state.max_steps, {})
        done = state.global_step >= state.max_steps
        if time.monotonic() > self._limit:
            self._ctx.stop.request("the time limit of the recipe")
        if not done and self._agree(self._ctx.stop.requested):
            self.stopped = self._ctx.stop.reason or "another process was asked to stop"
            control.should_training_stop = control.should_save = True
        if done or self._agree(time.monotonic() - self._saved_at > self._save_seconds):
            control.should_save = True
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self._saved_at = time.monotonic()
        return control


def any_rank(ctx: RunContext) -> Callable[[bool], bool]:
    """True on every rank when it is on one: they must save and leave at the same step."""
    if ctx.world_size == 1:
        return bool

    def ask(value: bool) -> bool:
        flag = torch.tensor(int(value))
        if torch.cuda.is_available():
            flag = flag.cuda()
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)

    return ask


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed process left half-written or half-removed."""
    for path in folder.glob(".checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)


def _named(batches: list[Batch]) -> str:
    return _some([row for batch in batches for row in batch.rows])


def _some(rows: list[str]) -> str:
    return ", ".join(rows[:20]) + (f" and {len(rows) - 20} more" if len(rows) > 20 else "")
