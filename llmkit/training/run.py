"""Train: what sft, lora and cpt do, from the recipe to an exported model that was opened again."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerState

from llmkit.context import Result, RunContext
from llmkit.data.prepare import prepare, prepare_eval
from llmkit.data.render import Renderer
from llmkit.data.store import TokenStore
from llmkit.data.stream import TokenStream
from llmkit.errors import StoppedEarly, UsageError
from llmkit.modeling.adapters import attach
from llmkit.modeling.flops import flops_per_token, peak_flops
from llmkit.modeling.licences import as_tags, licences, refuse
from llmkit.modeling.load import count_parameters, is_seq2seq
from llmkit.modeling.quantized import describe
from llmkit.modeling.settings import AdapterSettings
from llmkit.modeling.tokenizer import load_tokenizer, stop_ids
from llmkit.training import checkpoints
from llmkit.training.allocator import keep_freed_memory
from llmkit.training.arguments import total_steps, training_arguments
from llmkit.training.batching import (
    Batch,
    EpochOrder,
    Layout,
    Sequences,
    StreamedBatches,
    streamed_loader,
    train_loader,
)  # fmt: skip
from llmkit.training.corpus import texts
from llmkit.training.dividing import choose_divided, describe_checkpoint, finish, load_divided, shards_of
from llmkit.training.fit import choose_batch, fitting
from llmkit.training.group import open_group
from llmkit.training.kernels import lean_layers
from llmkit.training.lora_layer import lean_adapters
from llmkit.training.meter import Meter
from llmkit.training.noise import noisy_embeddings
from llmkit.training.objective import choose
from llmkit.training.outcome import (
    Before,
    answers,
    base_of,
    describe_inputs,
    export,
    report_stream,
    sample_prompts,
    show_curves,
    stream_inputs,
)  # fmt: skip
from llmkit.training.remember import Needs
from llmkit.training.settings import TrainingRecipe
from llmkit.training.shapes import CPU_PART_TOKENS
from llmkit.training.sharding import Shards, rank_variables
from llmkit.training.trainer import LlmkitTrainer, Watch, clear_leftovers


@dataclass
class Data:
    """Held-out rows are None where the recipe has none; ``train`` is None for a stream."""

    train: TokenStore | None
    eval: TokenStore | None
    report: dict[str, Any]
    stream: TokenStream | None = None


def train(recipe: TrainingRecipe, ctx: RunContext, *, stage: str, adapter: AdapterSettings | None = None) -> Result:
    """Run the recipe; ``adapter`` trains a LoRA or DoRA adapter over frozen weights instead of all weights.

    Raises StoppedEarly after a checkpoint when a signal or the time limit came; the classes of llmkit.errors for data,
    models and settings that cannot be trained with.
    """
    needs = Needs.of(recipe, ctx, stage)
    keep_freed_memory()
    _inspect_licences(recipe, ctx)
    seq2seq = is_seq2seq(recipe.model)
    tokenizer = load_tokenizer(recipe.model, lambda: texts(recipe.data))
    renderer = _renderer(recipe, tokenizer, seq2seq)
    data = _read(recipe, renderer, ctx)  # before any process group is opened: ranks wait on a file lock, not a timeout
    open_group(ctx, recipe.launch.timeout_minutes)
    shards = shards_of(recipe, ctx, tokenizer)
    model: Any = load_divided(recipe, shards, tokenizer)
    if recipe.model.quantized is not None:
        ctx.progress.note(describe(model, recipe.model.quantized))
    if adapter is not None:
        model = attach(model, adapter, seed=recipe.seed)
    base = base_of(recipe, model) if adapter is not None and shards is not None else None
    kept: dict[str, Any] = {"stop_ids": renderer.stop_ids, "chat_template": renderer.chat_template}
    describe_files = partial(describe_checkpoint, model, tokenizer, base=base, **kept)
    trainer, watch = _trainer(recipe, ctx, model, tokenizer, data, seq2seq, shards, describe_files)
    describe_inputs(recipe, ctx, model, data.report)

    prompts = sample_prompts(data.eval or data.train, tokenizer, recipe.train.sample_prompts)
    divided = shards is not None and shards.partitioned
    with ExitStack() as engine:
        if shards is not None:  # layers are compared with their lean ones while their weights are whole
            _lean(engine, recipe, model, shards)
            engine.enter_context(rank_variables())
            trainer.open_engine()
        before = Before.of(ctx, model, tokenizer, renderer, prompts, divided=divided)
        with ExitStack() as lean:
            lean.enter_context(trainer.objective.active(_bare(model)))
            if recipe.train.neftune_noise_alpha:
                lean.enter_context(noisy_embeddings(_bare(model), recipe.train.neftune_noise_alpha))
            if shards is None:
                _lean(lean, recipe, model, None)
            loss_before = before.held_out(trainer)
            _go(ctx, trainer)
            if data.stream is not None:
                report_stream(recipe, ctx, data.report, data.stream)
            if watch.stopped:
                raise StoppedEarly(_stopped(ctx, trainer, watch.stopped))
            _take_best(recipe, ctx, trainer)
            loss_after = trainer.held_out_loss()
        after = answers(ctx, model, tokenizer, renderer, prompts, divided=divided)
        model = trainer.whole_model()

    example = {"prompt": prompts.shown[0]["prompt"], "answer": after[0]} if after else {"prompt": "Hello", "answer": ""}
    saved = export(recipe, ctx, model, tokenizer, renderer, adapter is not None, example)
    return Result(
        stage=stage,
        name=recipe.name,
        output_dir=ctx.output_dir,
        metrics=_metrics(trainer, loss_before, loss_after, needs),
        artifacts={"model" if adapter is None else "adapter": saved.name} | show_curves(recipe, ctx, trainer),
        samples=[{**a, "before": b, "after": c} for a, b, c in zip(prompts.shown, before.answers, after, strict=True)],
    )


def _lean(stack: ExitStack, recipe: TrainingRecipe, model: Any, shards: Shards | None) -> None:
    """Lean layers until the stack is left.

    Without whole weights they cannot be compared; and ZeRO-3 gathers weights when the layer that has them is called,
    which the parts of an adapted layer are not in its lean form.
    """
    if recipe.train.torch_compile:
        return
    if recipe.model.init != "sharded":
        stack.enter_context(lean_layers(model))
    if shards is None or shards.name != "zero3":
        stack.enter_context(lean_adapters(model))


def _renderer(recipe: TrainingRecipe, tokenizer: PreTrainedTokenizerBase, seq2seq: bool) -> Renderer:
    data = recipe.data
    return Renderer(
        tokenizer,
        chat_template=data.chat_template,
        system=data.system,
        supervise=data.supervise,
        seq2seq=seq2seq,
        stop_ids=stop_ids(recipe.model, tokenizer),
    )


def _inspect_licences(recipe: TrainingRecipe, ctx: RunContext) -> None:
    """Track the licences of model and data. Raises DataError for what ``data.guard.allow_licenses`` does not have."""
    found = licences(recipe.model, recipe.data)
    if ctx.is_main:
        ctx.tracker.tags(as_tags(found))
    refuse(found, recipe.data.guard)


def _read(recipe: TrainingRecipe, renderer: Renderer, ctx: RunContext) -> Data:
    common: dict[str, Any] = {
        "seed": recipe.seed, "output_dir": ctx.output_dir, "progress": ctx.progress, "is_main": ctx.is_main,
    }  # fmt: skip
    if not recipe.data.streaming:
        made = prepare(recipe.data, renderer, **common)
        return Data(made.train, made.eval, made.report)
    held_out = prepare_eval(recipe.data, renderer, **common)
    stream = TokenStream(recipe.data, renderer, recipe.seed, rank=ctx.rank, world_size=ctx.world_size)
    return Data(None, held_out, stream_inputs(recipe, ctx, held_out), stream)


def _trainer(
    recipe: TrainingRecipe, ctx: RunContext, model: Any, tokenizer: PreTrainedTokenizerBase, data: Data, seq2seq: bool,
    shards: Shards | None, describe: Callable[[Path], None],
) -> tuple[LlmkitTrainer, Watch]:  # fmt: skip
    train = recipe.train
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if shards is None or not shards.partitioned:
        model.to(device)
    # The compiler would make a new graph for every list of row lengths.
    own_attention = recipe.model.attn_implementation == "auto" and not train.torch_compile
    asked: dict[str, Any] = {"seq2seq": seq2seq, "own_attention": own_attention, "device": device}
    if shards is None:
        objective, notes = choose(model, **asked)
    else:
        objective, notes = choose_divided(model, shards, sharded=recipe.model.init == "sharded", **asked)
    for note in notes:
        ctx.progress.note(note)
    if recipe.data.packing and not objective.flat:
        raise UsageError(
            "data.packing: this model cannot keep packed rows apart, so they would read each other. Set data.packing: false."
        )
    layout = Layout(
        flat=objective.flat, part_tokens=_part_tokens(train.micro_batch_tokens, device),
        pad_id=int(tokenizer.pad_token_id or 0), seq2seq=seq2seq,
    )  # fmt: skip
    kind = fitting(recipe, layout)
    recipe = choose_batch(recipe, ctx, model, objective, layout, data.train, real_step=shards is None)
    train = recipe.train
    batches, fingerprint = _train_batches(recipe, ctx, data, layout)
    steps = total_steps(train, None if data.stream else len(batches))
    if shards is not None:
        finish(shards, recipe, ctx, steps)
    meter = _meter(ctx, model, data, device)
    watch = Watch(ctx, save_minutes=train.save_minutes, time_limit_minutes=train.time_limit_minutes)
    callbacks: list[TrainerCallback] = [watch]
    if train.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(train.early_stopping_patience, train.early_stopping_threshold))
    trainer = kind(
        model,
        training_arguments(
            train, folder=ctx.output_dir / "checkpoints", seed=recipe.seed, steps=steps, evaluates=data.eval is not None
        ),
        ctx=ctx,
        objective=objective,
        train_batches=batches,
        eval_batches=_eval_batches(recipe, ctx, data.eval, layout),
        meter=meter,
        keep=train.save_total_limit,
        keep_best=train.load_best_model_at_end or train.early_stopping_patience is not None,
        fingerprint=fingerprint,
        batch=train.batch_size * train.gradient_accumulation_steps * ctx.world_size,
        callbacks=callbacks,
        filler=layout.filler(),
        shards=shards,
        describe=describe if shards is not None else None,
    )
    return trainer, watch


def _part_tokens(setting: int | str, device: torch.device) -> int:
    if isinstance(setting, int):
        return setting
    return CPU_PART_TOKENS if device.type == "cpu" else 0


def _train_batches(
    recipe: TrainingRecipe, ctx: RunContext, data: Data, layout: Layout
) -> tuple[DataLoader[Batch], str]:
    """This rank's batches, and the fingerprint that a checkpoint is held against."""
    size, packing, longest = recipe.train.batch_size, recipe.data.packing, recipe.data.max_length
    if data.train is None:
        assert data.stream is not None
        streamed = StreamedBatches(data.stream, layout, size=size, packing=packing, max_length=longest)
        return streamed_loader(streamed), "stream"
    sequences = Sequences.of(data.train, packing=packing, max_length=longest)
    order = EpochOrder(
        len(sequences), size, seed=recipe.seed, shuffle=recipe.data.shuffle, rank=ctx.rank, world_size=ctx.world_size
    )
    return train_loader(sequences, layout, order), sequences.fingerprint()


