"""The command line with the toy stages in its table: ``python toy_cli.py toy recipe.yaml``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from llmkit.cli import main
from llmkit.stages import STAGES

STAGES["toy"] = "toy_stage"
STAGES["ring"] = "ring_stage"

if __name__ == "__main__":
    sys.exit(main())
