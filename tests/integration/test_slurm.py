"""A real Slurm of two nodes with its accounting, and what ``--launcher slurm`` and ``llmkit jobs`` do with it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from training_runs import assert_close, assert_identical, recipe, run, weights

from llmkit.launch import record as records

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]

REPO = Path(__file__).resolve().parent.parent.parent
TOY = REPO / "tests" / "toys" / "toy_cli.py"


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The configuration file of a running Slurm."""
    if os.geteuid() != 0 and shutil.which("slurmctld") is None:
        pytest.skip("Slurm is not installed, and only root can install it")
    lab = tmp_path_factory.mktemp("slurm")
    script = REPO / "scripts" / "slurm_lab.sh"
    try:
        done = subprocess.run([script, "up", lab, "2"], capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        yield lab / "etc" / "slurm.conf"
    finally:
        subprocess.run([script, "down", lab], check=False, timeout=120)


class Cluster:
    """The command line with the toy stages, in a folder, before a Slurm."""

    def __init__(self, conf: Path, folder: Path) -> None:
        self.folder = folder
        self.env = os.environ | {
            "SLURM_CONF": str(conf), "COLUMNS": "200", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    def llmkit(self, *words: str | Path, timeout: float = 480) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(TOY), *map(str, words)]
        return subprocess.run(
            command, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=timeout, check=False
        )

    def json(self, *words: str | Path) -> Any:
        done = self.llmkit(*words, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def ask(self, *command: str) -> str:
        return subprocess.run(command, env=self.env, capture_output=True, text=True, check=True, timeout=60).stdout

    def toy(self, name: str, **keys: Any) -> Path:
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"name": name, "tracking": {"enabled": False}} | keys))
        return path

    def state(self, run_folder: str) -> str:
        return str(self.json("jobs", "status", run_folder)["state"])


