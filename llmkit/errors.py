"""The exceptions that llmkit raises on purpose, and the exit code of each.

::

    LlmkitError                 1   (a bug in llmkit ends with 1 too, whatever its class)
    ├── UsageError              2   the command line is wrong
    │   └── RecipeError         2   the recipe is wrong: holds every problem found
    ├── DataError               3   rows, files or labels cannot be trained on
    ├── GateError               4   a quality bound or gate was not met
    ├── WontFitError            5   not enough memory or disk
    ├── MissingError            6   a package, model, server or device is not there
    │   └── StoreError          6   an object store is away, or refuses
    ├── ProcessLostError        1   a process of the run was killed, or does not answer
    └── StoppedEarly          138   stopped with a checkpoint: run the same command again

Why 138 and not the customary 75 is written in docs/decisions/exit-codes.md: the training operator's
``ExitCode`` policy retries 128 to 255 only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

EXIT_DONE = 0


class LlmkitError(Exception):
    """Root of the tree; its message is what the user reads, in one piece, without a traceback."""

    exit_code: ClassVar[int] = 1


class UsageError(LlmkitError):
    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One mistake in a recipe.

    ``where`` is ``file:line:column`` or ``command line``; ``key`` the dotted path, ``""`` for the whole file.
    """

    where: str
    key: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        key = f" {self.key}:" if self.key else ""
        hint = f"\n    {self.hint}" if self.hint else ""
        return f"{self.where}:{key} {self.message}{hint}"


class RecipeError(UsageError):
    """All the mistakes of one recipe, or of another file that is written as one (``what``)."""

    def __init__(self, problems: list[Problem], what: str = "recipe") -> None:
        self.problems = problems
        head = f"1 mistake in the {what}" if len(problems) == 1 else f"{len(problems)} mistakes in the {what}"
        super().__init__("\n".join([head + ":", *(f"  {p}" for p in problems)]))


class DataError(LlmkitError):
    exit_code = 3


class GateError(LlmkitError):
    """``metrics`` and ``artifacts`` are what the run measured and wrote all the same, for ``result.json``."""

    exit_code = 4

    def __init__(
        self, message: str, *, metrics: Mapping[str, float] | None = None, artifacts: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.metrics = dict(metrics or {})
        self.artifacts = dict(artifacts or {})


class WontFitError(LlmkitError):
    exit_code = 5


class MissingError(LlmkitError):
    exit_code = 6

    @classmethod
    def extra(cls, package: str, extra: str) -> MissingError:
        """A Python package that an extra of llmkit brings is not installed."""
        return cls(f"{package} is not installed. Install it with: pip install 'llmkit[{extra}]'")


class StoreError(MissingError):
    """``passing``: the same request may do later."""

    def __init__(self, message: str, *, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


class ProcessLostError(LlmkitError):
    """A process of the run died without a word or did not answer in time: neither the recipe nor llmkit is known to be
    at fault. The same command goes on from the last checkpoint."""


class StoppedEarly(LlmkitError):  # noqa: N818  it is an outcome, not a fault
    """Stopped by a signal or a time limit after a checkpoint was saved.

    138 = 128 + SIGUSR1: retryable for Kubeflow's ``ExitCode`` restart policy, free of the codes that a killed
    process (137, 143) ends with, and a number that ``RequeueExit`` of Slurm can name.
    """

    exit_code = 138
