#!/usr/bin/env bash
# From a bare machine with Python 3.11 and pip to a fine-tuned model: scripts/quickstart.sh [KEY=VALUE ...]
#
# Installs llmkit into .venv, makes the demo model and the training text, and trains. What is already there is kept, a
# run that was stopped goes on, a finished one is only shown. KEY=VALUE changes the recipe, e.g. train.max_steps=10
# output_dir=runs/short. --from-hub takes the demo model's original weights from the Hugging Face hub.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fetch=()
if [ "${1:-}" = --from-hub ]; then
    fetch=(--from-hub)
    shift
fi

scripts/setup.sh
.venv/bin/python scripts/fetch_demo_model.py ${fetch[@]+"${fetch[@]}"}
.venv/bin/python scripts/make_docs_corpus.py
# Threads that wait must sleep: spinning ones take the cores from whatever else runs on the machine.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
.venv/bin/llmkit sft recipes/sft/quickstart.yaml "$@"
echo "  (llmkit and mlflow are in .venv/bin: \`source .venv/bin/activate\` puts them on your PATH)"
