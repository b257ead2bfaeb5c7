"""Settings of ``train:``, in Hugging Face's names and meanings, and the recipe that sft, lora and cpt share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from llmkit.data.settings import DataSettings
from llmkit.modeling.settings import ModelSettings
from llmkit.recipe import Conflict, Recipe, Settings
from llmkit.training.fsdp_settings import FsdpSettings
from llmkit.training.sharding_rules import sharding_conflicts

ROWS_OF_AUTO = 8
"""``per_device_train_batch_size: auto`` keeps the steps of this many sequences a forward pass."""


class TrainSettings(Settings):
    num_train_epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the training rows; ``max_steps`` wins where it is set."""
    max_steps: Annotated[int, Field(ge=-1)] = -1
    """Optimizer steps; -1 follows ``num_train_epochs``."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    """Peak learning rate."""
    per_device_train_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = 8
    """Rows (packed: sequences) per process and forward pass. ``auto`` trains the same steps as 8 would, and finds how many of a step's sequences fit at once (docs/memory.md)."""
    per_device_eval_batch_size: Annotated[int, Field(ge=1)] = 8
    """Rows (packed: sequences) per process in evaluation."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = 1
    """Forward passes per optimizer step. The loss is the mean over all supervised tokens of the step."""
    micro_batch_tokens: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Most tokens that go through the model at once: a larger batch is run in parts whose gradients add up to the same step, in less memory. ``auto`` is 2,048 on a CPU and no limit on a GPU; 0 is no limit."""
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
        "cosine_with_min_lr", "warmup_stable_decay",
    ] = "cosine"  # fmt: skip
    """Shape of the learning rate over the steps."""
    lr_scheduler_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the schedule, e.g. ``{min_lr_rate: 0.1}``."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps in which the learning rate rises from 0; ``warmup_steps`` wins where it is set."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps in which the learning rate rises from 0."""
    optim: Literal["adamw_torch", "adamw_torch_fused", "adafactor", "sgd"] = "adamw_torch_fused"
    """Optimizer, by Hugging Face's name."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay (norms and biases are left out)."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's decay of the first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """AdamW's decay of the second moment."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are scaled down to this norm; 0 leaves them."""
    logging_steps: Annotated[int, Field(ge=1)] = 10
    """A line of metrics every so many steps."""
    eval_steps: Annotated[int, Field(ge=1)] | None = None
    """Evaluate every so many steps; None: at the start and the end only. Needs ``data.eval``."""
    save_steps: Annotated[int, Field(ge=1)] = 500
    """Checkpoint every so many steps (and at the end)."""
    save_total_limit: Annotated[int, Field(ge=1)] | None = 2
    """Checkpoints kept; the best one and the last are never removed."""
    save_minutes: Annotated[float, Field(gt=0)] | None = None
    """Checkpoint when this much time has passed since the last one, too."""
    time_limit_minutes: Annotated[float, Field(gt=0)] | None = None
    """Stop with a checkpoint and the 'run me again' exit code after this time."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    bf16: bool = False
    """Mixed precision: bfloat16 products over float32 weights (``model.dtype: float32``)."""
    fp16: bool = False
    """Mixed precision in float16 with loss scaling, for GPUs without bfloat16."""
    torch_compile: bool = False
    """Compile the model's forward and backward."""
    use_liger_kernel: bool = False
    """Fused Triton kernels on a GPU (package ``liger-kernel``)."""
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = None
    """Noise on the embeddings in training (NEFTune, arXiv 2310.05914), 5 to 15 is usual."""
    early_stopping_patience: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many evaluations without a better held-out loss, and keep the best checkpoint's weights."""
    early_stopping_threshold: Annotated[float, Field(ge=0)] = 0.0
    """Least improvement that counts for early stopping."""
    load_best_model_at_end: bool = False
    """Export the checkpoint with the lowest held-out loss instead of the last."""
    full_determinism: bool = False
    """Deterministic kernels on a GPU too, slower. A CPU run is always deterministic."""
    sample_prompts: Annotated[int, Field(ge=0)] = 3
    """Held-out rows answered by the model before and after training and kept in the result; 0 for none."""

    @property
    def batch_size(self) -> int:
        """``per_device_train_batch_size`` once it is a number: ``auto`` is decided before the first batch is made."""
        size = self.per_device_train_batch_size
        assert size != "auto", "fit.choose_batch puts a number in its place"
        return size

    def conflicts(self) -> Iterator[Conflict]:
        if self.max_steps == 0:
            yield Conflict("max_steps", "no steps: give 1 or more, or -1 to follow `num_train_epochs`")
        if self.bf16 and self.fp16:
            yield Conflict("fp16", "excludes `bf16`", "keep one of them", ("bf16",))
        if self.early_stopping_threshold and self.early_stopping_patience is None:
            hint = "set `early_stopping_patience`, or remove this"
            yield Conflict("early_stopping_threshold", "does nothing alone", hint, ("early_stopping_patience",))
        yield from self._best_model_conflicts()

    def _best_model_conflicts(self) -> Iterator[Conflict]:
        """Choosing the best checkpoint needs checkpoints at evaluations."""
        for key in ("load_best_model_at_end", "early_stopping_patience"):
            if not getattr(self, key):
                continue
            if self.eval_steps is None:
                yield Conflict(key, "needs `eval_steps`: without evaluations none is the best", also=("eval_steps",))
            elif self.save_steps % self.eval_steps:
                message = f"needs `save_steps` ({self.save_steps}) to be a multiple of `eval_steps` ({self.eval_steps})"
                yield Conflict(key, message, also=("eval_steps", "save_steps"))


