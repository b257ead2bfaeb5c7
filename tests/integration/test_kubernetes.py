"""The launchers on Kubernetes against a real API server with etcd.

No operator and no kubelet run there. Where a test needs their work, it says so: conditions are patched by the test, or
tests/toys/node_agent.py makes the pods and runs their commands as processes of this machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_jobs import ELASTIC, FULL, PLAIN, job, settings

from llmkit import rundir
from llmkit.errors import MissingError, UsageError
from llmkit.kube import api
from llmkit.launch import pytorchjob, remote, trainjob
from llmkit.launch import record as records
from llmkit.launch.record import Record

pytestmark = pytest.mark.server
REPO = Path(__file__).resolve().parent.parent.parent
LAB = REPO / "scripts" / "kube_lab.sh"
CACHE = Path(os.environ.get("LLMKIT_KUBE_CACHE", Path.home() / ".cache/llmkit/kube"))
BUILD_S = float(os.environ.get("LLMKIT_KUBE_BUILD_S", "30"))
"""Seconds that the tests wait for a build of the API server that was begun before them (scripts/test.sh)."""


@dataclass
class Cluster:
    """The API server of this session."""

    folder: Path

    @property
    def kubeconfig(self) -> Path:
        return self.folder / "kubeconfig"

    def kubectl(self, *args: str, text: str | None = None, ok: bool = True) -> str:
        done = subprocess.run(
            ["kubectl", "--kubeconfig", str(self.kubeconfig), *args],
            input=text,
            capture_output=True,
            text=True,
            check=False,
        )
        assert not ok or done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def stop_api(self) -> None:
        """``kill -9`` of the API server; etcd stays."""
        pid = int((self.folder / "api.pid").read_text())
        os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.kill(pid, 0)
                if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
                    break
                time.sleep(0.05)

    def start_api(self) -> None:
        subprocess.run([LAB, "api", self.folder], check=True, timeout=120)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, kubectl: str) -> Iterator[Cluster]:
    """A running API server with the two kinds of jobs; its binary is built once and kept.

    LLMKIT_KUBE_LAB is the folder of one that is up already (``scripts/kube_lab.sh up DIR``), which stays up.
    """
    end = time.monotonic() + BUILD_S
    while not (CACHE / "kube-apiserver").exists() and time.monotonic() < end:
        time.sleep(1)
    if not (CACHE / "kube-apiserver").exists():
        pytest.skip("kube-apiserver could not be built in the time: scripts/kube_lab.sh build, then run this again")
    subprocess.run([LAB, "packages"], check=True, timeout=200)
    there = os.environ.get("LLMKIT_KUBE_LAB")
    found = Cluster(Path(there) if there else tmp_path_factory.mktemp("kube"))
    if not there:
        subprocess.run([LAB, "up", found.folder], check=True, timeout=180)
    try:
        crds = subprocess.run(
            [sys.executable, REPO / "scripts/kube_crds.py"], capture_output=True, text=True, check=True
        )
        found.kubectl("apply", "-f", "-", text=crds.stdout)
        found.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
        yield found
    finally:
        if not there:
            subprocess.run([LAB, "down", found.folder], check=False)


@pytest.fixture(autouse=True)
def as_admin(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Each test in a namespace of its own, where nothing is left of another."""
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower())[:50].strip("-") + f"-{os.getpid()}"
    cluster.kubectl("create", "namespace", name)
    return name


def record_of(place: records.Place, folder: Path, launcher: str = "pytorchjob", token: str = "") -> Record:
    return Record(launcher, token or job().token, job().name, "sft", folder, records.now(), place.id, place.where)


