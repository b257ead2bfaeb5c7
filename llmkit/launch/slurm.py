"""The launcher for Slurm: one batch script, one log file, srun for the processes.

The script is ``templates/job.sbatch.j2``, to read and to copy. Time limit: Slurm sends SIGUSR1 to the processes
``signal_seconds`` before it, they save a checkpoint and leave with 138, and the script requeues its own job.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from llmkit import launch
from llmkit.errors import MissingError, StoppedEarly, UsageError
from llmkit.launch.job import Job, Resources
from llmkit.launch.record import FINAL, JobStatus, Place, Record, State
from llmkit.launch.record import resolve as resolve_record
from llmkit.launch.tail import Tail
from llmkit.launch_settings import LaunchSettings
from llmkit.launch_settings.slurm import ContainerSettings, SlurmSettings
from llmkit.recipe import Recipe

COMMENT = "llmkit:"
"""Before the token in a job's comment."""

_STATES: dict[str, State] = {
    "PENDING": "queued", "CONFIGURING": "queued", "REQUEUED": "queued", "REQUEUE_FED": "queued", "REQUEUE_HOLD": "queued",
    "RESV_DEL_HOLD": "queued", "SPECIAL_EXIT": "queued", "RUNNING": "running", "COMPLETING": "running",
    "SUSPENDED": "running", "STOPPED": "running", "SIGNALING": "running", "STAGE_OUT": "running", "RESIZING": "running",
    "COMPLETED": "done", "FAILED": "failed", "BOOT_FAIL": "failed", "NODE_FAIL": "failed", "OUT_OF_MEMORY": "failed",
    "REVOKED": "failed", "LAUNCH_FAILED": "failed", "CANCELLED": "cancelled", "TIMEOUT": "timed_out", "DEADLINE": "timed_out",
    "PREEMPTED": "preempted",
}  # fmt: skip

_NEVER: dict[str, str] = {
    "PartitionConfig": "the partition cannot give what it asks for",
    "PartitionNodeLimit": "it asks for more nodes, or fewer, than the partition allows",
    "PartitionTimeLimit": "its time limit is longer than the partition's",
    "BadConstraints": "no nodes have what it asks for",
    "InvalidAccount": "the account is not valid",
    "InvalidQOS": "the quality of service is not valid",
    "DependencyNeverSatisfied": "a job that it waits for did not end well",
    "AccountNotAllowed": "the account may not use the partition",
    "QOSNotAllowed": "the quality of service may not be used in the partition",
    "AssocMaxNodePerJobLimit": "it asks for more nodes than the account may have",
    "QOSMaxNodePerJobLimit": "it asks for more nodes than the quality of service allows",
    "AssocMaxWallDurationPerJobLimit": "its time limit is longer than the account's",
    "QOSMaxWallDurationPerJobLimit": "its time limit is longer than the quality of service allows",
}
"""Slurm's reasons for which waiting does not help."""

_LOOK_AFTER_S = 6.0


# Rendering


def resources(recipe: Recipe) -> Resources:
    settings = recipe.launch
    if settings.processes != "auto":
        return Resources(settings.nodes, settings.processes)
    return Resources(settings.nodes, max(1, settings.slurm.gpus) if recipe.several_processes else 1)


def describe(job: Job) -> str:
    """Where and in how many processes the job runs, in words."""
    found = job.resources
    nodes = "1 node" if found.nodes == 1 else f"{found.nodes} nodes"
    return f"{found.processes_per_node} on each of {nodes} by Slurm"


def check(settings: LaunchSettings) -> None:
    """UsageError for a template that is not there; MissingError without Slurm's commands."""
    if shutil.which("sbatch") is None:
        raise MissingError("sbatch is not on the PATH: submit from a machine of the cluster that has Slurm's commands.")
    _template(settings.slurm)