class TrainingRecipe(Recipe):
    """What sft, lora and cpt have in common."""

    several_processes: ClassVar[bool] = True

    model: ModelSettings
    """The model that is trained."""
    data: DataSettings
    """What it is trained on."""
    train: TrainSettings = TrainSettings()
    """How it is trained."""
    deepspeed: str | dict[str, Any] | None = None
    """Divide optimizer states, gradients and weights among the processes by DeepSpeed: a preset (``zero1``, ``zero2``, ``zero3``, each with ``_offload``; ``zero3_nvme``), the path of a DeepSpeed JSON, or a mapping in its keys. ``auto`` in it is filled in from the recipe."""
    fsdp: FsdpSettings | None = None
    """The same by PyTorch's FSDP2: ``{}`` for its defaults. Excludes ``deepspeed``."""
    plan: Literal["warn", "error", "off"] = "warn"
    """What happens before anything is loaded when the run will not fit into memory or on the disk by ``llmkit plan``: a line, or an end with exit code 5."""

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        if self.data.streaming and self.train.max_steps < 1:
            hint = "a stream has no known length: set how many steps to train"
            yield Conflict("train.max_steps", "is needed with `data.streaming`", hint, ("data.streaming",))
        if self.data.eval is None:
            for key in ("eval_steps", "load_best_model_at_end", "early_stopping_patience"):
                if getattr(self.train, key):
                    hint = "for example `eval: {split: 0.02}`"
                    yield Conflict(f"train.{key}", "needs held-out rows, in `data.eval`", hint, ("data.eval",))
        yield from self._quantization_conflicts()
        yield from sharding_conflicts(self)
        for key in ("bf16", "fp16"):
            if getattr(self.train, key) and self.model.dtype not in ("auto", "float32"):
                message = f"mixed precision keeps float32 weights, but `model.dtype` is {self.model.dtype}"
                hint = f"set `model.dtype: float32`, or remove `{key}` to train in {self.model.dtype} throughout"
                yield Conflict(f"train.{key}", message, hint, ("model.dtype",))

    def _quantization_conflicts(self) -> Iterator[Conflict]:
        """Quantized weights stay as they are: something beside them has to learn."""
        if self.model.quantization is None:
            return
        adapter: Any = getattr(self, "adapter", None)
        if adapter is None:
            has_one = "adapter" in type(self).model_fields
            hint = "add `adapter: {}`" if has_one else "train an adapter with `llmkit lora`"
            message = "quantized weights cannot be trained themselves: a step is far smaller than their steps"
            yield Conflict("model.quantization", message, f"{hint}, or remove this to train all weights")
        elif adapter.init_lora_weights in ("pissa", "olora"):
            message = f"{adapter.init_lora_weights} takes its start out of the weights and changes them, which quantized ones do not allow"
            yield Conflict("adapter.init_lora_weights", message, "use true or gaussian", ("model.quantization",))
        if self.train.torch_compile:
            message = "does not go through the quantized layers of `model.quantization`"
            yield Conflict("train.torch_compile", message, "remove one of them", ("model.quantization",))
