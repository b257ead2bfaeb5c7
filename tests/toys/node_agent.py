"""Scheduler, operator and kubelet of the tests' API server, in one small program: pods are processes of this machine.

It takes PyTorchJobs and TrainJobs off the API server, makes their pods as the operators do, runs each pod's command with the
environment that the operator injects, and writes statuses back; the API server reads logs from it as from any kubelet.

Not as on a cluster: there are no images and no mounts (a path below a mounted ConfigMap is rewritten, a claim is the same
path on this machine), no cluster DNS (the master's name is 127.0.0.1, its port one of this machine), and no limits.

    python tests/toys/node_agent.py KUBECONFIG FOLDER
"""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import requests
import yaml

NODE = "lab-node"
POLL_S = 0.3
TRAINING = "training.kubeflow.org"
JOBSET = "jobset.sigs.k8s.io"


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Server:
    """The API server, as its admin."""

    def __init__(self, kubeconfig: Path) -> None:
        config = yaml.safe_load(kubeconfig.read_text(encoding="utf-8"))
        self.url = config["clusters"][0]["cluster"]["server"]
        self.session = requests.Session()
        self.session.trust_env = False  # REQUESTS_CA_BUNDLE would win over the cluster's own certificate
        self.session.verify = config["clusters"][0]["cluster"]["certificate-authority"]
        self.session.headers["Authorization"] = f"Bearer {config['users'][0]['user']['token']}"

    def ask(self, method: str, path: str, body: Any = None, missing_ok: bool = False, **query: str) -> Any:
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        answer = self.session.request(
            method, self.url + path, json=body, params=query, headers={"Content-Type": kind}, timeout=20
        )
        if answer.status_code == 404 and missing_ok:
            return None
        if answer.status_code == 409 and method == "POST":
            return None
        answer.raise_for_status()
        return answer.json()


@dataclass
class Pod:
    """A pod whose command is a process here; ``restarts`` counts how often its replica was made again."""

    namespace: str
    name: str
    container: str
    process: subprocess.Popen[bytes]
    log: Path
    grace: int
    code: int | None = None


@dataclass
class Job:
    """A job as its operator sees it."""

    path: str
    body: dict[str, Any]
    port: int
    restarts: int = 0
    seen: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.body["metadata"]["name"])

    @property
    def namespace(self) -> str:
        return str(self.body["metadata"]["namespace"])

    @property
    def is_pytorch(self) -> bool:
        return self.body["kind"] == "PyTorchJob"