def waiting_for(settings: LaunchSettings, after: Sequence[str]) -> LaunchSettings:
    """The settings with ``--after JOB``: run folders or job ids, each of which must end well first."""
    if not after:
        return settings
    ids = [job if job.isdigit() else resolve_record(job, Path("runs")).id for job in after]
    given = settings.slurm.dependency
    dependency = ",".join([*([given] if given else []), "afterok:" + ":".join(ids)])
    return settings.model_copy(update={"slurm": settings.slurm.model_copy(update={"dependency": dependency})})


def render(job: Job, settings: LaunchSettings) -> str:
    """The batch script. Pure but for reading the template. UsageError for a template with a mistake."""
    import jinja2

    text = _template(settings.slurm)
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    environment.filters["prepend"] = lambda value, before: f"{before}{value}"
    try:
        return environment.from_string(text).render(_values(job, settings))
    except jinja2.TemplateError as error:
        where = f"{settings.slurm.template}:{error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise UsageError(f"launch.slurm.template {where or settings.slurm.template}: {error}") from error


def _template(slurm: SlurmSettings) -> str:
    if slurm.template is None:
        return (files("llmkit.launch") / "templates" / "job.sbatch.j2").read_text(encoding="utf-8")
    try:
        return Path(slurm.template).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"launch.slurm.template: {slurm.template} cannot be read: {error.strerror}.") from None


def _values(job: Job, settings: LaunchSettings) -> dict[str, Any]:
    slurm = settings.slurm
    command = [slurm.command] if slurm.command else ["llmkit"] if slurm.container else launch.PROGRAM
    return {
        "title": one_line(f"llmkit {job.stage}: {job.name}"),
        "options": _options(job, settings),
        "cwd": job.cwd,
        "environment": {**job.env, **slurm.environment},
        "modules": slurm.modules,
        "setup": slurm.setup,
        "sweep": job.sweep,
        "recipe": job.argv[2],
        "processes_per_node": job.resources.processes_per_node,
        "srun": _srun(job, slurm.container),
        "program": [*_inside(job, slurm.container), *(command or [sys.executable, "-m", "llmkit"]), job.argv[1]],
        "arguments": job.argv[3:],
        "stopped": StoppedEarly.exit_code,
        "max_requeues": slurm.max_requeues,
    }


def _options(job: Job, settings: LaunchSettings) -> list[str]:
    slurm, found = settings.slurm, job.resources
    log = str(job.logs).replace("%", "%%")
    number = "%A_%a" if job.sweep else "%j"
    given: list[tuple[str, Any]] = [
        ("job-name", slug(f"{job.stage}-{job.name}")),
        ("comment", COMMENT + job.token),
        ("partition", slurm.partition), ("account", slurm.account), ("qos", slurm.qos), ("time", slurm.time),
        ("nodes", found.nodes), ("ntasks-per-node", found.processes_per_node),
        ("cpus-per-task", slurm.cpus_per_process), ("mem", slurm.mem), ("gpus-per-node", slurm.gpus_per_node),
        ("gres", slurm.gres), ("constraint", slurm.constraint), ("reservation", slurm.reservation),
        ("exclude", slurm.exclude), ("dependency", slurm.dependency),
        ("array", _array(job, slurm)),
        ("signal", f"USR1@{slurm.signal_seconds}" if slurm.time else None),
        ("output", f"{log}/slurm-{number}.log"), ("open-mode", "append"),
    ]  # fmt: skip
    flags = ["--requeue", *(["--exclusive"] if slurm.exclusive else []), *slurm.sbatch_options]
    return [f"--{name}={sbatch_quote(str(value))}" for name, value in given if value is not None] + flags


def _array(job: Job, slurm: SlurmSettings) -> str | None:
    if not job.sweep:
        return None
    return f"0-{len(job.sweep) - 1}" + (f"%{slurm.array_parallel}" if slurm.array_parallel else "")


def _srun(job: Job, container: ContainerSettings | None) -> list[str]:
    found = ["--kill-on-bad-exit=1", "--distribution=block"]
    if container is not None and container.runtime == "pyxis":
        mounts = ",".join([*container.mounts, *_own_mounts(job)])
        found += [
            f"--container-image={container.image}",
            f"--container-mounts={mounts}",
            f"--container-workdir={job.cwd}",
        ]
    return found