def condition(cluster: Cluster, namespace: str, name: str, kind: str, message: str = "", reason: str = "") -> None:
    """What the operator would write."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    one = {
        "type": kind,
        "status": "True",
        "reason": reason or f"Job{kind}",
        "message": message or kind,
        "lastTransitionTime": now,
    }
    proxy = api.Cluster(None, namespace)
    proxy.custom.patch_namespaced_custom_object_status(
        "kubeflow.org", "v1", namespace, "pytorchjobs", name, {"status": {"conditions": [one]}}
    )


# What the server takes


@pytest.mark.parametrize("case", ["plain", "full", "elastic"])
def test_the_server_takes_every_manifest(cluster: Cluster, as_admin: str, case: str) -> None:
    given = {"plain": settings(PLAIN), "full": settings(FULL, namespace=as_admin), "elastic": settings(ELASTIC)}[case]
    text = pytorchjob.render(job(given.nodes, 2), given)
    said = cluster.kubectl("apply", "--dry-run=server", "-n", as_admin, "-f", "-", text=text)
    assert "pytorchjob.kubeflow.org/it-s-a-run-01234567 created (server dry run)" in said
    assert cluster.kubectl("get", "pytorchjobs", "-n", as_admin).startswith("No resources")
    if case != "elastic":
        given = settings(FULL, namespace=as_admin, scheduling=None) if case == "full" else given
        text = trainjob.render(job(given.nodes, 2), given)
        assert "created (server dry run)" in cluster.kubectl(
            "apply", "--dry-run=server", "-n", as_admin, "-f", "-", text=text
        )


def test_the_server_refuses_what_the_schema_does_not_know(cluster: Cluster, as_admin: str) -> None:
    """So that the test above can fail."""
    text = pytorchjob.render(job(), settings(PLAIN)).replace("replicas: 1", "replicas: one")
    said = cluster.kubectl(
        "apply", "--validate=false", "--dry-run=server", "-n", as_admin, "-f", "-", text=text, ok=False
    )
    assert "must be of type integer" in said


@pytest.mark.parametrize("overlay", ["single-node", "gpu"])
def test_the_server_takes_the_overlays(cluster: Cluster, overlay: str) -> None:
    text = cluster.kubectl("kustomize", str(REPO / "k8s" / "overlays" / overlay))
    cluster.kubectl("create", "namespace", "llmkit", ok=False)
    said = cluster.kubectl("apply", "--dry-run=server", "-f", "-", text=text)
    assert said.count("(server dry run)") == text.count("\nkind:") + text.startswith("kind:")


# Submitting


def test_a_job_is_created_once_and_found_again(cluster: Cluster, as_admin: str, tmp_path: Path) -> None:
    given = settings(PLAIN, namespace=as_admin)
    place = pytorchjob.submit(job(), given)
    assert pytorchjob.submit(job(), given) == place, "409: the same token is the same submission"
    made = yaml.safe_load(cluster.kubectl("get", "pytorchjob", place.id, "-n", as_admin, "-o", "yaml"))
    owned = yaml.safe_load(cluster.kubectl("get", "configmap", f"{place.id}-recipe", "-n", as_admin, "-o", "yaml"))
    assert owned["metadata"]["ownerReferences"][0]["uid"] == made["metadata"]["uid"] == place.where["uid"]
    assert owned["data"]["recipe.yaml"] == job().recipe
    # A submission that was interrupted before its answer came: only the token and the frozen recipe are left.
    frozen = {"launch": {"kubernetes": {"context": None, "namespace": as_admin}}}
    (tmp_path / rundir.RECIPE).write_text(yaml.safe_dump(frozen))
    lost = Record("pytorchjob", job().token, job().name, "sft", tmp_path, records.now())
    assert pytorchjob.find(lost) == place
    assert pytorchjob.find(Record("pytorchjob", "f" * 32, job().name, "sft", tmp_path, records.now())) is None


def test_a_refused_job_leaves_nothing_behind(cluster: Cluster, as_admin: str) -> None:
    broken = settings(PLAIN, namespace=as_admin)
    objects = pytorchjob.objects(job(), broken)
    objects[-1]["spec"]["pytorchReplicaSpecs"]["Master"]["replicas"] = "one"
    with pytest.raises(UsageError, match=r"Kubernetes refused .*must be of type integer"):
        api.submit(pytorchjob.KIND, objects, broken.kubernetes)
    assert cluster.kubectl("get", "configmaps,pytorchjobs", "-n", as_admin).startswith("No resources")


def test_another_job_of_that_name_is_not_ours(as_admin: str) -> None:
    given = settings(PLAIN, namespace=as_admin)
    pytorchjob.submit(job(), given)
    other = job()
    token = other.token[:8] + "f" * 24
    with pytest.raises(UsageError, match="There is another PyTorchJob"):
        pytorchjob.submit(type(other)(**vars(other) | {"token": token}), given)


# Refusals


def test_without_rights(cluster: Cluster, as_admin: str) -> None:
    with pytest.raises(UsageError, match=r'User "alice" cannot (get|create) .*k8s/base/rbac.yaml'):
        pytorchjob.submit(job(), settings(PLAIN, namespace=as_admin, context="alice"))


def test_the_rights_of_the_submitter_are_enough_and_no_more(cluster: Cluster, as_admin: str, tmp_path: Path) -> None:
    text = (REPO / "k8s/base/rbac.yaml").read_text()
    text = text.replace("kind: ServiceAccount, name: llmkit-submitter}]", "kind: User, name: alice}]")
    cluster.kubectl("apply", "-n", as_admin, "-f", "-", text=text)
    given = settings(PLAIN, namespace=as_admin, context="alice")
    place = pytorchjob.submit(job(), given)
    record = record_of(place, tmp_path)
    assert pytorchjob.status(record).state == "queued"
    assert list(pytorchjob.logs(record, False)) == [""]
    pytorchjob.cancel(record)
    assert pytorchjob.status(record).state == "cancelled"
    for verb, what in (("get", "secrets"), ("create", "pods"), ("get", "configmaps"), ("list", "configmaps")):
        assert (
            cluster.kubectl("--context", "alice", "auth", "can-i", verb, what, "-n", as_admin, ok=False).strip() == "no"
        )


def test_an_expired_token(as_admin: str) -> None:
    with pytest.raises(MissingError, match=r"does not know you .*token has expired"):
        pytorchjob.submit(job(), settings(PLAIN, namespace=as_admin, context="expired"))


def test_no_kubeconfig(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(MissingError, match="no usable kubeconfig"):
        pytorchjob.submit(job(), settings(PLAIN))
    monkeypatch.undo()
    with pytest.raises(MissingError, match="no usable kubeconfig"):
        pytorchjob.submit(job(), settings(PLAIN, context="elsewhere"))


def test_a_cluster_without_the_operator(as_admin: str) -> None:
    kind = api.Kind("example.org", "v1", "jobs", "PyTorchJob", "x", "Kubeflow's training operator")
    given = settings(PLAIN, namespace=as_admin)
    with pytest.raises(
        MissingError, match=r"has no PyTorchJob \(example.org/v1\): Kubeflow's training operator is not"
    ):
        api.submit(kind, pytorchjob.objects(job(), given), given.kubernetes)


# How it stands: the conditions are patched by the test, no operator runs here

STANDS: list[tuple[str, str, str, str]] = [
    ("Created", "", "", "queued"),
    ("Running", "", "", "running"),
    ("Restarting", "pod master-0 ended with 138", "", "queued"),
    ("Suspended", "", "", "queued"),
    ("Succeeded", "", "", "done"),
    ("Failed", "pod worker-0 ended with 3", "", "failed"),
    ("Failed", "the job was active longer than specified", "DeadlineExceeded", "timed_out"),
]


def test_states_by_the_operators_conditions(cluster: Cluster, as_admin: str, tmp_path: Path) -> None:
    place = pytorchjob.submit(job(), settings(PLAIN, namespace=as_admin))
    record = record_of(place, tmp_path)
    assert pytorchjob.status(record).state == "queued"
    for kind, message, reason, state in STANDS:
        condition(cluster, as_admin, place.id, kind, message, reason)
        known = pytorchjob.status(record)
        assert (known.state, message in known.reason) == (state, True), kind


def test_why_a_pod_waits(cluster: Cluster, as_admin: str, tmp_path: Path) -> None:
    place = pytorchjob.submit(job(), settings(PLAIN, namespace=as_admin))
    pod = {
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": f"{place.id}-master-0", "labels": {"training.kubeflow.org/job-name": place.id}},
        "spec": {"containers": [{"name": "pytorch", "image": "x"}]},
    }  # fmt: skip
    cluster.kubectl("create", "-n", as_admin, "-f", "-", text=json.dumps(pod))
    said = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    status = {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": said}]}
    api.Cluster(None, as_admin).core.patch_namespaced_pod_status(pod["metadata"]["name"], as_admin, {"status": status})  # type: ignore[index]
    known = pytorchjob.status(record_of(place, tmp_path))
    assert known.state == "queued"
    assert known.reason.endswith(said)


def test_a_watch_tells_of_a_change_and_may_break(cluster: Cluster, as_admin: str, tmp_path: Path) -> None:
    place = pytorchjob.submit(job(), settings(PLAIN, namespace=as_admin))
    record = record_of(place, tmp_path)
    began = time.monotonic()
    later = threading.Timer(0.5, condition, (cluster, as_admin, place.id, "Running"))
    later.start()
    api.wait_for_change(pytorchjob.KIND, record, 20)
    assert time.monotonic() - began < 10
    later.join()
    killer = threading.Timer(0.5, cluster.stop_api)
    killer.start()
    try:
        api.wait_for_change(pytorchjob.KIND, record, 20)  # the server dies: no exception, and no twenty seconds
    finally:
        killer.join()
        cluster.start_api()
    assert pytorchjob.status(record).state == "running"


def test_the_server_away(cluster: Cluster, as_admin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = settings(PLAIN, namespace=as_admin)
    monkeypatch.setattr(api, "ATTEMPTS", 2)
    cluster.stop_api()
    try:
        with pytest.raises(MissingError, match=r"API server https://127.0.0.1:\d+ does not answer .*[Rr]efused"):
            pytorchjob.submit(job(), given)
        monkeypatch.setattr(api, "ATTEMPTS", 6)
        back = threading.Timer(1.0, cluster.start_api)
        back.start()
        place = pytorchjob.submit(job(), given)  # it comes back while we try
    finally:
        back.join()
    assert pytorchjob.status(record_of(place, tmp_path)).state == "queued"


# Runs: tests/toys/node_agent.py is scheduler, operator and kubelet


@pytest.fixture(scope="module")
def agent(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("node")
    env = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    with (folder / "agent.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, REPO / "tests/toys/node_agent.py", cluster.kubeconfig, folder],
            stdout=log,
            stderr=log,
            env=env,
        )
    wait_until(lambda: process.poll() is not None or "ready" in (folder / "agent.log").read_text(), 60)
    assert process.poll() is None, (folder / "agent.log").read_text()
    yield
    process.terminate()
    process.wait(20)


Submit = Callable[..., Any]
TOYS = f"{REPO}:{REPO / 'tests/toys/with_toys'}"


@pytest.fixture
def submit(tmp_path: Path, as_admin: str, agent: None, run_llmkit: Any) -> Submit:
    """``llmkit STAGE recipe.yaml`` by a launcher on Kubernetes, in a namespace of the test's own."""

    def run(stage: str, what: dict[str, Any], *args: str, launcher: str = "pytorchjob") -> Any:
        kubernetes = {
            "image": "llmkit:0.1.0",
            "namespace": as_admin,
            "shared_memory": None,
            "env": {"PYTHONPATH": TOYS},
        }
        what = what | {"launch": {"kubernetes": kubernetes}, "output_dir": str(tmp_path / "out")}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(what))
        command = (stage, tmp_path / "recipe.yaml", "--launcher", launcher, *args)
        return run_llmkit(*command, env={"PYTHONPATH": TOYS}, timeout=500)

    return run


