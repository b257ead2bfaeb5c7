"""With this folder on PYTHONPATH every ``python -m llmkit`` knows the stage ``toy``: also one in a pod, whose command is fixed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llmkit.stages import STAGES

STAGES["toy"] = "toy_stage"
