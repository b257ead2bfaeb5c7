"""What a training run shows for itself: answers before and after, curves, and a model that was opened again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from llmkit.context import RunContext
from llmkit.data.guard.examine import FILES as GUARD_FILES
from llmkit.data.guard.findings import metrics as guard_metrics
from llmkit.data.prepare import HISTOGRAM, REPORT
from llmkit.data.render import Renderer
from llmkit.data.report import added, together, write_json
from llmkit.data.sources import Source, digest, eval_sources, test_sources, train_sources
from llmkit.data.store import TokenStore
from llmkit.data.stream import TokenStream
from llmkit.errors import StoppedEarly
from llmkit.inference.generate import Generator
from llmkit.modeling.export import save_adapter, save_model, verify
from llmkit.modeling.load import count_parameters, load_config
from llmkit.modeling.locate import BaseInfo, describe_base, find_folder, model_digest
from llmkit.modeling.probe import dtype_name, take_probe
from llmkit.training.plots import loss_curves
from llmkit.training.settings import TrainingRecipe

if TYPE_CHECKING:
    from llmkit.training.trainer import LlmkitTrainer

BEFORE = "before.json"
CURVES = "loss.png"
ANSWER_TOKENS = 96


@dataclass(frozen=True)
class Prompts:
    """Held-out rows as prompts: token ids for the model, ``prompt`` and ``reference`` texts for the reader."""

    ids: list[list[int]] = field(default_factory=list)
    shown: list[dict[str, str]] = field(default_factory=list)


def sample_prompts(store: TokenStore | None, tokenizer: PreTrainedTokenizerBase, count: int) -> Prompts:
    """The first ``count`` rows, up to where the first thing to learn begins; for plain text, its first half."""
    prompts = Prompts()
    for index in range(min(count, len(store)) if store is not None else 0):
        assert store is not None
        ids, labels = store.row(index)
        learned = np.flatnonzero(labels != -100)
        seq2seq = len(labels) != len(ids)
        cut = len(ids) if seq2seq else int(learned[0]) if learned[0] else max(1, len(ids) // 2)
        answer = labels[labels != -100] if seq2seq or learned[0] else ids[cut:]
        prompts.ids.append([int(i) for i in ids[:cut]])
        reference = str(tokenizer.decode(answer, skip_special_tokens=True)).strip()
        prompts.shown.append({"prompt": _question(ids[:cut], tokenizer), "reference": reference})
    return prompts


def _question(ids: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the user said last, for people to read: the last text between special tokens that is more than a role."""
    special = np.flatnonzero(np.isin(ids, tokenizer.all_special_ids))
    parts = [str(tokenizer.decode(part, skip_special_tokens=True)).strip() for part in np.split(ids, special)]
    said = [part for part in parts if part and part not in ("assistant", "model", "user", "system")]
    return said[-1].removeprefix("user\n").strip() if said else ""


def answers(
    ctx: RunContext, model: Any, tokenizer: PreTrainedTokenizerBase, renderer: Renderer, prompts: Prompts,
    *, divided: bool = False,
) -> list[str]:  # fmt: skip
    """The model's own, most likely answers; on the main rank only, or on all together where its weights are divided."""
    if not prompts.ids or not (ctx.is_main or divided):
        return [""] * len(prompts.ids)
    generator = Generator(model, tokenizer, renderer, divided=divided)
    found = []
    with ctx.progress.task("answering samples", len(prompts.ids), "prompts") as task:
        for ids in prompts.ids:
            if ctx.stop.requested and ctx.world_size == 1:
                raise StoppedEarly(f"Stopped by {ctx.stop.reason}. The same command goes on from here.")
            found.append(generator.answer(ids, max_new_tokens=ANSWER_TOKENS))
            task.advance()
    return found


@dataclass
class Before:
    """What the model was before the first step, kept in the run folder: a resumed run does not ask a trained model."""

    path: Path
    answers: list[str]
    held_out_loss: dict[str, float] | None = None

    @classmethod
    def of(
        cls, ctx: RunContext, model: Any, tokenizer: PreTrainedTokenizerBase, renderer: Renderer, prompts: Prompts,
        *, divided: bool = False,
    ) -> Before:  # fmt: skip
        path = ctx.output_dir / BEFORE
        if path.exists():
            return cls(path, **json.loads(path.read_text(encoding="utf-8")))
        return cls(path, answers(ctx, model, tokenizer, renderer, prompts, divided=divided))

    def held_out(self, trainer: LlmkitTrainer) -> dict[str, float]:
        """The held-out loss of the untrained model; the first start of a run measures and keeps it."""
        if self.held_out_loss is None:
            self.held_out_loss = trainer.held_out_loss()
            if trainer.ctx.is_main:
                trainer.ctx.tracker.metrics(self.held_out_loss, 0)
                kept = {key: value for key, value in asdict(self).items() if key != "path"}
                partial = self.path.with_suffix(".partial")
                partial.write_text(json.dumps(kept, ensure_ascii=False), encoding="utf-8")
                partial.replace(self.path)
        return self.held_out_loss