def _inside(job: Job, container: ContainerSettings | None) -> list[str]:
    """The words before the program that bring it into an apptainer image."""
    if container is None or container.runtime != "apptainer":
        return []
    mounts = [word for mount in [*container.mounts, *_own_mounts(job)] for word in ("--bind", mount)]
    return ["apptainer", "exec", "--nv", *mounts, "--pwd", str(job.cwd), container.image]


def _own_mounts(job: Job) -> list[str]:
    runs = job.output_dir.parent if job.sweep else job.output_dir
    folders = (job.cwd,) if job.remote else (runs, job.cwd)
    return [f"{folder}:{folder}" for folder in dict.fromkeys(folders)]


def sbatch_quote(value: str) -> str:
    """A value on an ``#SBATCH`` line. sbatch knows quotes and backslashes, but expands nothing.

    UsageError for a line break: what follows it would be a command of the script.
    """
    if len(value.splitlines()) > 1 or value.endswith(("\n", "\r")):
        raise UsageError(
            f"{value!r} has a line break, and an option of sbatch is one line. Change output_dir, or the setting."
        )
    if re.fullmatch(r"[\w%+:,./@=-]+", value, re.ASCII):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def slug(name: str) -> str:
    """A job's name without what would have to be quoted in squeue's columns."""
    return re.sub(r"[^\w.+-]+", "-", name).strip("-")[:100] or "llmkit"


def one_line(text: str) -> str:
    return " ".join(text.split())


# Slurm's commands


def submit(job: Job, settings: LaunchSettings) -> Place:
    """Hand the script to sbatch. UsageError with Slurm's own words where it refuses."""
    logs = job.logs
    logs.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["sbatch", "--parsable"], input=render(job, settings), capture_output=True, text=True, check=False, cwd=job.cwd
    )
    if done.returncode:
        said = done.stderr.strip().replace("sbatch: error: ", "").replace("\n", "; ")
        if _no_answer(said):
            raise MissingError(f"Slurm does not answer: {said}")
        raise UsageError(f"Slurm refused the job: {said}")
    number = done.stdout.strip().partition(";")[0]
    return Place(number, {"log": str(logs / f"slurm-{number}.log")})


def part(place: Place, index: int) -> Place:
    """The job of one run of a sweep."""
    number = f"{place.id}_{index}"
    return Place(number, {"log": str(Path(place.where["log"]).with_name(f"slurm-{number}.log"))})


def find(record: Record) -> Place | None:
    """The newest job whose submission was interrupted before its id was written down; None where there is none."""
    index = record.where.get("index")
    found = None
    for line in _ask("squeue", "--me", "--array", "--noheader", "--states=all", "--format=%i|%k").splitlines():
        number, _, comment = line.strip().partition("|")
        if comment == COMMENT + record.token and (index is None or number.endswith(f"_{index}")):
            found = Place(number, {"log": str(Path(record.where["logs"]) / f"slurm-{number}.log")})
    return found


def look_after(record: Record) -> JobStatus:
    """The first words of the scheduler about a new job. UsageError, and the job taken back, where it will never start."""
    end = time.monotonic() + _LOOK_AFTER_S
    while True:
        fields = _fields(record)
        reason = fields.get("Reason", "")
        if reason in _NEVER:
            cancel(record)
            raise UsageError(
                f"Job {record.id} will never start: {_NEVER[reason]} ({_asked(fields)}). It was taken back."
            )
        known = _status(fields)
        # Reason=None: the scheduler has not looked at the job yet
        if known.state != "queued" or reason not in ("", "None") or time.monotonic() > end:
            return known
        time.sleep(0.3)


