"""What a run was predicted to need and what it needed: in its result, in the tracker, and for later plans."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from llmkit.context import RunContext
from llmkit.modeling import history
from llmkit.modeling.history import Record
from llmkit.modeling.memory import CUDA_CONTEXT
from llmkit.training.meter import Meter, peak_memory, resident
from llmkit.training.plan import Plan, device_name, run_kind, versions
from llmkit.training.plan_report import check
from llmkit.training.settings import TrainingRecipe


@dataclass(frozen=True)
class Needs:
    """``base`` is what the process held before it read any data or weights, bytes; ``plan`` None where there was none."""

    recipe: TrainingRecipe
    ctx: RunContext
    plan: Plan | None
    base: float

    @classmethod
    def of(cls, recipe: TrainingRecipe, ctx: RunContext, stage: str) -> Needs:
        """Before anything is loaded. Raises WontFitError where the recipe wants an end rather than a run that will not fit."""
        base = resident()
        return cls(recipe, ctx, check(recipe, stage, ctx.progress, is_main=ctx.is_main), base)

    def metrics(self, meter: Meter) -> dict[str, float]:
        """Highest memory, and what was predicted of it; the main rank adds a line to the user's history."""
        measured = peak_memory()
        if self.plan is None:
            return measured
        memory = self.plan.own.memory
        host = memory.host
        predicted = {"predicted_memory_host_bytes": host}
        device = measured.get("peak_memory_device_bytes")
        if device is not None:
            # torch's allocator does not count what the process holds before its first tensor.
            predicted["predicted_memory_device_bytes"] = memory.device - CUDA_CONTEXT
        if self.ctx.is_main:
            self._keep(measured["peak_memory_host_bytes"], device, predicted, meter)
        return measured | predicted

    def _keep(self, host: float, device: float | None, predicted: dict[str, float], meter: Meter) -> None:
        assert self.plan is not None
        architecture = self.plan.own.setup.architecture
        rate = meter.tokens / meter.seconds * meter.flops_per_token if meter.seconds > 0 else 0.0
        history.append(
            Record(
                at=datetime.now(UTC).isoformat(timespec="seconds"),
                name=self.recipe.name,
                device=device_name(self.plan.device),
                cpu=self.plan.device.cpu,
                processes=self.ctx.world_size,
                sharding=self.plan.own.name,
                kind=run_kind(self.recipe, architecture),
                parameters=architecture.parameters,
                predicted_host=predicted["predicted_memory_host_bytes"],
                measured_host=host,
                predicted_device=predicted.get("predicted_memory_device_bytes"),
                measured_device=device,
                base=self.base,
                flops=rate,
                versions=versions(),
            )
        )
