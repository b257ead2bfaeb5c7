"""``llmkit plan`` for people, and the line that a training stage says before it starts."""

from __future__ import annotations

from collections.abc import Iterator

from llmkit.context import Progress
from llmkit.errors import LlmkitError, WontFitError
from llmkit.modeling.devices import GIB, device
from llmkit.modeling.licences import allowed, licences
from llmkit.modeling.memory import activations, checkpoint_bytes, trainable_parameters, with_checkpointing
from llmkit.training.plan import RESERVE, Option, Plan, keys, make_plan
from llmkit.training.settings import TrainingRecipe


def as_text(plan: Plan) -> str:
    """Tables of the terms and of the options, then time, disk, the proposal, and how good past predictions were."""
    return "\n".join([*_head(plan), "", *_terms(plan), "", *_options(plan), "", *_run(plan), *_end(plan)])


def _head(plan: Plan) -> Iterator[str]:
    own, a, load = plan.own, plan.own.setup.architecture, plan.load
    kind = own.setup.quantization or own.setup.dtype
    yield f"recipe     {plan.recipe.name} (llmkit {plan.stage})"
    yield (
        f"model      {plan.recipe.model.name_or_path}: {_count(a.parameters)} parameters, "
        f"{_count(trainable_parameters(a, own.setup.adapter))} trained, {kind} (from {a.source})"
    )
    machine = f"{plan.device.memory / GIB:.1f} GiB"
    if not plan.device.cpu:
        machine += f" each, {plan.device.host_memory / GIB:.0f} GiB of host memory each"
    yield f"device     {plan.processes} x {plan.device.name}, {machine} ({plan.device.where})"
    rows = f"{load.rows:,} rows, {_count(load.tokens or 0)} tokens, " if load.rows else ""
    yield f"data       {rows}{load.mean:.0f} a row, {load.supervised:.0%} learned ({load.source})"
    yield (
        f"a step     {own.batch} x {own.accumulation} sequences a process; {own.setup.part_tokens:,} tokens go through the "
        f"model at once, in {own.setup.passes} {'pass' if own.setup.passes == 1 else 'passes'}"
    )
    yield from _licences(plan.recipe)
    yield from (f"note       {note}" for note in plan.notes)


def _licences(recipe: TrainingRecipe) -> Iterator[str]:
    """Of the model and of each data source, and which of them the recipe does not allow."""
    guard = recipe.data.guard
    allow = None if guard is None else guard.allow_licenses
    for found in licences(recipe.model, recipe.data):
        refused = allow is not None and not allowed(found.spdx, allow)
        said = f"{found.spdx} (says {found.said_by})" if found.spdx else "unknown"
        yield f"licence    {found.name}: {said}" + (": NOT in data.guard.allow_licenses" if refused else "")


def _terms(plan: Plan) -> Iterator[str]:
    memory = plan.own.memory
    yield f"{'one process':<18}{'GiB':>8}"
    for term in memory.terms:
        aside = "" if term.at_peak == term.size else f" ({term.at_peak / GIB:.2f} at the peak)"
        host = ", host" if term.host and not memory.cpu and "host" not in term.name else ""
        yield f"  {term.name:<16}{term.size / GIB:>8.2f}  {term.why}{host}{aside}"
    kept = [activations(with_checkpointing(plan.own.setup, on)) / GIB for on in (False, True)]
    yield f"  {'':<16}{'':>8}  activations without and with gradient checkpointing: {kept[0]:.2f} and {kept[1]:.2f}"
    share = plan.device.memory / (plan.processes if plan.device.cpu else 1)
    yield f"  {'peak':<16}{memory.device / GIB:>8.2f}  of {share / GIB:.2f}, of which {RESERVE:.0%} are left alone"
    if not memory.cpu:
        yield f"  {'peak, host':<16}{memory.host / GIB:>8.2f}  of {plan.device.host_memory / GIB:.2f}"
    yield f"  process: {plan.process_source}"


def _options(plan: Plan) -> Iterator[str]:
    cpu = plan.device.cpu
    yield f"{'GiB, one process':<18}{'memory' if cpu else 'device':>8}{'' if cpu else '    host'}"
    for option in plan.options:
        host = "" if cpu else f"{option.memory.host / GIB:>8.2f}"
        marks = [
            ("fits" if option.fits else "does not fit"),
            *(["the recipe's own"] if option.name == plan.own.name else []),
        ]
        yield f"  {option.name:<16}{option.memory.device / GIB:>8.2f}{host}  {', '.join(marks)}"


