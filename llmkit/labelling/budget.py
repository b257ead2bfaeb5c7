"""The cost cap: what the finished shards took, and whether there is enough left for the next rows."""

from __future__ import annotations

import json
from pathlib import Path

from llmkit.errors import GateError, UsageError
from llmkit.inference.batch.shards import JOURNAL
from llmkit.labelling.settings import BudgetSettings


class Budget:
    """Looks at what the job's shards took, so that a start after a kill counts what an earlier one has spent."""

    def __init__(self, settings: BudgetSettings, folder: Path) -> None:
        """Raises UsageError where a cap in money has no price to go by."""
        self._settings, self._folder = settings, folder
        self._price = settings.price_per_hour
        if settings.money is not None and self._price is None:
            from llmkit.modeling.devices import this_machine

            self._price = this_machine().cost_per_hour
            if self._price is None:
                raise UsageError("budget.money: this machine has no known price. Set budget.price_per_hour.")

    def check(self, tokens: int) -> None:
        """Raises GateError where the next rows' ``tokens`` (as far as they are known) would pass the cap."""
        cap = self._settings
        if cap.tokens is None and cap.money is None:
            return
        spent, seconds = self._spent()
        if cap.tokens is not None and spent + tokens > cap.tokens:
            self._stop(f"budget.tokens {cap.tokens:,}: {spent:,} tokens are spent, the next rows need {tokens:,}")
        if cap.money is not None and self._price is not None and seconds * self._price / 3600 >= cap.money:
            money = seconds * self._price / 3600
            self._stop(f"budget.money {cap.money:g}: {money:.4g} is spent ({seconds:.0f} s at {self._price:g} an hour)")

    def _stop(self, why: str) -> None:
        raise GateError(
            f"The cost cap is reached: {why}. What is done is kept in {self._folder / 'shards'}: the same command with "
            "a higher cap goes on after it."
        )

    def _spent(self) -> tuple[int, float]:
        tokens, seconds = 0, 0.0
        path = self._folder / JOURNAL
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                shard = json.loads(line)
            except ValueError:  # half a line of a killed start
                continue
            tokens += int(shard.get("tokens", 0))
            seconds += float(shard.get("seconds", 0.0))
        return tokens, seconds