def _eval_batches(
    recipe: TrainingRecipe, ctx: RunContext, store: TokenStore | None, layout: Layout
) -> DataLoader[Batch] | None:
    if store is None:
        return None
    sequences = Sequences.of(store, packing=recipe.data.packing, max_length=recipe.data.max_length)
    size = recipe.train.per_device_eval_batch_size
    order = EpochOrder(len(sequences), size, seed=0, shuffle=False, rank=ctx.rank, world_size=ctx.world_size)
    return train_loader(sequences, layout, order)


def _meter(ctx: RunContext, model: Any, data: Data, device: torch.device) -> Meter:
    length, share = 512, 1.0
    if data.train is not None:
        length, share = math.ceil(data.train.lengths.mean()), data.train.supervised / data.train.tokens
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return Meter(ctx.world_size, flops_per_token(model, length, supervised=share), peak_flops(name))


def _go(ctx: RunContext, trainer: LlmkitTrainer) -> None:
    """Train from the start, or from the checkpoint that ``--resume`` names or finds."""
    folder = trainer.folder
    checkpoint = _resume_point(ctx, folder)
    if ctx.is_main or ctx.outbox is not None:
        clear_leftovers(folder)
    if checkpoint is None:
        trainer.train()
        return
    trainer.check_fits(checkpoint)
    ctx.progress.note(f"Going on from {checkpoint}")
    state = trainer.load_state(checkpoint)
    if state.global_step >= trainer.args.max_steps or _had_enough(state):
        trainer._load_from_checkpoint(str(checkpoint))  # all steps are done: only the export is left
        return
    trainer.train(resume_from_checkpoint=str(checkpoint))


