"""Will a recipe fit, how long will it take, what will it cost: the answers of ``llmkit plan``, before anything is loaded.

The same is asked before a training stage starts (``plan: warn|error|off``). Imports neither torch nor transformers.
"""

from __future__ import annotations

import math
import os
import shutil
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from llmkit.modeling import history
from llmkit.modeling.architecture import Architecture, read_architecture
from llmkit.modeling.devices import Device
from llmkit.modeling.licences import as_rows, licences
from llmkit.modeling.memory import (
    CUDA_CONTEXT,
    Memory,
    Offload,
    Setup,
    Sharding,
    activations,
    checkpoint_bytes,
    disk,
    flops_per_token,
    predict,
    trainable_parameters,
    with_checkpointing,
)
from llmkit.modeling.settings import AdapterSettings
from llmkit.training import zero_config
from llmkit.training.settings import ROWS_OF_AUTO, TrainingRecipe
from llmkit.training.shapes import CPU_PART_TOKENS
from llmkit.training.workload import Passes, Workload, passes, sequences, workload
from llmkit.uris import workplace

PROCESS = 0.6e9
"""Bytes of a process on a CPU with everything that training imports, before it loads a model: measured, see
benchmarks/plan_accuracy.py. Past runs with the installed versions replace it."""
RESERVE = 0.05
"""Share of a device's memory that is left alone: fragmentation, and what other programs take."""
PEAK_SHARE = {"full": 0.40, "lora": 0.30}
"""Share of a device's peak that is taken to be reached where nothing was measured: a third to a half is what well-fed
GPUs reach in practice (PaLM, arXiv 2204.02311, table 3, and its successors), small models and batches less."""
SLOWER: dict[str, float] = {
    "none": 1.0, "zero1": 1.0, "zero2": 1.05, "zero3": 1.5, "fsdp": 1.5, "zero1_offload": 2.0, "zero2_offload": 2.0,
    "zero3_offload": 3.0, "fsdp_offload": 3.0, "zero3_nvme": 8.0,
}  # fmt: skip
"""A rough order of speed. Stages 1 and 2 send what DDP sends, stage 3 half as much again (arXiv 1910.02054, section 7);
offloading adds a step on the CPU (arXiv 2101.06840) and the way over PCIe or to a disk."""
RECOMPUTING = 4 / 3
"""A second forward pass beside a forward and a backward that takes two (arXiv 2205.05198, section 5)."""


@dataclass(frozen=True)
class Option:
    """One way to run the recipe: how the states are divided, how many sequences go through at once."""

    setup: Setup
    memory: Memory
    batch: int
    accumulation: int
    fits: bool

    @property
    def name(self) -> str:
        return self.setup.sharding.name

    @property
    def slower(self) -> float:
        return SLOWER[self.name] * (RECOMPUTING if self.setup.checkpointing else 1.0)


@dataclass(frozen=True)
class Length:
    """How long the run takes; None where it cannot be known. ``source`` says where the speed is from."""

    steps: int | None
    tokens: float | None
    flops: float | None
    seconds: float | None
    cost: float | None
    source: str


@dataclass(frozen=True)
class Plan:
    """Everything that ``llmkit plan`` prints."""

    recipe: TrainingRecipe
    stage: str
    device: Device
    processes: int
    load: Workload
    own: Option
    options: tuple[Option, ...]
    proposal: Option | None
    length: Length
    process_source: str
    disk: float
    disk_free: float
    past: history.Accuracy | None
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.own.fits and self.disk <= self.disk_free


def make_plan(recipe: TrainingRecipe, stage: str, device: Device, processes: int | None = None) -> Plan:
    """Raises MissingError or UsageError for a model or settings that cannot be read, DataError for missing data."""
    planner = Planner(recipe, device, processes)
    own = planner.own()
    options = tuple(planner.options(own))
    records = history.of_device(history.read(), device_name(device))
    return Plan(
        recipe=recipe,
        stage=stage,
        device=device,
        processes=planner.processes,
        load=planner.load,
        own=own,
        options=options,
        proposal=planner.proposal(own),
        length=planner.length(own, records),
        process_source=planner.process[1],
        disk=planner.disk(own),
        disk_free=_free(recipe),
        past=history.accuracy(records),
        notes=tuple(planner.notes),
    )