def describe_inputs(recipe: TrainingRecipe, ctx: RunContext, model: Any, report: dict[str, Any]) -> None:
    """Model and data of the run, for the tracker."""
    if not ctx.is_main:
        return
    count = count_parameters(model)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    tags = {"device": device, "processes": str(ctx.world_size), "model.dtype": dtype_name(model)}
    if recipe.model.quantized is not None:
        tags["model.quantization"] = recipe.model.quantized.type
    if recipe.model.init != "from_config":
        tags["model.digest"] = model_digest(find_folder(recipe.model.name_or_path, recipe.model.revision))
    ctx.tracker.tags(tags | {"model.parameters": str(count.all), "model.trainable": str(count.trainable)})
    held_out = _files(eval_sources(recipe.data)) - _files(train_sources(recipe.data))
    tests = _files(test_sources(recipe.data)) - _files(train_sources(recipe.data)) - held_out
    for name, fingerprint in report.get("digests", {}).items():
        context = "eval" if name in held_out else "test" if name in tests else "train"
        ctx.tracker.dataset(Path(name).name, fingerprint, name, context, report.get(context) or {})
    if report.get("guard"):
        ctx.tracker.metrics(guard_metrics(report["guard"]), 0)
    for file in (REPORT, HISTOGRAM, *GUARD_FILES):
        if (ctx.output_dir / file).exists():
            ctx.tracker.artifact(ctx.output_dir / file)


def stream_inputs(recipe: TrainingRecipe, ctx: RunContext, held_out: TokenStore | None) -> dict[str, Any]:
    """What is known of a streamed run's data before its first row; of the held-out rows, what their preparation found."""
    if not ctx.is_main:
        return {}
    found: dict[str, Any] = {"streaming": True, "digests": digest(recipe.data), "sources": []}
    if held_out is not None:
        prepared = json.loads((ctx.output_dir / REPORT).read_text(encoding="utf-8"))
        found |= {"eval": prepared["train"], "sources": prepared["sources"]}
    return found


def report_stream(recipe: TrainingRecipe, ctx: RunContext, report: dict[str, Any], stream: TokenStream) -> None:
    """Say, write and record what became of the rows that all ranks read since this start, each as often as it came up."""
    parts = _of_all_ranks(ctx, (stream.reports, stream.guarded()))
    read = together([reports for reports, _ in parts])
    if not ctx.is_main or not any(source.rows_read for source in read):
        return  # a run that had only its export left keeps the report of its training
    sources = [source.to_dict(recipe.data.on_too_long) for source in read]
    for source in sources:
        if source["rows_dropped"] or source["rows_truncated"]:
            ctx.progress.note(
                f"{source['key']}: of {source['rows_read']:,} rows read, {source['rows_dropped']:,} were left out and"
                f" {source['rows_truncated']:,} cut; {REPORT} lists them"
            )
    guarded = {"guard": found} if (found := added([found for _, found in parts])) else {}
    write_json(ctx.output_dir / REPORT, report | {"sources": sources + report["sources"]} | guarded)
    ctx.tracker.artifact(ctx.output_dir / REPORT)


def _of_all_ranks(ctx: RunContext, own: Any) -> list[Any]:
    """``own`` of every rank, in their order."""
    if ctx.world_size == 1:
        return [own]
    found: list[Any] = [None] * ctx.world_size
    torch.distributed.all_gather_object(found, own)
    return found


def _files(sources: Sequence[Source]) -> set[str]:
    """What they read, by the names that ``data.sources.digest`` gives."""
    hub = {f"{source.path}@{source.split}" for source in sources if source.is_hub}
    return hub | {file for source in sources for file in source.files()}


def export(
    recipe: TrainingRecipe,
    ctx: RunContext,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    renderer: Renderer,
    adapter: bool,
    example: dict[str, str],
) -> Path:
    """Save the model (or the adapter), open it again in a fresh process, and only then give it its name.

    Raises GateError when it is not the same; it is left under ``*.unchecked`` then.
    """
    final = ctx.output_dir / ("adapter" if adapter else "model")
    if ctx.is_main:
        ctx.progress.note(f"Saving {final} and opening it again")
        folder = final.with_name(f"{final.name}.unchecked")
        probe = take_probe(model, tokenizer)
        kept: dict[str, Any] = {"stop_ids": renderer.stop_ids, "chat_template": renderer.chat_template}
        if adapter:
            save_adapter(model, tokenizer, folder, base_of(recipe, model), **kept)
        else:
            save_model(model, tokenizer, folder, **kept)
        verify(folder, probe)
        shutil.rmtree(final, ignore_errors=True)
        folder.rename(final)
        tracking = recipe.tracking
        if tracking.log_model or tracking.register:
            ctx.tracker.model(final, example)
    if ctx.world_size > 1:
        torch.distributed.barrier()
    return final


def base_of(recipe: TrainingRecipe, model: Any) -> BaseInfo:
    """What an adapter has to say of the model that it belongs to."""
    rows = int(load_config(recipe.model).get_text_config().vocab_size)
    return describe_base(recipe.model, rows=rows, dtype=dtype_name(model))


def show_curves(recipe: TrainingRecipe, ctx: RunContext, trainer: LlmkitTrainer) -> dict[str, str]:
    """The loss curves as an artifact of the run."""
    history: Sequence[dict[str, Any]] = trainer.state.log_history
    if not ctx.is_main or not history:
        return {}
    ctx.tracker.artifact(loss_curves(history, ctx.output_dir / CURVES, title=recipe.name))
    return {"loss_curves": CURVES}