def _had_enough(state: TrainerState) -> bool:
    """Early stopping had ended the run in the step of this checkpoint."""
    callbacks: Any = state.stateful_callbacks
    found = callbacks.get("EarlyStoppingCallback")
    if found is None:
        return False
    counted: int = found["attributes"]["early_stopping_patience_counter"]
    return counted >= int(found["args"]["early_stopping_patience"])


def _resume_point(ctx: RunContext, folder: Path) -> Path | None:
    """Raises UsageError for a checkpoint that was named and is not complete."""
    if ctx.resume not in ("auto", "never"):
        named = Path(ctx.resume)
        why = checkpoints.problem(named)
        if why is not None:
            raise UsageError(f"--resume {named}: not a complete checkpoint ({why}).")
        return named
    if ctx.resume == "never":
        return None
    found, skipped = checkpoints.last_complete(folder)
    for line in skipped:
        ctx.progress.note(line)
    return found


def _stopped(ctx: RunContext, trainer: LlmkitTrainer, why: str) -> str:
    step, total = trainer.state.global_step, trainer.state.max_steps
    return (
        f"Stopped by {why} after step {step} of {total}, with a checkpoint in {ctx.output_dir / 'checkpoints'}."
        " The same command goes on from there."
    )


def _take_best(recipe: TrainingRecipe, ctx: RunContext, trainer: LlmkitTrainer) -> None:
    """Put the weights of the best evaluation back, where the recipe wants those instead of the last."""
    best = trainer.state.best_model_checkpoint
    if (recipe.train.load_best_model_at_end or recipe.train.early_stopping_patience) and best:
        ctx.progress.note(f"Taking the weights of {best} (held-out loss {trainer.state.best_metric:.4f})")
        trainer.have(Path(best))
        trainer._load_from_checkpoint(best)


def _metrics(
    trainer: LlmkitTrainer, before: dict[str, float], after: dict[str, float], needs: Needs
) -> dict[str, float]:
    count = count_parameters(trainer.model_wrapped)
    metrics = {
        "steps": float(trainer.state.global_step),
        **({"train_loss": trainer.last_loss} if trainer.last_loss is not None else {}),
        **{f"{name}_before": before[name] for name in ("eval_loss", "eval_perplexity") if name in before},
        **{f"{name}_after": after[name] for name in ("eval_loss", "eval_perplexity") if name in after},
        **trainer.meter.total(),
        "train_seconds": trainer.meter.seconds,
        **needs.metrics(trainer.meter),
        "parameters": float(count.all),
        "parameters_trainable": float(count.trainable),
    }
    trainer.ctx.tracker.metrics(metrics, trainer.state.global_step)
    return metrics


def _bare(model: Any) -> PreTrainedModel:
    bare: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return bare  # type: ignore[no-any-return]
