"""The batch script as it is submitted, whole; what Slurm says, in llmkit's words. The real Slurm is in tests/integration."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llmkit import launch
from llmkit.errors import RecipeError, UsageError
from llmkit.launch import slurm
from llmkit.launch.job import Job, Resources
from llmkit.launch_settings import LaunchSettings
from llmkit.recipe import LaunchSettings as Exported
from llmkit.stages import load
from llmkit.stages.sft import Recipe

PLAIN = r"""#!/bin/bash
# llmkit sft: queries
#SBATCH --job-name=sft-queries
#SBATCH --comment=llmkit:0123abcd
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output=/runs/queries/logs/slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail
cd -- /home/me/project
recipe=/runs/queries/recipe.yaml

# The processes meet at the first node. Its port belongs to this job: two jobs on one node do not meet each other.
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts[0]}
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export TORCHELASTIC_RESTART_COUNT=${SLURM_RESTART_COUNT:-0}

# Each process gets the environment that torchrun would give it. srun starts them itself, because torchrun dies of the
# signal that announces the time limit, and turns every exit code into 1.
rank='export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=1 GROUP_RANK=$SLURM_NODEID; exec "$@"'
code=0
srun --kill-on-bad-exit=1 --distribution=block bash -c "$rank" llmkit /venv/bin/llmkit run "$recipe" || code=$?

# 138 is "stopped with a checkpoint, run me again"; nothing else goes back into the queue.
if [ "$code" -eq 138 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 50 ]; then
    echo "Requeued: start $((${SLURM_RESTART_COUNT:-0} + 2)) goes on from the checkpoint."
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60 # the requeue ends this script
fi
exit "$code"
"""

EVERYTHING = r"""#!/bin/bash
# llmkit lora: 한국 queries 'of' $(today)
#SBATCH --job-name="lora-한국-queries-of-today"
#SBATCH --comment=llmkit:0123abcd
#SBATCH --partition=gpu
#SBATCH --account=nlp
#SBATCH --qos=high
#SBATCH --time=1-12
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=6
#SBATCH --mem=400G
#SBATCH --gpus-per-node=a100:8
#SBATCH --gres=nvme:1
#SBATCH --constraint="a100&ib"
#SBATCH --reservation=course
#SBATCH --exclude="n[7-9]"
#SBATCH --dependency=afterok:12:13
#SBATCH --array=0-1%1
#SBATCH --signal=USR1@120
#SBATCH --output="/runs/my \"queries\" 100%%/logs/slurm-%A_%a.log"
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --exclusive
#SBATCH --mail-type=END
set -euo pipefail
cd -- '/home/me/my project'
export A='b c'
export SAID='two
lines $(rm -rf /) '"'"'quoted'"'"''
module load cuda/12.8 'my module'
source .venv/bin/activate
# One run of the sweep for each job of the array.
recipes=(
    '/runs/my "queries" 100%/0/recipe.yaml'
    '/runs/my "queries" 100%/1/recipe.yaml'
)
recipe=${recipes[$SLURM_ARRAY_TASK_ID]}

# The processes meet at the first node. Its port belongs to this job: two jobs on one node do not meet each other.
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts[0]}
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export TORCHELASTIC_RESTART_COUNT=${SLURM_RESTART_COUNT:-0}

# Each process gets the environment that torchrun would give it. srun starts them itself, because torchrun dies of the
# signal that announces the time limit, and turns every exit code into 1.
rank='export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=8 GROUP_RANK=$SLURM_NODEID; exec "$@"'
code=0
srun --kill-on-bad-exit=1 --distribution=block bash -c "$rank" llmkit apptainer exec --nv --bind /data:/data --bind '/runs/my "queries" 100%:/runs/my "queries" 100%' --bind '/home/me/my project:/home/me/my project' --pwd '/home/me/my project' llmkit.sif llmkit run "$recipe" --debug || code=$?

# 138 is "stopped with a checkpoint, run me again"; nothing else goes back into the queue.
if [ "$code" -eq 138 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ]; then
    echo "Requeued: start $((${SLURM_RESTART_COUNT:-0} + 2)) goes on from the checkpoint."
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
    sleep 60 # the requeue ends this script