def toy(**keys: Any) -> dict[str, Any]:
    """A recipe of tests/toys/toy_stage.py: one that runs in seconds, and can end in every way."""
    return {"name": "toy", "tracking": {"enabled": False}, **keys}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("launcher", ["pytorchjob", "trainjob"])
def test_training_on_two_pods(submit: Submit, launcher: str, tmp_path: Path, tiny_llama: Path) -> None:
    from training_runs import recipe

    what = recipe(tmp_path, tiny_llama)
    done = submit("sft", what, "launch.nodes=2", "--wait", "--json", launcher=launcher)
    assert done.code == 0, done.stderr
    result = done.json()
    assert result["status"] == "done"
    out = tmp_path / "out"
    assert (out / "model").is_dir()
    record = records.read(out)
    assert record is not None
    assert record.launcher == launcher
    assert remote.status(record).state == "done"
    again = submit("sft", what, "launch.nodes=2", "--wait", launcher=launcher)
    assert again.code == 0
    assert "nothing to do" in again.stderr


@pytest.mark.parametrize("launcher", ["pytorchjob", "trainjob"])
@pytest.mark.parametrize(("end", "code"), [("done", 0), ("data", 3), ("gate", 4)])
def test_a_run_ends_with_its_own_exit_code(submit: Submit, launcher: str, end: str, code: int) -> None:
    done = submit("toy", toy(end=end), "--wait", launcher=launcher)
    assert done.code == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "a child process prints to stdout" in done.stderr, "the pod's log"