class Planner:
    """The options of one recipe on one device."""

    def __init__(self, recipe: TrainingRecipe, device: Device, processes: int | None = None, *,
                 load: Workload | None = None, base: float | None = None) -> None:  # fmt: skip
        self.recipe, self.device = recipe, device
        self.architecture: Architecture = read_architecture(recipe.model)
        self.adapter: AdapterSettings | None = getattr(recipe, "adapter", None)
        self.processes = processes or _processes(recipe, device)
        self.load = load or workload(recipe)
        self.process = (base, "this process") if base is not None else process_base()
        self.notes: list[str] = []
        if self.architecture.seq2seq or not (self.architecture.lean_norm and self.architecture.swiglu):
            self.notes.append(
                f"activations of {self.architecture.model_type} are estimated from its sizes, not counted layer by layer"
            )

    @property
    def sequences_per_step(self) -> int:
        """Of one process; what a proposal keeps."""
        train = self.recipe.train
        size = train.per_device_train_batch_size
        return (ROWS_OF_AUTO if size == "auto" else size) * train.gradient_accumulation_steps

    def own(self) -> Option:
        """What the recipe says; with ``per_device_train_batch_size: auto`` the largest that fits."""
        sharding = sharding_of(self.recipe, self.architecture)
        size = self.recipe.train.per_device_train_batch_size
        checkpointing = self.recipe.train.gradient_checkpointing
        if size == "auto":
            found = self.largest(sharding, checkpointing=checkpointing)
            return found or self.option(sharding, 1, checkpointing=checkpointing)
        return self.option(sharding, size, checkpointing=checkpointing)

    def option(self, sharding: Sharding, batch: int, *, checkpointing: bool) -> Option:
        setup = self.setup(sharding, batch, checkpointing=checkpointing)
        memory = predict(setup, base=self._device_base, data=self._data, host_base=self.process[0])
        return Option(setup, memory, batch, max(1, math.ceil(self.sequences_per_step / batch)), self.fits(memory))

    def largest(self, sharding: Sharding, *, checkpointing: bool) -> Option | None:
        """The largest batch that divides the step's sequences and fits; None where not even one sequence does."""
        for batch in divisors(self.sequences_per_step):
            option = self.option(sharding, batch, checkpointing=checkpointing)
            if option.fits:
                return option
        return None

    def options(self, own: Option) -> Iterator[Option]:
        """ZeRO 0 to 3 with and without offload, and FSDP, with the recipe's own batch; the recipe's own among them."""
        seen = False
        for sharding in _choices(self.architecture, own.setup.sharding):
            option = self.option(sharding, own.batch, checkpointing=own.setup.checkpointing)
            seen |= option.name == own.name
            yield own if option.name == own.name else option
        if not seen:
            yield own

    def proposal(self, own: Option) -> Option | None:
        """The fastest that fits, with the same sequences a step; None where nothing does."""
        choices = _choices(self.architecture, own.setup.sharding)
        # FSDP is as fast as ZeRO 3: proposed only to who uses it already.
        found = [
            option
            for sharding in choices
            if sharding.fsdp == own.setup.sharding.fsdp or not sharding.stage
            for checkpointing in {False, own.setup.checkpointing, True}
            if (option := self.largest(sharding, checkpointing=checkpointing)) is not None
        ]
        return min(found, key=lambda o: (o.slower, -o.batch, o.name != own.name), default=None)

    def fits(self, memory: Memory) -> bool:
        usable = 1 - RESERVE
        if self.device.cpu:
            return memory.device <= usable * self.device.memory / self.processes
        return memory.device <= usable * self.device.memory and memory.host <= usable * self.device.host_memory

    def setup(self, sharding: Sharding, batch: int, *, checkpointing: bool) -> Setup:
        """The recipe as the arithmetic sees it."""
        recipe, train, a = self.recipe, self.recipe.train, self.architecture
        dtype = a.dtype if recipe.model.dtype == "auto" else recipe.model.dtype
        mixed = "bfloat16" if train.bf16 else "float16" if train.fp16 else ""
        if sharding.engine and mixed:  # the engine keeps float32 copies itself, and multiplies without casting
            dtype, mixed = mixed, ""
        found = self.passes(batch)
        plain = recipe.model.attn_implementation
        return Setup(
            architecture=a,
            cpu=self.device.cpu,
            dtype=dtype,
            part_tokens=found.tokens,
            row_tokens=found.row,
            passes=found.parts * max(1, math.ceil(self.sequences_per_step / batch)),
            supervised=self.load.supervised,
            mixed="" if mixed == dtype else mixed,
            optimizer=train.optim,
            checkpointing=checkpointing,
            adapter=self.adapter,
            quantization=quantization_of(recipe),
            double_quant=recipe.model.quantized is None or recipe.model.quantized.double_quant,
            lean=not train.torch_compile if self.device.cpu else train.use_liger_kernel,
            flash=plain != "eager" and not a.seq2seq,
            fused_loss=not a.changes_logits,
            processes=self.processes,
            sharding=sharding,
            totals=found.totals,
            blocks=found.blocks,
        )

    def passes(self, batch: int) -> Passes:
        train = self.recipe.train
        bound = train.micro_batch_tokens
        part = (CPU_PART_TOKENS if self.device.cpu else 0) if bound == "auto" else bound
        count = sequences(self.recipe, self.load)
        batches = max(1, (count or 1000) // max(1, batch * self.processes))
        if train.max_steps > 0:
            batches = min(batches, train.max_steps * max(1, self.sequences_per_step // batch))
        return passes(
            self.recipe, self.load, batch=batch, part_tokens=part, batches=batches, seq2seq=self.architecture.seq2seq
        )

    def disk(self, own: Option) -> float:
        train = self.recipe.train
        steps = self.steps() or train.save_steps
        return disk(own.setup, train.save_total_limit, max(1, math.ceil(steps / train.save_steps)))

    # Time and money

    def steps(self) -> int | None:
        """Optimizer steps of the run."""
        train = self.recipe.train
        if train.max_steps > 0:
            return train.max_steps
        count = sequences(self.recipe, self.load)
        if count is None:
            return None
        return math.ceil(train.num_train_epochs * math.ceil(count / (self.sequences_per_step * self.processes)))

    def length(self, own: Option, records: list[history.Record]) -> Length:
        steps = self.steps()
        if steps is None:
            return Length(None, None, None, None, None, "the number of rows is not known beforehand")
        each = self.recipe.data.max_length * 0.97 if self.recipe.data.packing else self.load.mean
        count = sequences(self.recipe, self.load)
        step = self.sequences_per_step * self.processes
        tokens = steps * each * (step if count is None else min(step, count))
        flops = tokens * flops_per_token(own.setup, round(self.load.mean))
        rate, source = self._rate(records)
        if rate is None:
            return Length(steps, tokens, flops, None, None, source)
        seconds = flops / (rate * self.processes)
        price = self.device.cost_per_hour
        cost = None if price is None else price * self.processes * seconds / 3600
        return Length(steps, tokens, flops, seconds, cost, source)

    def _rate(self, records: list[history.Record]) -> tuple[float | None, str]:
        """FLOP/s that one process reaches, and where the figure is from."""
        kind = run_kind(self.recipe, self.architecture)
        found = history.reached(records, kind, self.architecture.parameters)
        if found is not None:
            return found[
                0
            ], f"measured: median of {found[1]} past run(s) of this kind ({kind}) on {device_name(self.device)}"
        if self.device.peak is None:
            return (
                None,
                f"no run of this kind ({kind}) was measured on {device_name(self.device)} yet, and its peak is not known",
            )
        share = PEAK_SHARE["full" if self.adapter is None else "lora"]
        return (
            share * self.device.peak,
            f"assumed: {share:.0%} of the peak of {self.device.name}, as no such run was measured",
        )

    @property
    def _device_base(self) -> float:
        return self.process[0] if self.device.cpu else float(CUDA_CONTEXT)

    @property
    def _data(self) -> float:
        """Token ids and labels are 4 bytes each, and mapped; a stream keeps none."""
        return 0.0 if self.recipe.data.streaming else 8.0 * (self.load.tokens or 0)


def divisors(count: int) -> list[int]:
    """Largest first."""
    return [n for n in range(count, 0, -1) if count % n == 0]


def run_kind(recipe: TrainingRecipe, architecture: Architecture) -> str:
    """Runs of one kind reach about the same FLOP/s: all weights or an adapter, and the type of the products."""
    dtype = architecture.dtype if recipe.model.dtype == "auto" else recipe.model.dtype
    mixed = "bfloat16" if recipe.train.bf16 else "float16" if recipe.train.fp16 else dtype
    adapter = getattr(recipe, "adapter", None)
    return f"{'full' if adapter is None else 'lora'} {quantization_of(recipe) or mixed}"


def quantization_of(recipe: TrainingRecipe) -> str | None:
    found = recipe.model.quantized
    return None if found is None else found.type


# How the states are divided


def sharding_of(recipe: TrainingRecipe, architecture: Architecture) -> Sharding:
    """The recipe's ``deepspeed:`` or ``fsdp:``. Raises MissingError or UsageError for a file that cannot be read."""
    if recipe.fsdp is not None:
        offload: Offload = "cpu" if recipe.fsdp.offload_params else "none"
        stage = 3 if recipe.fsdp.reshard_after_forward else 2
        return Sharding(stage, optimizer=offload, parameters=offload, fsdp=True)
    if recipe.deepspeed is None:
        return Sharding()
    return from_config(zero_config.read(recipe.deepspeed), architecture)


def preset(name: str, architecture: Architecture) -> Sharding:
    """A preset of ``deepspeed:`` by name, e.g. ``zero3_offload``."""
    return from_config(zero_config.preset(name), architecture)


def from_config(config: Mapping[str, Any], architecture: Architecture) -> Sharding:
    """A DeepSpeed configuration, with ``auto`` as zero_config.py fills it in: hidden², 0.9 hidden²."""
    zero = config.get("zero_optimization") or {}
    square = float(architecture.hidden**2)

    def number(key: str, default: float, auto: float) -> float:
        value = zero.get(key, default)
        return auto if value == "auto" else float(value)

    return Sharding(
        stage=zero_config.stage_of(config) or 0,
        optimizer=_place(zero_config.offload(config, "optimizer")),
        parameters=_place(zero_config.offload(config, "param")),
        reduce_bucket=number("reduce_bucket_size", 5e8, square),
        overlap=bool(zero.get("overlap_comm", False)),
        prefetch_bucket=number("stage3_prefetch_bucket_size", 5e7, 0.9 * square),
        max_live=number("stage3_max_live_parameters", 1e9, 1e9),
    )


def _place(name: str) -> Offload:
    return "cpu" if name == "cpu" else "nvme" if name == "nvme" else "none"


def _choices(architecture: Architecture, own: Sharding) -> list[Sharding]:
    """What can be chosen, fastest first."""
    names = ("zero1", "zero2", "zero3", "zero1_offload", "zero2_offload", "zero3_offload", "zero3_nvme")
    fsdp = [Sharding(3, fsdp=True), Sharding(3, optimizer="cpu", parameters="cpu", fsdp=True)]
    made = [Sharding(), *(preset(name, architecture) for name in names), *fsdp]
    return [own if sharding.name == own.name else sharding for sharding in made]


# This machine


def process_base() -> tuple[float, str]:
    """Bytes of a training process before it loads a model, and where the figure is from."""
    records = [r for r in history.read() if r.versions == versions() and r.base > 0]
    if records:
        return statistics.median(r.base for r in records), f"median of {len(records)} past run(s) with these libraries"
    return PROCESS, "measured by benchmarks/plan_accuracy.py; the first run here replaces it"


@cache
def _installed() -> tuple[tuple[str, str], ...]:
    found = []
    for name in ("torch", "transformers", "peft", "deepspeed", "mlflow"):
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            continue
    return tuple(found)


def versions() -> dict[str, str]:
    """Of the libraries that decide what a process holds."""
    return dict(_installed())


def device_name(device: Device) -> str:
    """The name under which past runs are remembered."""
    return device.names[0] if device.cpu and device.names else device.name


def _processes(recipe: TrainingRecipe, device: Device) -> int:
    """As it was started (WORLD_SIZE), as the recipe says, else one for each GPU that is here."""
    found = os.environ.get("WORLD_SIZE", "")
    if found.isdigit() and int(found) > 0:
        return int(found)
    named = recipe.launch.processes
    return named if named != "auto" else 1 if device.cpu else max(1, device.count)


def _free(recipe: TrainingRecipe) -> float:
    """Bytes free where the run's folder will be."""
    path = workplace(recipe.output_dir, recipe.launch.scratch_dir)
    while not path.exists():
        path = path.parent
    return float(shutil.disk_usage(path).free)


# As plain data


def as_data(plan: Plan) -> dict[str, Any]:
    """For ``--json``: bytes, seconds, US dollars."""
    own, a = plan.own, plan.own.setup.architecture
    return {
        "recipe": plan.recipe.name,
        "stage": plan.stage,
        "fits": plan.fits,
        "model": {
            "name_or_path": plan.recipe.model.name_or_path,
            "parameters": a.parameters,
            "trainable": trainable_parameters(a, own.setup.adapter),
            "dtype": own.setup.dtype,
            "quantization": own.setup.quantization,
            "source": a.source,
        },
        "device": {
            "name": plan.device.name,
            "memory_bytes": plan.device.memory,
            "host_memory_bytes": plan.device.host_memory,
            "cost_per_hour": plan.device.cost_per_hour,
            "source": plan.device.where,
        },
        "processes": plan.processes,
        "data": {
            "rows": plan.load.rows,
            "tokens": plan.load.tokens,
            "mean_length": plan.load.mean,
            "supervised_share": plan.load.supervised,
            "source": plan.load.source,
        },
        "terms": [asdict(term) for term in own.memory.terms],
        "checkpointing": {
            "activations_without_checkpointing": activations(with_checkpointing(own.setup, False)),
            "activations_with_checkpointing": activations(with_checkpointing(own.setup, True)),
        },
        "process_source": plan.process_source,
        "options": [_option(option) | {"own": option.name == own.name} for option in plan.options],
        "proposal": None if plan.proposal is None else _option(plan.proposal) | {"recipe": keys(plan)},
        "run": asdict(plan.length),
        "disk": {
            "needed_bytes": plan.disk,
            "checkpoint_bytes": checkpoint_bytes(own.setup),
            "free_bytes": plan.disk_free,
        },
        "past_predictions": None if plan.past is None else asdict(plan.past),
        "licences": as_rows(licences(plan.recipe.model, plan.recipe.data)),
        "notes": list(plan.notes),
    }


def _option(option: Option) -> dict[str, Any]:
    return {
        "name": option.name,
        "device_bytes": option.memory.device,
        "host_bytes": option.memory.host,
        "fits": option.fits,
        "per_device_train_batch_size": option.batch,
        "gradient_accumulation_steps": option.accumulation,
        "gradient_checkpointing": option.setup.checkpointing,
        "tokens_at_once": option.setup.part_tokens,
    }


def keys(plan: Plan) -> dict[str, Any]:
    """What to write in the recipe to get the proposal."""
    found = plan.proposal
    if found is None:
        return {}
    changed: dict[str, Any] = {
        "train.per_device_train_batch_size": found.batch,
        "train.gradient_accumulation_steps": found.accumulation,
        "train.gradient_checkpointing": found.setup.checkpointing,
    }
    if found.name != plan.own.name:
        name = found.name
        if name.startswith("fsdp"):
            changed["fsdp"] = {"offload_params": name == "fsdp_offload"}
        else:
            changed["deepspeed"] = None if name == "none" else name
    return changed