def _run(plan: Plan) -> Iterator[str]:
    length, a = plan.length, plan.own.setup
    if length.steps is None or length.tokens is None or length.flops is None:
        yield f"run        its length is not known: {length.source}"
    else:
        line = f"run        {length.steps:,} steps, {_count(round(length.tokens))} tokens, {length.flops:.2e} FLOP"
        if length.seconds is not None:
            line += f", about {_time(length.seconds)}"
        if length.cost is not None:
            line += f", about ${length.cost:,.2f} (${plan.device.cost_per_hour:g} an hour and device)"
        yield f"{line}\n           speed {length.source}"
    yield (
        f"disk       {plan.disk / GIB:.2f} GiB for checkpoints ({checkpoint_bytes(a) / GIB:.2f} each) and the result, "
        f"{plan.disk_free / GIB:.1f} free" + ("" if plan.disk <= plan.disk_free else ": not enough")
    )
    if plan.past is not None:
        p = plan.past
        yield f"past       {p.runs} predictions on this machine were {p.mean:.0%} off on average, from {p.lowest:+.0%} to {p.highest:+.0%}"
    else:
        yield "past       no run was measured on this machine yet; each records what it needed beside what was predicted"


def _end(plan: Plan) -> Iterator[str]:
    yield "fits       " + ("yes" if plan.fits else "NO")
    found = plan.proposal
    if found is None:
        yield (
            "propose    nothing fits: take more processes (--processes), a device with more memory (--device), a smaller "
            "data.max_length or train.micro_batch_tokens, an adapter (llmkit lora) or model.quantization"
        )
    elif _same(found, plan.own):
        yield "propose    nothing: the recipe is the fastest that fits"
    else:
        yield f"propose    {found.name}, {found.memory.device / GIB:.2f} GiB. In the recipe:"
        yield from (f"             {line}" for line in _written(plan))


def _written(plan: Plan) -> Iterator[str]:
    block = ""
    for key, value in keys(plan).items():
        before, dot, last = key.rpartition(".")
        if dot and before != block:
            yield f"{before}:"
        block = before
        text = "null" if value is None else str(value).lower() if isinstance(value, bool) else _flow(value)
        yield f"{'  ' if dot else ''}{last}: {text}"


def _flow(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_flow(v)}" for k, v in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _same(a: Option, b: Option) -> bool:
    return (a.name, a.batch, a.setup.checkpointing) == (b.name, b.batch, b.setup.checkpointing)


def _count(number: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


# Before a run


def check(recipe: TrainingRecipe, stage: str, progress: Progress, *, is_main: bool = True) -> Plan | None:
    """The same question before a run on this machine, as ``plan:`` of the recipe says. None where it could not be told.

    Raises WontFitError where the recipe says ``error``.
    """
    if recipe.plan == "off":
        return None
    try:
        plan = make_plan(recipe, stage, device())
    except LlmkitError:
        return None  # loading will say the same, with the whole story
    if not plan.fits:
        said = wont_fit(plan)
        if recipe.plan == "error":
            raise WontFitError(f"{said}\nplan: warn in the recipe starts it anyway.")
        if is_main:
            progress.note(f"warning: {said}")
    return plan


def wont_fit(plan: Plan) -> str:
    """What is too large, and what to write instead."""
    own, shares = plan.own.memory, plan.processes if plan.device.cpu else 1
    if plan.disk > plan.disk_free and plan.own.fits:
        return (
            f"This run will need about {plan.disk / GIB:.1f} GiB of disk for checkpoints and the result, and "
            f"{plan.disk_free / GIB:.1f} are free. Set train.save_total_limit=1 or another --output-dir."
        )
    needs = f"{own.device / GIB:.1f} GiB of {plan.device.memory / shares / GIB:.1f}"
    if not plan.device.cpu:
        needs += f", and {own.host / GIB:.1f} GiB of host memory of {plan.device.host_memory / GIB:.1f}"
    line = f"This run will not fit: each process needs about {needs} ({RESERVE:.0%} are left alone)."
    changes = keys(plan)
    if changes:
        line += " What would fit: " + " ".join(f"{key}={_flow(value)}" for key, value in changes.items())
    return f"{line}. `llmkit plan` shows what takes it."
