"""The recipe's ``train:`` block as transformers' TrainingArguments."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import torch
from transformers import TrainingArguments, get_scheduler

from llmkit.errors import MissingError, UsageError
from llmkit.training.settings import TrainSettings

SAME_NAME = (
    "num_train_epochs", "learning_rate", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "optim", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "logging_steps", "save_steps", "gradient_checkpointing", "bf16",
    "fp16", "torch_compile", "use_liger_kernel", "full_determinism",
)  # fmt: skip
"""Settings that go through as they are; the others are read where they are acted on."""


def total_steps(train: TrainSettings, batches: int | None) -> int:
    """Optimizer steps of the run. ``batches`` per epoch and process; None for a stream, which has ``max_steps``."""
    if train.max_steps > 0:
        return train.max_steps
    assert batches is not None, "recipe validation asks for max_steps with a stream"
    per_epoch = -(-batches // train.gradient_accumulation_steps)
    return math.ceil(train.num_train_epochs * per_epoch)


def warmup_steps(train: TrainSettings, steps: int) -> int:
    """Optimizer steps in which the learning rate rises, of ``steps``."""
    return train.warmup_steps or math.ceil(train.warmup_ratio * steps)


def training_arguments(
    train: TrainSettings, *, folder: Path, seed: int, steps: int, evaluates: bool
) -> TrainingArguments:
    """``folder`` holds the checkpoints; ``steps`` is the length of the run.

    Raises MissingError without Liger or a compiler, UsageError for arguments that the schedule does not take.
    """
    if train.use_liger_kernel:
        _check_liger()
    if train.torch_compile:
        _check_compiler()
    warmup = warmup_steps(train, steps)
    _check_schedule(train, warmup, steps)
    given = {name: getattr(train, name) for name in SAME_NAME}
    return TrainingArguments(
        **given,
        output_dir=str(folder),
        max_steps=steps,
        warmup_steps=warmup,
        eval_strategy="steps" if evaluates and train.eval_steps else "no",
        eval_steps=train.eval_steps,
        metric_for_best_model="eval_loss" if evaluates else None,
        greater_is_better=False,
        save_strategy="steps",
        restore_callback_states_from_checkpoint=True,  # early stopping goes on counting
        seed=seed,
        data_seed=seed,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        logging_nan_inf_filter=False,
        dataloader_pin_memory=False,
        gradient_checkpointing_kwargs={"use_reentrant": False} if train.gradient_checkpointing else None,
        ddp_find_unused_parameters=False,
        # The loss is ours (loss.py): Liger's replaces the model's forward, which must stay the one that was probed.
        liger_kernel_config={"fused_linear_cross_entropy": False, "cross_entropy": False},
    )


def _check_schedule(train: TrainSettings, warmup: int, steps: int) -> None:
    name, extra = train.lr_scheduler_type, train.lr_scheduler_kwargs
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    try:
        get_scheduler(
            name, optimizer, num_warmup_steps=warmup, num_training_steps=steps, scheduler_specific_kwargs=dict(extra)
        )
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"train.lr_scheduler_kwargs: {dict(extra)} are not the arguments of the schedule {name}: {error}"
        ) from error


def _check_liger() -> None:
    from importlib.util import find_spec

    if not torch.cuda.is_available():
        raise MissingError("train.use_liger_kernel: its kernels need a GPU, and there is none here.")
    if find_spec("liger_kernel") is None:
        raise MissingError("train.use_liger_kernel: install the package with: pip install liger-kernel")


def _check_compiler() -> None:
    """torch.compile builds C++ on a CPU; on a GPU Triton brings its own."""
    names = (os.environ.get("CXX", ""), "g++", "clang++", "c++")
    if not torch.cuda.is_available() and not any(shutil.which(name) for name in names if name):
        raise MissingError(
            "train.torch_compile: on a CPU it needs a C++ compiler, and none was found (g++, clang++ or CXX). "
            "Install one (Debian and Ubuntu: apt install g++) or set train.torch_compile: false."
        )
