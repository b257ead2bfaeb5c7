"""``train.per_device_train_batch_size: auto``: the largest number of sequences at once that fits.

The step stays what it is: the sequences of ``ROWS_OF_AUTO x gradient_accumulation_steps`` a process, whose gradients add
up (training/trainer.py). What is found is how many of them go through the model at once: by the arithmetic of
``llmkit plan``, then by one real forward and backward pass over the longest sequences. Should memory run out later, the
step in hand is done again in smaller parts. The number is kept in the run's folder, so that a resumed run does the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn

from llmkit.context import RunContext
from llmkit.data.store import TokenStore
from llmkit.errors import LlmkitError, MissingError, WontFitError
from llmkit.modeling.devices import GIB, device, host_memory, process_limit
from llmkit.training.allocator import give_back
from llmkit.training.batching import Batch, Layout, Sequences, TokenRow
from llmkit.training.kernels import lean_layers
from llmkit.training.lora_layer import lean_adapters
from llmkit.training.meter import forget_peak, resident_peak
from llmkit.training.objective import Objective
from llmkit.training.plan import RESERVE, Planner, divisors
from llmkit.training.settings import ROWS_OF_AUTO, TrainingRecipe
from llmkit.training.trainer import LlmkitTrainer
from llmkit.training.workload import Workload

FILE = "batch_size.json"
_MESSAGES = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "bad_alloc",
    "could not create a memory",
)


@dataclass(frozen=True)
class Chosen:
    """``batch`` sequences in a forward pass of the recipe, ``at_once`` of them through the model at a time."""

    batch: int
    accumulation: int
    at_once: int

    @classmethod
    def read(cls, folder: Path) -> Chosen | None:
        """What an earlier start of the run chose. Raises MissingError for a damaged file."""
        path = folder / FILE
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise MissingError(
                f"{path} is damaged ({error}); it says how many sequences this run takes at once. Start anew with --resume never"
            ) from error

    def write(self, folder: Path) -> None:
        partial = folder / f".{FILE}.partial"
        partial.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        partial.replace(folder / FILE)


def choose_batch(
    recipe: TrainingRecipe, ctx: RunContext, model: Any, objective: Objective, layout: Layout, store: TokenStore | None,
    *, real_step: bool = True,
) -> TrainingRecipe:  # fmt: skip
    """The recipe with numbers in the place of ``auto``; one without ``auto`` comes back as it is.

    ``layout.at_once`` gets the limit that a fall-back of an earlier start left. ``real_step`` False trusts the arithmetic
    (weights that are divided among processes only later). Raises WontFitError where not even one sequence fits.
    """
    if recipe.train.per_device_train_batch_size != "auto":
        return recipe
    total = ROWS_OF_AUTO * recipe.train.gradient_accumulation_steps
    kept = Chosen.read(ctx.output_dir)
    if kept is None:
        kept = _find(recipe, ctx, model, objective, layout, store, total, real_step)
        if ctx.is_main:
            kept.write(ctx.output_dir)
    else:
        ctx.progress.note(f"Sequences at once: {kept.at_once}, as this run chose before")
    layout.at_once.sequences = kept.at_once if kept.at_once < kept.batch else 0
    if ctx.is_main:
        ctx.tracker.tags({f"batch_size.{key}": str(value) for key, value in asdict(kept).items()})
    numbers = {"per_device_train_batch_size": kept.batch, "gradient_accumulation_steps": kept.accumulation}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=numbers)})


def _find(
    recipe: TrainingRecipe, ctx: RunContext, model: Any, objective: Objective, layout: Layout, store: TokenStore | None,
    total: int, real_step: bool,
) -> Chosen:  # fmt: skip
    planner = _planner(recipe, ctx, store)
    planned = planner.own() if planner is not None else None
    batch = _smallest(ctx, planned.batch if planned is not None else total)
    states = planned.memory.size("optimizer") if planned is not None else 0.0
    how = "by the plan" + (f", {planned.memory.device / GIB:.2f} GiB" if planned is not None else "")
    if real_step:
        longest = _longest(recipe, store, total)
        tried = [n for n in divisors(total) if n <= batch]
        batch = next((n for n in tried if _fits(ctx, model, objective, layout, longest[:n], states)), 0)
        how += ", verified by a real step over the longest sequences"
    if not batch:
        raise WontFitError(
            "Not even one sequence fits into memory. Set a smaller data.max_length, train.gradient_checkpointing=true, an "
            "adapter (llmkit lora) or a device with more memory; `llmkit plan` shows what takes it."
        )
    ctx.progress.note(
        f"per_device_train_batch_size: auto is {batch} x {total // batch} accumulated ({how}); a step stays {total} sequences"
    )
    return Chosen(batch, total // batch, batch)


def _planner(recipe: TrainingRecipe, ctx: RunContext, store: TokenStore | None) -> Planner | None:
    """With the lengths that were prepared; None for a model that the arithmetic does not know."""
    try:
        load = None
        if store is not None:
            lengths = tuple(int(n) for n in store.lengths[: 1 << 16])
            load = Workload(lengths, store.supervised / store.tokens, "the prepared rows", len(store), store.tokens)
        return Planner(recipe, device(), ctx.world_size, load=load)
    except LlmkitError:
        return None


def _longest(recipe: TrainingRecipe, store: TokenStore | None, count: int) -> list[list[TokenRow]]:
    """The sequences with the most tokens; of a stream, rows of ``data.max_length``."""
    if store is None:
        ids = np.zeros(recipe.data.max_length, np.int32)
        return [[("", ids, ids)] for _ in range(count)]
    found = Sequences.of(store, packing=recipe.data.packing, max_length=recipe.data.max_length)
    sizes = [int(store.lengths[rows].sum()) for rows in found.bins]
    order = np.argsort(sizes, kind="stable")[::-1][:count]
    made = [found[int(i)] for i in order]
    return [made[i % len(made)] for i in range(count)]


def _fits(
    ctx: RunContext, model: Any, objective: Objective, layout: Layout, rows: list[list[TokenRow]], states: float
) -> bool:
    """One forward and backward pass over ``rows`` on every rank, with room left for the optimizer's states.

    Nothing stays of it: gradients are dropped, the random state is put back, freed memory given back.
    """
    give_back()
    forget_peak()
    with _random_state():
        enough = _passes(model, objective, layout.batch(rows)) and _room(states)
    model.zero_grad(set_to_none=True)
    give_back()
    return bool(_smallest(ctx, int(enough)))


def _smallest(ctx: RunContext, value: int) -> int:
    """The smallest number of all ranks: they must do the same."""
    if ctx.world_size == 1:
        return value
    on_gpu = torch.cuda.is_available()
    if not torch.distributed.is_initialized():
        PartialState(cpu=not on_gpu)  # as TrainingArguments will, later
    number = torch.tensor(value, device="cuda" if on_gpu else "cpu")
    torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MIN)
    return int(number)


def _passes(model: Any, objective: Objective, batch: Batch) -> bool:
    model.train()
    bare = model.get_base_model() if hasattr(model, "peft_config") else model
    try:
        with objective.active(bare), lean_layers(model), lean_adapters(model):
            for part in batch.parts:
                (objective(model, part) / max(batch.supervised, 1)).backward()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


class _random_state:  # noqa: N801  used as a context manager, like contextlib's
    """Dropout and noise draw from the same numbers afterwards as if nothing had happened."""

    def __enter__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def __exit__(self, *_: object) -> None:
        torch.set_rng_state(self._cpu)
        if self._gpu:
            torch.cuda.set_rng_state_all(self._gpu)


def _room(states: float) -> bool:
    """The optimizer's states, which come with the first step, fit beside what the pass needed."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        mine = torch.cuda.max_memory_reserved()
        others = total - free - torch.cuda.memory_reserved()
        return mine + others + states <= total * (1 - RESERVE)
    limits = [limit for limit in (host_memory(), process_limit()) if limit is not None]
    return resident_peak() + states <= min(limits) * (1 - RESERVE)