class Agent:
    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.jobs: dict[str, Job] = {}
        self.pods: dict[tuple[str, str], Pod] = {}
        self.old: set[str] | None = None
        """Jobs that were there before this agent: their pods, if any, are another's."""
        folder.mkdir(parents=True, exist_ok=True)

    # The kubelet

    def register(self) -> None:
        """A node whose kubelet listens here; the API server asks it for logs."""
        certificate = self._certificate()
        agent = self

        class Logs(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                url = urlparse(self.path)
                _, _, namespace, name, _ = url.path.split("/")
                pod = agent.pods.get((namespace, name))
                self.send_response(200 if pod else 404)
                self.end_headers()
                if pod:
                    self.wfile.write(log_of(pod, {k: v[0] for k, v in parse_qs(url.query).items()}))

            def log_message(self, *_: Any) -> None:
                return

        http = ThreadingHTTPServer(("127.0.0.1", 0), Logs)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        http.socket = context.wrap_socket(http.socket, server_side=True)
        threading.Thread(target=http.serve_forever, daemon=True).start()
        self.server.ask("POST", "/api/v1/nodes", {"metadata": {"name": NODE}})
        status = {
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": http.server_port}},
            "conditions": [{"type": "Ready", "status": "True"}],
        }
        self.server.ask("PATCH", f"/api/v1/nodes/{NODE}/status", {"status": status})

    def _certificate(self) -> Path:
        path = self.folder / "kubelet.pem"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", path, "-out", f"{path}.crt",
             "-days", "2", "-subj", f"/CN={NODE}"],
            check=True, capture_output=True,
        )  # fmt: skip
        with path.open("ab") as file:
            file.write(Path(f"{path}.crt").read_bytes())
        return path

    def start_pod(self, namespace: str, body: dict[str, Any], env: dict[str, str]) -> None:
        """Make the pod on the API server and its process here."""
        name = body["metadata"]["name"]
        body["spec"]["nodeName"] = NODE
        if self.server.ask("POST", f"/api/v1/namespaces/{namespace}/pods", body) is None:
            raise RuntimeError(f"there is a pod {name} already")
        container = body["spec"]["containers"][0]
        mounts = self._mounts(namespace, name, body["spec"])
        command = [_rewritten(part.replace("$$(", "$("), mounts) for part in container["command"]]
        given = self._environment(namespace, container)
        log = self.folder / f"{namespace}.{name}.log"
        inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        inherited["PATH"] = f"{Path(sys.executable).parent}:{inherited['PATH']}"
        process = subprocess.Popen(
            command, env=inherited | given | env, cwd=container.get("workingDir"), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        threading.Thread(target=_stamp, args=(process, log), daemon=True).start()
        grace = body["spec"].get("terminationGracePeriodSeconds", 30)
        self.pods[namespace, name] = Pod(namespace, name, container["name"], process, log, grace)
        self._report(self.pods[namespace, name], "Running", {"running": {"startedAt": now()}})

    def _mounts(self, namespace: str, name: str, spec: dict[str, Any]) -> dict[str, Path]:
        """Where the contents of the pod's ConfigMaps are on this machine, by the folder they are mounted at."""
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        found = {}
        for mount in spec["containers"][0].get("volumeMounts", []):
            volume = volumes[mount["name"]]
            if "configMap" not in volume:
                continue
            there = f"/api/v1/namespaces/{namespace}/configmaps/{volume['configMap']['name']}"
            folder = self.folder / f"{namespace}.{name}.{mount['name']}"
            folder.mkdir(exist_ok=True)
            for file, text in self.server.ask("GET", there)["data"].items():
                (folder / file).write_text(text, encoding="utf-8")
            found[mount["mountPath"]] = folder
        return found

    def _environment(self, namespace: str, container: dict[str, Any]) -> dict[str, str]:
        found: dict[str, str] = {}
        for source in container.get("envFrom", []):
            found |= self._secret(namespace, source["secretRef"]["name"])
        for one in container.get("env", []):
            reference = one.get("valueFrom", {}).get("secretKeyRef")
            value = self._secret(namespace, reference["name"])[reference["key"]] if reference else one.get("value", "")
            found[one["name"]] = value if reference else value.replace("$$(", "$(")
        return found

    def _secret(self, namespace: str, name: str) -> dict[str, str]:
        import base64

        data = self.server.ask("GET", f"/api/v1/namespaces/{namespace}/secrets/{name}")["data"]
        return {key: base64.b64decode(value).decode() for key, value in data.items()}

    def _report(self, pod: Pod, phase: str, state: dict[str, Any]) -> None:
        status = {
            "phase": phase, "startTime": now(),
            "containerStatuses": [{
                "name": pod.container, "state": state, "ready": phase == "Running", "restartCount": 0, "image": "",
                "imageID": "",
            }],
        }  # fmt: skip
        path = f"/api/v1/namespaces/{pod.namespace}/pods/{pod.name}/status"
        self.server.ask("PATCH", path, {"status": status}, missing_ok=True)

    def look_at_pods(self) -> None:
        for pod in self.pods.values():
            if pod.code is not None or (code := pod.process.poll()) is None:
                continue
            pod.code = code if code >= 0 else 128 - code
            ended = {"terminated": {"exitCode": pod.code, "finishedAt": now()}}
            self._report(pod, "Failed" if pod.code else "Succeeded", ended)

    def remove_pod(self, pod: Pod) -> None:
        """SIGTERM, the grace period, SIGKILL; then the pod is no more."""
        if pod.process.poll() is None:
            pod.process.terminate()
            try:
                pod.process.wait(pod.grace)
            except subprocess.TimeoutExpired:
                os.killpg(pod.process.pid, signal.SIGKILL)
                pod.process.wait()
        path = f"/api/v1/namespaces/{pod.namespace}/pods/{pod.name}"
        self.server.ask("DELETE", path, missing_ok=True, gracePeriodSeconds="0")
        self.pods.pop((pod.namespace, pod.name), None)

    # The operators

    def look_at_jobs(self) -> None:
        there: dict[str, dict[str, Any]] = {}
        for group in ("kubeflow.org/v1/pytorchjobs", "trainer.kubeflow.org/v1alpha1/trainjobs"):
            api, _, plural = group.rpartition("/")
            for body in (self.server.ask("GET", f"/apis/{group}", missing_ok=True) or {"items": []})["items"]:
                where = f"/apis/{api}/namespaces/{body['metadata']['namespace']}/{plural}/{body['metadata']['name']}"
                there[body["metadata"]["uid"]] = {"path": where, "body": body}
        if self.old is None:
            self.old = set(there)
        for uid in [uid for uid in self.jobs if uid not in there]:
            job = self.jobs.pop(uid)
            for pod in self.pods_of(job):
                self.remove_pod(pod)
        for uid, found in there.items():
            if uid not in self.jobs and uid not in self.old:
                self.jobs[uid] = Job(found["path"], found["body"], free_port())
                self.start_job(self.jobs[uid])
        for job in list(self.jobs.values()):
            self.look_at_job(job)

    def start_job(self, job: Job) -> None:
        spec = job.body["spec"]
        if spec.get("suspend") or spec.get("runPolicy", {}).get("suspend"):
            self.say(job, "Suspended", "the job is suspended")
            return
        self.say(job, "Created", f"{job.body['kind']} {job.name} is created")
        for body, env in pytorch_pods(job) if job.is_pytorch else train_pods(job):
            self.start_pod(job.namespace, body, env)
        self.say(job, "Running", f"{job.body['kind']} {job.name} is running")

    def look_at_job(self, job: Job) -> None:
        if job.seen[-1] not in ("Running", "Restarting"):
            return
        pods = self.pods_of(job)
        bad = [pod for pod in pods if pod.code]
        limit = job.body["spec"].get("runPolicy", {}).get("backoffLimit", 0)
        if bad and job.is_pytorch and bad[0].code >= 128 and job.restarts < limit:  # type: ignore[operator]
            self.restart(job, pods, bad[0])
        elif bad:
            self.say(job, "Failed", f"{job.body['kind']} {job.name} has failed: {bad[0].name} ended with {bad[0].code}")
        elif pods and pods[0].code == 0 and (job.is_pytorch or all(pod.code == 0 for pod in pods)):
            self.say(job, "Succeeded" if job.is_pytorch else "Complete", "the job is done")

    def restart(self, job: Job, pods: list[Pod], bad: Pod) -> None:
        """ExitCode: a pod that ended with 128 or more is made again, and here its comrades, which wait for it, too."""
        job.restarts += 1
        self.say(job, "Restarting", f"{job.name}: {bad.name} ended with {bad.code}, it is started again")
        for pod in pods:
            self.remove_pod(pod)
        for body, env in pytorch_pods(job):
            self.start_pod(job.namespace, body, env)
        self.say(job, "Running", f"{job.name} is running again")

    def pods_of(self, job: Job) -> list[Pod]:
        return [
            p for (n, name), p in sorted(self.pods.items()) if n == job.namespace and name.startswith(job.name + "-")
        ]

    def say(self, job: Job, kind: str, message: str) -> None:
        """A condition of the job; Running and Restarting exclude each other, as the operator has it."""
        job.seen.append(kind)
        last = {k: i for i, k in enumerate(job.seen)}
        conditions = [
            {"type": k, "status": "True" if k == kind or k == "Created" else "False", "reason": f"Job{k}",
             "message": message if k == kind else f"was {k}", "lastTransitionTime": now()}
            for k in sorted(last, key=lambda k: last[k])
        ]  # fmt: skip
        self.server.ask("PATCH", f"{job.path}/status", {"status": {"conditions": conditions}}, missing_ok=True)

    def work(self) -> None:
        self.register()
        self.look_at_jobs()
        print("ready", flush=True)
        while True:
            try:
                self.look_at_pods()
                self.look_at_jobs()
            except requests.RequestException as error:  # the API server is being killed by a test
                print(error, flush=True)
            time.sleep(POLL_S)

    def stop(self) -> None:
        for pod in list(self.pods.values()):
            if pod.process.poll() is None:
                os.killpg(pod.process.pid, signal.SIGKILL)


# What the operators make of a job


def pytorch_pods(job: Job) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """Pods and environment, as training-operator 1.9 makes them (``pkg/controller.v1/pytorch/envvar.go``)."""
    spec = job.body["spec"]
    replicas = spec["pytorchReplicaSpecs"]
    total = sum(replica["replicas"] for replica in replicas.values())
    each = spec.get("nprocPerNode", "auto")
    for role in ("Master", "Worker"):
        for index in range(replicas.get(role, {}).get("replicas", 0)):
            rank = index if role == "Master" or "Master" not in replicas else index + 1
            env = {
                "PET_NPROC_PER_NODE": each, "PYTHONUNBUFFERED": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job.port),
                "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(job.port), "RANK": str(rank),
                "WORLD_SIZE": str(total * int(each)), "PET_NODE_RANK": str(rank), "PET_NNODES": str(total),
            }  # fmt: skip
            labels = {
                f"{TRAINING}/job-name": job.name, f"{TRAINING}/replica-type": role.lower(),
                f"{TRAINING}/replica-index": str(index),
            }  # fmt: skip
            yield pod_of(f"{job.name}-{role.lower()}-{index}", replicas[role]["template"], labels), env