fi
exit "$code"
"""


@pytest.fixture(autouse=True)
def program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "PROGRAM", ["/venv/bin/llmkit"])


def job(folder: str = "/runs/queries", **more: Any) -> Job:
    given: dict[str, Any] = {"name": "queries", "stage": "sft", "token": "0123abcd", "cwd": Path("/home/me/project")}
    argv = ("llmkit", "run", f"{folder}/recipe.yaml")
    given |= {"argv": argv, "output_dir": Path(folder)} | more
    return Job(**given)


def settings(**keys: Any) -> LaunchSettings:
    return LaunchSettings.model_validate({"launcher": "slurm", **keys})


def test_the_whole_script_of_a_plain_run() -> None:
    assert slurm.render(job(), settings()) == PLAIN


def test_the_whole_script_with_everything() -> None:
    folder = '/runs/my "queries" 100%/0'
    asked = settings(
        nodes=4,
        slurm={
            "partition": "gpu", "account": "nlp", "qos": "high", "time": "1-12", "gpus_per_node": "a100:8", "gres": "nvme:1",
            "cpus_per_process": 6, "mem": "400G", "constraint": "a100&ib", "reservation": "course", "exclude": "n[7-9]",
            "exclusive": True, "dependency": "afterok:12:13", "array_parallel": 1, "signal_seconds": 120, "max_requeues": 3,
            "modules": ["cuda/12.8", "my module"], "setup": ["source .venv/bin/activate"],
            "environment": {"SAID": "two\nlines $(rm -rf /) 'quoted'"},
            "container": {"image": "llmkit.sif", "runtime": "apptainer", "mounts": ["/data:/data"]},
            "sbatch_options": ["--mail-type=END"],
        },
    )  # fmt: skip
    made = job(
        folder, name="한국 queries\n'of' $(today)", stage="lora", env={"A": "b c"}, resources=Resources(4, 8),
        cwd=Path("/home/me/my project"), argv=("llmkit", "run", f"{folder}/recipe.yaml", "--debug"),
        sweep=(f"{folder}/recipe.yaml", str(Path(folder).with_name("1") / "recipe.yaml")),
    )  # fmt: skip
    assert slurm.render(made, asked) == EVERYTHING


@pytest.mark.parametrize("script", [PLAIN, EVERYTHING])
def test_the_scripts_are_bash(script: str) -> None:
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


HOSTILE = [
    "a b",
    "it's",
    'say "x"',
    "$(touch pwned)",
    "`touch pwned`",
    "two\nlines",
    "한국 ü",
    "a;touch pwned",
    "-rf",
    "\\",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_enters_the_script_is_data(text: str, tmp_path: Path) -> None:
    """Run by bash. srun and scontrol are stand-ins, which show the words they get: a real job takes seconds for each."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, line in {"srun": 'printf "%s\\0" "$@" "$X" > "$SEEN"', "scontrol": "echo n1"}.items():
        (bin_folder / name).write_text(f"#!/bin/bash\n{line}\n")
        (bin_folder / name).chmod(0o755)
    where = tmp_path / f"in {text}".replace("\n", " ")
    where.mkdir()
    recipe = f"/runs/{text}/recipe.yaml"
    made = job(argv=("llmkit", "run", recipe), cwd=where, name=text, output_dir=where)
    script = slurm.render(made, settings(slurm={"environment": {"X": text}, "command": f"{text}!"}))
    seen = tmp_path / "seen"
    env = {
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "SEEN": str(seen),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n1",
    }
    done = subprocess.run(
        ["bash", "-s"], input=script, env=env, cwd=tmp_path, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    words = seen.read_text().split("\0")
    assert words[-5:] == [f"{text}!", "run", recipe, text, ""]
    assert not list(tmp_path.rglob("pwned"))


def test_a_line_break_in_an_option_would_be_a_command_and_is_refused() -> None:
    with pytest.raises(UsageError, match="line break"):
        slurm.render(job("/runs/a\ntouch pwned"), settings())


def test_pyxis_is_srun_s_own_container() -> None:
    image = {"image": "nvcr.io#nvidia/pytorch:26.01", "mounts": ["/data:/data:ro"]}
    text = slurm.render(job(), settings(slurm={"container": image}))
    srun = next(line for line in text.splitlines() if line.startswith("srun"))
    assert "'--container-image=nvcr.io#nvidia/pytorch:26.01'" in srun
    assert "--container-mounts=/data:/data:ro,/runs/queries:/runs/queries,/home/me/project:/home/me/project" in srun
    assert srun.endswith('llmkit llmkit run "$recipe" || code=$?')


def test_a_process_for_each_gpu_that_is_asked_for() -> None:
    def processes(launch_keys: dict[str, Any]) -> tuple[int, int]:
        keys = {"name": "x", "model": {"name_or_path": "m"}, "data": {"train": "t"}, "launch": launch_keys}
        found = slurm.resources(Recipe.model_validate(keys))
        return found.nodes, found.processes_per_node

    assert processes({"launcher": "slurm"}) == (1, 1)
    assert processes({"launcher": "slurm", "nodes": 2, "slurm": {"gpus_per_node": "a100:4"}}) == (2, 4)
    assert processes({"launcher": "slurm", "processes": 3, "slurm": {"gpus_per_node": 4}}) == (1, 3)
    assert load("prompt-test").Recipe.several_processes is False


def test_a_template_of_one_s_own(tmp_path: Path) -> None:
    own = tmp_path / "mine.j2"
    own.write_text("#!/bin/bash\n{% for o in options %}\n#SBATCH {{ o }}\n{% endfor %}\nmine {{ recipe | quote }}\n")
    text = slurm.render(job("/runs/a b"), settings(slurm={"template": str(own)}))
    assert text.endswith("mine '/runs/a b/recipe.yaml'\n")
    own.write_text("{{ nosuch }}")
    with pytest.raises(UsageError, match="'nosuch' is undefined"):
        slurm.render(job(), settings(slurm={"template": str(own)}))
    own.write_text("line\n{% for %}")
    with pytest.raises(UsageError, match=r"mine.j2:2"):
        slurm.render(job(), settings(slurm={"template": str(own)}))


def test_the_template_to_copy_is_the_one_that_is_used() -> None:
    repo = Path(__file__).resolve().parent.parent.parent
    shipped = repo / "slurm" / "job.sbatch.j2"
    assert shipped.read_text() == (repo / "llmkit/launch/templates/job.sbatch.j2").read_text()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("time", "two hours", "is no time limit"),
        ("mem", "much", "is no amount of memory"),
        ("partition", "a b", "no name in Slurm has"),
        ("gpus_per_node", "a100", "has no number of GPUs"),
        ("sbatch_options", ["mail"], "is no option of sbatch"),
        ("environment", {"A-B": "c"}, "is no name of an environment variable"),
        ("environment", {"HF_TOKEN": "hf_" + "a" * 30}, "secret"),
        ("time_limit", "1", "time"),
    ],
)
def test_mistakes_are_told_before_anything_is_submitted(key: str, value: object, said: str) -> None:
    from llmkit.recipe import parse

    keys = {"name": "x", "model": {"name_or_path": "m"}, "data": {"train": "t"}, "launch": {"slurm": {key: value}}}
    with pytest.raises(RecipeError, match=said):
        parse(keys, Recipe)