def test_stopped_with_a_checkpoint_is_started_again(submit: Submit, tmp_path: Path) -> None:
    """SIGTERM to a pod's process: 138, ExitCode makes the pod again, and the run goes on from the checkpoint."""
    out = tmp_path / "out"
    done = submit("toy", toy(steps=40, pause=0.2))
    assert done.code == 0, done.stderr
    record = records.read(out)
    assert record is not None
    wait_until(lambda: (out / "seen-by-0").exists(), 90)
    found = subprocess.run(
        ["pgrep", "-f", f"llmkit.processes.node --output {out}"], capture_output=True, text=True, check=True
    )
    os.kill(int(found.stdout.split()[0]), signal.SIGTERM)
    result = remote.wait(record)
    assert result.status == "done"
    assert 0 < result.metrics["started_at"] < 40, "the pod that was made again went on from the checkpoint"


def test_cancel(submit: Submit, tmp_path: Path, run_llmkit: Any) -> None:
    out = tmp_path / "out"
    endless = toy(steps=10_000, pause=0.2)
    done = submit("toy", endless)
    assert done.code == 0, done.stderr
    wait_until(lambda: (out / "seen-by-0").exists(), 90)
    listed = run_llmkit("jobs", "list", tmp_path, "--json").json()["jobs"]
    assert [one["state"] for one in listed] == ["running"]
    assert "nothing was submitted" in submit("toy", endless).stderr
    assert "a child process prints to stdout" in run_llmkit("jobs", "logs", out).stdout
    assert run_llmkit("jobs", "cancel", out).code == 0
    wait_until(lambda: rundir.read_result(out) is not None, 60)
    result = rundir.read_result(out)
    assert result is not None
    assert result.status == "stopped", "SIGTERM, and time for a checkpoint"
    assert run_llmkit("jobs", "status", out, "--json").json()["state"] == "cancelled"


def wait_until(true: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in the time"
        time.sleep(0.2)