def train_pods(job: Job) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """Pods of Kubeflow trainer's ``torch-distributed`` runtime: a JobSet with one replicated job, ``node``."""
    spec = job.body["spec"]
    trainer = spec["trainer"]
    patch = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]
    template = json.loads(json.dumps(patch["template"]["spec"]["template"]))
    container = template["spec"]["containers"][0]
    container |= {key: trainer[key] for key in ("image", "command", "env")}
    container["resources"] = trainer.get("resourcesPerNode", {})
    for index in range(trainer["numNodes"]):
        env = {
            "PET_NNODES": str(trainer["numNodes"]), "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
            "PET_NODE_RANK": str(index), "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(job.port),
        }  # fmt: skip
        labels = {f"{JOBSET}/jobset-name": job.name, f"{JOBSET}/replicatedjob-name": "node"}
        yield pod_of(f"{job.name}-node-0-{index}", template, labels), env


def pod_of(name: str, template: dict[str, Any], labels: dict[str, str]) -> dict[str, Any]:
    copy = json.loads(json.dumps(template))
    metadata = copy["metadata"] | {"name": name, "labels": copy["metadata"]["labels"] | labels}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": copy["spec"] | {"restartPolicy": "Never"}}


# Small things


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rewritten(part: str, mounts: dict[str, Path]) -> str:
    for mounted, here in mounts.items():
        if part == mounted or part.startswith(mounted + "/"):
            return str(here) + part.removeprefix(mounted)
    return part


def _stamp(process: subprocess.Popen[bytes], log: Path) -> None:
    """Copy the output into the log, each line with the time it came at, as container runtimes do."""
    assert process.stdout is not None
    with log.open("wb") as file:
        for line in process.stdout:
            seconds, rest = divmod(time.time_ns(), 10**9)
            stamp = f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:09d}Z "
            file.write(stamp.encode() + line.rstrip(b"\n") + b"\n")
            file.flush()


def log_of(pod: Pod, query: dict[str, str]) -> bytes:
    """What a kubelet answers: with or without the time stamps, and the youngest lines only where it is asked so."""
    lines = pod.log.read_bytes().splitlines(keepends=True) if pod.log.exists() else []
    if "sinceSeconds" in query:
        oldest = time.time() - int(query["sinceSeconds"])
        limit = datetime.fromtimestamp(oldest, UTC).strftime("%Y-%m-%dT%H:%M:%S").encode()
        lines = [line for line in lines if line[:19] >= limit]
    return b"".join(lines if query.get("timestamps") == "true" else [line.partition(b" ")[2] for line in lines])


if __name__ == "__main__":
    agent = Agent(Server(Path(sys.argv[1])), Path(sys.argv[2]))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        agent.work()
    finally:
        agent.stop()