SHOWN = (
    "JobId=7 JobName=sft-my run UserId=root(0) Comment=llmkit:ab JobState={state} Reason={reason} Dependency=(null) "
    "Requeue=1 Restarts={restarts} BatchFlag=1 Reboot=0 ExitCode={code} RunTime=00:00:01 Partition=main AllocNode:Sid=n1:1 "
    "NumNodes=9-9 NumCPUs=9 TRES=cpu=9,node=9,billing=9 MinMemoryNode=0 Features=(null) Command=(null)"
)


@pytest.mark.parametrize(
    ("state", "reason", "code", "expected"),
    [
        ("PENDING", "Resources", "0:0", ("queued", "Resources", None)),
        ("RUNNING", "None", "0:0", ("running", "", None)),
        ("COMPLETING", "None", "0:0", ("running", "", None)),
        ("COMPLETED", "None", "0:0", ("done", "", 0)),
        ("FAILED", "NonZeroExitCode", "3:0", ("failed", "failed, NonZeroExitCode", 3)),
        ("FAILED", "RaisedSignal:9(Killed)", "0:9", ("failed", "failed, RaisedSignal:9(Killed)", 137)),
        ("OUT_OF_MEMORY", "OutOfMemory", "0:125", ("failed", "out of memory, OutOfMemory", 253)),
        ("CANCELLED", "None", "0:15", ("cancelled", "cancelled", 143)),
        ("TIMEOUT", "TimeLimit", "0:1", ("timed_out", "timeout, TimeLimit", 129)),
        ("PREEMPTED", "None", "0:0", ("preempted", "preempted", 0)),
        ("NODE_FAIL", "NodeDown", "1:0", ("failed", "node fail, NodeDown", 1)),
    ],
)
def test_what_slurm_says_of_a_job(
    monkeypatch: pytest.MonkeyPatch, state: str, reason: str, code: str, expected: tuple[str, str, int | None]
) -> None:
    from llmkit.launch.record import Record

    shown = SHOWN.format(state=state, reason=reason, code=code, restarts=2)
    monkeypatch.setattr(
        slurm, "_ask", lambda *_: shown
    )  # the real one is in tests/integration; these states are hard to make
    record = Record("slurm", "t", "x", "sft", Path("/x"), "now", "7")
    known = slurm.status(record)
    assert (known.state, known.reason, known.exit_code) == expected
    assert known.restarts == 2
    assert slurm._fields(record)["Partition"] == "main"
    assert slurm._fields(record)["JobName"] == "sft-my run"


def test_the_settings_are_the_recipe_s() -> None:
    assert Exported is LaunchSettings