def is_out_of_memory(error: BaseException) -> bool:
    """Python's, torch's and the matrix library's ways to say so."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _MESSAGES)


class FittingTrainer(LlmkitTrainer):
    """Does a step again in smaller parts when memory runs out in it: gradients and random state as at its beginning."""

    layout: Layout

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Any]:
        batches, supervised = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._batches, self._at = batches, 0
        self._before = (torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])
        return batches, supervised

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self._at += 1
        try:
            return super().training_step(model, self._batches[self._at - 1], num_items_in_batch)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside the handler: the error's traceback holds the tensors of the pass that failed.
        return self._again(model, num_items_in_batch)

    def _again(self, model: nn.Module, num_items_in_batch: Any) -> Tensor:
        while True:
            self._shrink()
            model.zero_grad(set_to_none=True)
            give_back()
            torch.set_rng_state(self._before[0])
            if self._before[1]:
                torch.cuda.set_rng_state_all(self._before[1])
            self._batches = [self.layout.batch(batch.sequences) for batch in self._batches]
            self._parts = [len(batch.parts) for batch in self._batches]
            self._step_loss = 0.0
            try:
                for batch in self._batches[: self._at]:
                    loss = super().training_step(model, batch, num_items_in_batch)
                return loss
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise

    def _shrink(self) -> None:
        """Half as many sequences at once, said, tracked and kept. Raises WontFitError at one."""
        chosen = Chosen.read(self.ctx.output_dir)
        assert chosen is not None
        had, fewer = chosen.at_once, replace(chosen, at_once=chosen.at_once // 2)
        if self.ctx.world_size > 1 or self.shards is not None or had <= 1:
            if had > 1:
                fewer.write(self.ctx.output_dir)
                raise WontFitError(
                    f"Out of memory with {had} sequences at once. The same command goes on from the last checkpoint with {had // 2}."
                )
            raise WontFitError(
                "Out of memory with one sequence at once. Set a smaller train.micro_batch_tokens or data.max_length, or "
                "train.gradient_checkpointing=true."
            )
        self.layout.at_once.sequences = fewer.at_once
        fewer.write(self.ctx.output_dir)
        step = self.state.global_step
        self.ctx.progress.note(
            f"warning: out of memory in step {step + 1} with {had} sequences at once: from here on {had // 2} at once; "
            "the step is done again, and stays the same step"
        )
        self.ctx.tracker.tags({"batch_size.at_once": str(had // 2)})
        self.ctx.tracker.metrics({"sequences_at_once": float(had // 2)}, step)


def fitting(recipe: TrainingRecipe, layout: Layout) -> type[LlmkitTrainer]:
    """The trainer for a recipe that says ``auto``; the usual one for any other."""
    if recipe.train.per_device_train_batch_size != "auto":
        return LlmkitTrainer
    return type("FittingTrainer", (FittingTrainer,), {"layout": layout})