def _asked(fields: Mapping[str, str]) -> str:
    """``asks for 9 nodes of 4 in partition main`` and the like."""
    wanted = fields.get("NumNodes", "?").partition("-")[0]
    partition = fields.get("Partition", "")
    there = _ask("sinfo", "--noheader", f"--partition={partition}", "--format=%D %l").split()
    nodes = f"asks for {wanted} node{'s'[: wanted != '1']} of {there[0] if there else '?'} in partition {partition}"
    if len(there) < 2 or there[1] == "infinite":
        return nodes
    return f"{nodes}, and for a time limit of {fields.get('TimeLimit', '?')}; the partition's is {there[1]}"


def status(record: Record) -> JobStatus:
    """What Slurm says of a job; from its accounting, where the controller has forgotten it."""
    try:
        return _status(_fields(record))
    except _Forgotten:
        return _accounted(record)


class _Forgotten(Exception):  # noqa: N818  a state of the world
    """The controller does not know the job any more."""


def _fields(record: Record) -> dict[str, str]:
    try:
        text = _ask("scontrol", "--oneliner", "show", "job", record.id)
    except UsageError as error:
        if "Invalid job id" in str(error):
            raise _Forgotten from None
        raise
    line = text.strip().splitlines()[0] if text.strip() else ""
    return dict(re.findall(r"(?:^| )([\w/:]+)=(.*?)(?= [\w/:]+=|$)", line))


def _status(fields: Mapping[str, str]) -> JobStatus:
    name = fields.get("JobState", "")
    code = _exit_code(fields.get("ExitCode", ""))
    state = _STATES.get(name, "running")
    reason = fields.get("Reason", "")
    said = [name.lower().replace("_", " ")] if state in FINAL and name != "COMPLETED" else []
    said += [reason] if reason not in ("", "None", name) else []
    return JobStatus(state, ", ".join(said), code if state in FINAL else None, int(fields.get("Restarts", "0") or 0))


def _exit_code(text: str) -> int | None:
    """``0:9`` (killed by signal 9) is 137, as in a shell."""
    code, _, signal = text.partition(":")
    if not code.isdigit():
        return None
    return 128 + int(signal) if signal.isdigit() and int(signal) and not int(code) else int(code)


def _accounted(record: Record) -> JobStatus:
    try:
        text = _ask(
            "sacct", "--jobs", record.id, "--parsable2", "--noheader", "--allocations", "--format=State,ExitCode"
        )
    except (UsageError, MissingError):
        text = ""
    if not text.strip():
        return JobStatus("failed", "Slurm does not know the job any more")
    name, _, code = text.strip().splitlines()[-1].partition("|")
    by = name.partition(" ")[2]  # CANCELLED by 1000
    state = _STATES.get(name.split()[0].rstrip("+"), "failed")
    return JobStatus(state, f"cancelled {by}" if by else "", _exit_code(code))


def cancel(record: Record) -> None:
    _ask("scancel", record.id)


class Log(Tail):
    """The job's log file: appended to by every start of it."""

    def __init__(self, record: Record) -> None:
        super().__init__(Path(record.where["log"]))


def logs(record: Record, follow: bool) -> Iterator[str]:
    """What the job has written; with ``follow``, as it comes, until it ends."""
    log = Log(record)
    while True:
        final = not follow or status(record).final
        yield log.rest() if final else log.more()
        if final:
            return
        time.sleep(1.0)


def _ask(*command: str) -> str:
    """One of Slurm's commands. MissingError where the controller does not answer, UsageError for any other refusal."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except FileNotFoundError:
        raise MissingError(f"{command[0]} is not on the PATH: Slurm's commands are needed here.") from None
    except subprocess.TimeoutExpired:
        raise MissingError(f"Slurm does not answer: {command[0]} took longer than a minute.") from None
    if done.returncode == 0:
        return done.stdout
    said = one_line(done.stderr or done.stdout)
    raise (MissingError if _no_answer(said) else UsageError)(f"{command[0]}: {said}")


def _no_answer(said: str) -> bool:
    words = ("Unable to contact slurm controller", "Socket timed out", "Connection refused", "Communication connection")
    return any(word.lower() in said.lower() for word in words)
