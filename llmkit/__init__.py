"""llmkit: fine-tune and distil language models from a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmkit.api import check_data as check_data
    from llmkit.api import cpt as cpt
    from llmkit.api import embed as embed
    from llmkit.api import label as label
    from llmkit.api import lora as lora
    from llmkit.api import prompt_test as prompt_test
    from llmkit.api import sft as sft

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The stages by name, each a function ``stage(recipe, overrides=None, *, output_dir=None, resume="auto")``."""
    from llmkit.stages import STAGES, by_attribute

    found = by_attribute(name)
    if found is None:
        raise AttributeError(f"module 'llmkit' has no attribute {name!r}; the stages are {', '.join(STAGES)}")
    from llmkit.api import stage

    return stage(found)


def __dir__() -> list[str]:
    from llmkit.stages import STAGES

    return sorted([*globals(), *(stage.replace("-", "_") for stage in STAGES)])