@pytest.fixture
def cluster(slurm: Path, tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(slurm, tmp_path)
    yield made
    subprocess.run(["scancel", "--user=root", "--state=PENDING"], env=made.env, check=False, timeout=60)
    subprocess.run(["scancel", "--user=root"], env=made.env, check=False, timeout=60)


def until(true: Callable[[], bool], seconds: float = 300, every: float = 0.3) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(every)


# --- a run from the queue to its end ----------------------------------------------------------------------------------


def test_training_on_two_nodes_with_zero2_ends_like_one_process(
    cluster: Cluster, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[29]; one command submits, follows, and ends with the run's own result; its MLflow run is there from the start."""
    base = recipe(cluster.folder, tiny_llama, max_steps=6, save_steps=3, per_device_train_batch_size=2)
    one = base | {"train": base["train"] | {"per_device_train_batch_size": 4}}
    monkeypatch.setattr("llmkit.training.outcome.verify", lambda *_: None)
    monkeypatch.chdir(cluster.folder)
    run(one, "plain")
    divided = base | {"deepspeed": "zero2", "launch": {"nodes": 2}, "output_dir": "runs/divided"}
    divided["tracking"] = {"uri": f"sqlite:///{cluster.folder}/mlflow.db", "system_metrics": False}
    (cluster.folder / "r.yaml").write_text(yaml.safe_dump(divided))

    made = cluster.json("sft", "r.yaml", "--launcher", "slurm", "--wait")

    assert made["status"] == "done"
    folder = cluster.folder / "runs" / "divided"
    assert_close(weights(folder), weights(cluster.folder / "plain"), 2e-5)
    record = records.read(folder)
    assert record is not None
    log = Path(record.where["log"]).read_text()
    assert "Traceback" not in log
    from mlflow import MlflowClient

    seen = MlflowClient(divided["tracking"]["uri"]).get_run(made["run_id"])
    assert seen.data.tags["llmkit.job_id"] == record.id
    assert seen.info.status == "FINISHED"
    until(lambda: accounted(cluster, record.id, "State,NNodes") == "COMPLETED|2", 60)


def test_a_queued_job_is_seen_followed_and_cancelled(cluster: Cluster) -> None:
    path = cluster.toy("slow", steps=400, pause=0.3)
    first = cluster.json("toy", path, "--launcher", "slurm")
    assert first["new"]
    until(lambda: cluster.state("runs/slow") == "running")
    again = cluster.json("toy", path, "--launcher", "slurm")
    assert (again["id"], again["new"]) == (first["id"], False), "nothing is submitted twice"
    listed = cluster.json("jobs", "list")["jobs"]
    assert [(job["id"], job["state"]) for job in listed] == [(first["id"], "running")]
    with subprocess.Popen(
        [sys.executable, str(TOY), "jobs", "logs", first["id"], "-f"],
        cwd=cluster.folder, env=cluster.env, stdout=subprocess.PIPE, text=True,
    ) as follower:  # fmt: skip
        assert follower.stdout is not None
        seen = next(line for line in follower.stdout if "step 2/400" in line)
        assert "loss" in seen
        assert cluster.llmkit("jobs", "cancel", "runs/slow").returncode == 0
        assert follower.wait(60) == 0, "the log is followed to the job's end"
    until(lambda: cluster.state("runs/slow") == "cancelled")
    waited = cluster.llmkit("jobs", "wait", "runs/slow")
    assert waited.returncode == 1
    assert "cancelled" in waited.stderr


def test_a_job_waits_for_another_and_a_failure_is_the_runs_own(cluster: Cluster) -> None:
    first = cluster.json("toy", cluster.toy("first", steps=10, pause=0.3), "--launcher", "slurm")
    second = cluster.llmkit(
        "toy", cluster.toy("second", end="data"), "--launcher", "slurm", "--after", "runs/first", "--wait"
    )
    assert second.returncode == 3, second.stderr
    assert "rows 1, 2 and 3 are empty" in second.stderr
    assert json.loads((cluster.folder / "runs/first/result.json").read_text())["status"] == "done"
    record = records.read(cluster.folder / "runs/second")
    assert record is not None
    until(lambda: accounted(cluster, first["id"], "State") == "COMPLETED", 60)
    assert accounted(cluster, record.id, "Start") >= accounted(cluster, first["id"], "End")
    third = cluster.llmkit("toy", cluster.toy("third"), "--launcher", "slurm", "--after", "runs/second")
    assert third.returncode == 2
    assert "a job that it waits for did not end well" in third.stderr


def test_a_sweep_is_an_array(cluster: Cluster) -> None:
    done = cluster.json("toy", cluster.toy("grid"), "--launcher", "slurm", "--sweep", "steps=[2,3]", "--wait")
    assert [one["metrics"]["steps"] for one in done["runs"]] == [2, 3]
    ids = [one["id"] for one in cluster.json("jobs", "list")["jobs"]]
    assert len({i.partition("_")[0] for i in ids}) == 1
    assert [i.partition("_")[2] for i in ids] == ["0", "1"]


def test_names_are_only_names(cluster: Cluster) -> None:
    """Spaces, quotes, ``$(…)``, newlines and other alphabets run as they are written."""
    name = "it's $(touch pwned) `x` 한국 %j"
    path = cluster.toy(
        name,
        launch={
            "slurm": {"environment": {"SAID": "two\nlines '\" $(touch pwned)"}, "setup": ['printf %s "$SAID" > said']}
        },
    )
    done = cluster.llmkit("toy", path, "--launcher", "slurm", "--wait")
    assert done.returncode == 0, done.stderr
    assert (cluster.folder / "said").read_text() == "two\nlines '\" $(touch pwned)"
    assert not list(cluster.folder.rglob("pwned"))
    assert (cluster.folder / "runs" / name / "result.json").is_file()


# --- stopped, killed, refused -----------------------------------------------------------------------------------------


def test_stopped_by_a_signal_and_by_a_dead_node_it_goes_on_by_itself_to_the_same_weights(
    cluster: Cluster, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, slurm: Path
) -> None:
    base = recipe(cluster.folder, tiny_llama, max_steps=150, save_steps=10, num_train_epochs=1, save_total_limit=2)
    monkeypatch.setattr("llmkit.training.outcome.verify", lambda *_: None)
    run(base, "plain")
    slow = base | {"output_dir": "runs/slow", "name": "slow"}
    (cluster.folder / "r.yaml").write_text(yaml.safe_dump(slow))
    job = cluster.json("sft", "r.yaml", "--launcher", "slurm", "launch.slurm.exclude=n2")["id"]
    folder = cluster.folder / "runs" / "slow"

    until(lambda: steps(folder) > 12)
    cluster.ask("scancel", "--signal=USR1", job)
    until(lambda: fields(cluster, job).get("Restarts") == "1")
    stopped_at = steps(folder)
    assert stopped_at < 150

    until(lambda: steps(folder) > stopped_at + 12)
    kill_node(slurm, "n1")
    cluster.ask("scontrol", "update", "nodename=n1", "state=down", "reason=killed by a test")
    until(lambda: fields(cluster, job).get("Restarts") == "2")
    subprocess.Popen(["slurmd", "-f", str(slurm), "-N", "n1"], env=cluster.env).wait(30)
    with suppress(subprocess.CalledProcessError):  # it may have come back by itself
        cluster.ask("scontrol", "update", "nodename=n1", "state=resume")

    done = cluster.llmkit("jobs", "wait", "runs/slow", timeout=600)
    assert done.returncode == 0, done.stderr
    assert_identical(weights(folder), weights(cluster.folder / "plain"))
    assert cluster.json("jobs", "status", "runs/slow")["state"] == "done"


def test_the_time_limit_stops_requeues_and_ends(cluster: Cluster) -> None:
    """Slurm's shortest limit is a minute; the signal comes at least 15 seconds before, and 60 steps take 48."""
    path = cluster.toy("long", steps=60, pause=0.8, launch={"slurm": {"time": "1", "signal_seconds": 15}})
    done = cluster.llmkit("toy", path, "--launcher", "slurm", "--wait", timeout=600)
    assert done.returncode == 0, done.stderr
    record = records.read(cluster.folder / "runs" / "long")
    assert record is not None
    log = Path(record.where["log"]).read_text()
    assert log.count("goes on from the checkpoint") >= 1
    assert json.loads((cluster.folder / "runs/long/result.json").read_text())["metrics"]["started_at"] > 0
    assert "Requeued" in done.stderr, "the log is followed over the requeue"


def test_the_number_of_requeues_is_bounded_and_a_failure_is_not_requeued(cluster: Cluster) -> None:
    path = cluster.toy("bounded", steps=400, pause=0.3, launch={"slurm": {"max_requeues": 0}})
    job = cluster.json("toy", path, "--launcher", "slurm")["id"]
    until(lambda: cluster.state("runs/bounded") == "running")
    until(lambda: (cluster.folder / "runs/bounded/seen-by-0").exists())
    cluster.ask("scancel", "--signal=USR1", job)
    waited = cluster.llmkit("jobs", "wait", "runs/bounded")
    assert waited.returncode == 138, waited.stderr
    failed = cluster.llmkit("toy", cluster.toy("failing", end="gate"), "--launcher", "slurm", "--wait")
    assert failed.returncode == 4
    record = records.read(cluster.folder / "runs/failing")
    assert record is not None
    assert fields(cluster, record.id)["Restarts"] == "0"


def test_what_slurm_refuses_and_what_will_never_start_is_an_error_at_once(cluster: Cluster) -> None:
    path = cluster.toy("refused")
    done = cluster.llmkit("toy", path, "--launcher", "slurm", "launch.slurm.partition=nosuch")
    assert done.returncode == 2
    assert "Slurm refused the job" in done.stderr
    assert "partition" in done.stderr
    assert not (cluster.folder / "runs/refused/job.json").exists()
    done = cluster.llmkit("toy", path, "--launcher", "slurm", "launch.nodes=9")
    assert done.returncode == 2
    assert "will never start" in done.stderr
    assert "asks for 9 nodes of 2 in partition main" in done.stderr
    done = cluster.llmkit("toy", path, "--launcher", "slurm", "launch.slurm.partition=short", "launch.slurm.time='60'")
    assert done.returncode == 2
    assert "time limit" in done.stderr.lower()
    assert cluster.ask("squeue", "--noheader", "--format=%i").strip() == ""


def test_an_interrupted_submission_is_found_again(cluster: Cluster) -> None:
    path = cluster.toy("lost", steps=400, pause=0.3)
    first = cluster.json("toy", path, "--launcher", "slurm")
    file = cluster.folder / "runs/lost/job.json"
    written = json.loads(file.read_text())
    file.write_text(json.dumps(written | {"id": "", "where": {"logs": str(Path(written["where"]["log"]).parent)}}))
    again = cluster.json("toy", path, "--launcher", "slurm")
    assert (again["id"], again["new"]) == (first["id"], False)
    assert len(cluster.ask("squeue", "--noheader", "--format=%i").split()) == 1


def test_an_interrupted_submission_of_a_sweep_is_found_part_by_part(cluster: Cluster) -> None:
    words = ("toy", cluster.toy("parts", pause=0.3), "--launcher", "slurm", "--sweep", "steps=[400,401]")
    first = cluster.json(*words)["runs"]
    for i in range(2):
        file = cluster.folder / f"runs/parts/{i}/job.json"
        written = json.loads(file.read_text())
        logs = str(Path(written["where"]["log"]).parent)
        file.write_text(json.dumps(written | {"id": "", "where": {"logs": logs, "index": str(i)}}))
    again = cluster.json(*words)["runs"]
    assert [one["id"] for one in again] == [one["id"] for one in first]
    logs_found = [records.read(cluster.folder / f"runs/parts/{i}") for i in range(2)]
    assert [Path(one.where["log"]).name for one in logs_found if one] == [f"slurm-{one['id']}.log" for one in first]


def steps(folder: Path) -> int:
    """The last step in the run's log."""
    with suppress(OSError, ValueError):
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return max((line["step"] for line in lines if "loss" in (line.get("metrics") or {})), default=0)
    return 0


def accounted(cluster: Cluster, job: str, what: str) -> str:
    return cluster.ask("sacct", "-j", job, "-X", "-n", "-P", "-o", what).strip()


def fields(cluster: Cluster, job: str) -> dict[str, str]:
    text = cluster.ask("scontrol", "--oneliner", "show", "job", job)
    return dict(word.split("=", 1) for word in text.split() if "=" in word)


def kill_node(conf: Path, node: str) -> None:
    """``kill -9`` for the node's daemon and everything that it had started."""
    pid = int((conf.parent.parent / "run" / f"slurmd.{node}.pid").read_text())
    steps = [p for p in psutil.process_iter(["name"]) if p.info["name"].startswith("slurmstepd")]
    for one in [psutil.Process(pid), *(child for step in steps for child in [step, *step.children(recursive=True)])]:
        with suppress(psutil.NoSuchProcess):
            one.send_signal(signal.SIGKILL)
