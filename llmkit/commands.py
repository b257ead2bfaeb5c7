"""What the commands do, once the command line is read; each gives back a reply."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from llmkit import jobs, launch, mirror, ranks, rundir, runner, stages, sweeps, uris
from llmkit.context import Result
from llmkit.errors import MissingError, UsageError, WontFitError
from llmkit.launch.job import Job
from llmkit.progress import quiet_libraries
from llmkit.ranks import Ranks
from llmkit.recipe import Recipe, dump, load_recipe
from llmkit.reply import Reply
from llmkit.runner import Prepared
from llmkit.yaml_positions import read_file


def stage(
    name: str,
    recipe_path: str,
    overrides: Sequence[str],
    *,
    launcher: str | None,
    output_dir: str | None,
    resume: str,
    dry_run: bool,
    debug: bool = False,
    profile: str | None = None,
    wait: bool = False,
    after: Sequence[str] = (),
    sweep: Sequence[str] = (),
) -> Reply:
    """``llmkit <stage> RECIPE``: read, prepare, launch."""
    if launcher is not None:
        _known(launcher, launch.LAUNCHERS, "launcher", "--launcher: ")
    changes = [
        *overrides,
        *([f"output_dir={runner.quoted(output_dir)}"] if output_dir is not None else []),
        *([f"launch.launcher={launcher}"] if launcher is not None else []),
    ]
    for change in overrides:
        if "=" not in change or change.startswith("="):
            raise UsageError(
                f"{change!r} is not KEY=VALUE. There is one recipe; what follows it changes its keys, "
                "e.g. train.max_steps=20."
            )
    in_own = not any(change.startswith("output_dir=") for change in changes)

    def resolved(more: Sequence[str]) -> Recipe:
        recipe: Recipe = load_recipe(recipe_path, stages.load(name).Recipe, [*changes, *more], profile=profile)
        return recipe.in_own_folder() if in_own else recipe

    recipe = resolved(())
    where = recipe.launch.launcher
    if where == "local":
        _only_elsewhere({"--wait": wait, "--after": after, "--sweep": sweep})
        return _start(name, recipe, resume=resume, dry_run=dry_run, debug=debug)
    runs = [recipe] if not sweep else [resolved(point) for point in sweeps.points(sweep, recipe)]
    how = jobs.How(where, resume, dry_run=dry_run, debug=debug, wait=wait, after=after)
    return jobs.start(name, runs, how)


def _only_elsewhere(options: Mapping[str, Any]) -> None:
    for option, value in options.items():
        if value:
            raise UsageError(f"{option} is for a launcher that runs a job elsewhere: --launcher slurm, for example.")


def plan(
    recipe_path: str, overrides: Sequence[str], *, stage: str | None, device: str | None, processes: int | None
) -> Reply:
    """``llmkit plan RECIPE``: exit code 5 where the recipe as it stands does not fit."""
    from llmkit.modeling.devices import device as find_device
    from llmkit.training.plan import as_data, make_plan
    from llmkit.training.plan_report import as_text
    from llmkit.training.settings import TrainingRecipe

    name = stage or _stage_of(Path(recipe_path))
    _known(name, stages.STAGES, "stage", "--stage: ")
    kind = stages.load(name).Recipe
    if not issubclass(kind, TrainingRecipe):
        raise UsageError(f"llmkit plan is about training: {name} is no training stage.")
    recipe = load_recipe(recipe_path, kind, overrides)
    found = make_plan(recipe, name, find_device(device), processes)
    return Reply(as_text(found), as_data(found), 0 if found.fits else WontFitError.exit_code)


def _stage_of(path: Path) -> str:
    """The stage that a recipe is for: its run says so, or its folder's name, or its keys."""
    frozen = rundir.RunFile.read(path.absolute().parent) if path.name == rundir.RECIPE else None
    if frozen is not None:
        return frozen.stage
    if path.absolute().parent.name in stages.STAGES:
        return path.absolute().parent.name
    found: Any = read_file(path).data
    blocks: dict[str, Any] = found if isinstance(found, dict) else {}
    model, data = ({} if not isinstance(blocks.get(key), dict) else blocks[key] for key in ("model", "data"))
    if data.get("format") == "text" or model.get("init") == "from_config":
        return "cpt"
    return "lora" if blocks.get("adapter") is not None else "sft"


def instead(name: str, recipe_path: str, overrides: Sequence[str], option: str, value: Any) -> Reply:
    """An option of one stage that does something else with the recipe than to run it (``cli.INSTEAD``)."""
    module = stages.load(name)
    recipe: Recipe = load_recipe(recipe_path, module.Recipe, overrides)
    quiet_libraries()
    text: str = getattr(module, option)(recipe, value)
    return Reply(text, {option: text})


def run_frozen(recipe_path: str, *, resume: str, dry_run: bool, debug: bool = False) -> Reply:
    """``llmkit run OUTPUT/recipe.yaml``: the run of the folder that the recipe lies in, wherever it was moved to."""
    if uris.is_uri(recipe_path):
        return _run_remote(recipe_path, resume=resume, dry_run=dry_run, debug=debug)
    path = Path(recipe_path).absolute()
    if path.is_dir():
        path = path / rundir.RECIPE
    if not path.is_file():
        raise UsageError(f"There is no file {recipe_path}. Give the recipe.yaml in a run's output folder.")
    frozen = rundir.RunFile.read(path.parent)
    if frozen is None or path.name != rundir.RECIPE:
        raise UsageError(
            f"{recipe_path} is not the recipe of a run ({path.parent} has no {rundir.RUN}). "
            f"Start a new run with: llmkit STAGE {recipe_path}"
        )
    _known(frozen.stage, stages.STAGES, "stage", f"{path.parent / rundir.RUN}: ")
    folder = f"output_dir={runner.quoted(mirror.uri_of(path.parent) or str(path.parent))}"
    recipe: Recipe = load_recipe(path, stages.load(frozen.stage).Recipe, [folder])
    return _start(frozen.stage, recipe, resume=resume, dry_run=dry_run, debug=debug)


def _run_remote(uri: str, *, resume: str, dry_run: bool, debug: bool) -> Reply:
    """``llmkit run s3://…/recipe.yaml``: the run of that folder, worked on in this machine's scratch folder."""
    folder = uri.rstrip("/").removesuffix(f"/{rundir.RECIPE}")
    with mirror.peek(folder, [rundir.RECIPE, rundir.RUN]) as here:
        frozen = rundir.RunFile.read(here)
        if frozen is None or not (here / rundir.RECIPE).is_file():
            raise UsageError(f"{folder} is no run: it has no {rundir.RUN if frozen is None else rundir.RECIPE}.")
        _known(frozen.stage, stages.STAGES, "stage", f"{folder}/{rundir.RUN}: ")
        change = f"output_dir={runner.quoted(folder)}"
        recipe: Recipe = load_recipe(here / rundir.RECIPE, stages.load(frozen.stage).Recipe, [change])
    return _start(frozen.stage, recipe, resume=resume, dry_run=dry_run, debug=debug)


def _start(name: str, recipe: Recipe, *, resume: str, dry_run: bool, debug: bool) -> Reply:
    from llmkit.launch import local as where

    folder = runner.folder_of(recipe)
    argv = ("llmkit", "run", uris.recipe_of(recipe.output_dir, folder), *(["--debug"] if debug else []))
    job = Job(argv, output_dir=folder, cwd=Path.cwd(), resources=where.resources(recipe))
    if dry_run:
        return _dry_run(runner.look(recipe, name, resume), where.render(job), where.describe(job))
    result: Result = where.submit(job, recipe, name, resume)
    if not Ranks.from_environment().is_main or ranks.launcher() is not None:
        return Reply()  # rank 0 speaks, or whoever started it
    from llmkit.summary import summary

    print(summary(result), file=sys.stderr, flush=True)
    return Reply(data=json.loads(result.to_json()))


def _dry_run(found: Prepared, command: str, processes: str) -> Reply:
    print(
        f"would run:      {command}\nprocesses:      {processes}\noutput folder:  {found.uri or found.folder} ({_folder_state(found)})\n"
        f"resume:         {resume_point(found)}",
        file=sys.stderr,
        flush=True,
    )
    text = dump(found.recipe)
    data = {
        "dry_run": True, "stage": found.stage, "command": command, "processes": processes, "output_dir": found.uri or str(found.folder),
        "state": found.finding.state, "resume": resume_point(found), "recipe": _yaml(text),
    }  # fmt: skip
    return Reply(text, data)


def _folder_state(found: Prepared) -> str:
    return {
        "new": "new",
        "continue": "holds this run, unfinished",
        "done": found.finding.why,
        "set_aside": f"would be kept under another name: {found.finding.why}",
        "unseen": f"in an object store that is asked when the run starts; works in {found.folder}",
    }[found.finding.state]


def resume_point(found: Prepared) -> str:
    """Where the run would begin, in words."""
    if found.resume not in ("auto", "never"):
        return found.resume
    last = rundir.last_checkpoint(found.folder) if found.finding.state == "continue" else None
    if found.finding.state == "done":
        return "nothing to do"
    if found.finding.state == "unseen":
        return "the last complete checkpoint in the store, if there is one"
    return f"the last complete checkpoint, {last.name} if it is complete" if last else "from the start"


def init(name: str, output: str | None) -> Reply:
    """``llmkit init STAGE``: a commented recipe on stdout, or in a file that does not exist yet."""
    _known(name, stages.STAGES, "stage")
    from llmkit.schema import init_recipe

    text = init_recipe(name)
    if output is None:
        return Reply(text, {"recipe": text})
    path = Path(output)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError(f"{output} is there already; it is not overwritten. Give another --output.") from None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as exc:
        raise UsageError(f"{output} cannot be written: {exc.strerror}.") from None
    print(f"Wrote {output}. Fill it in, then: llmkit {name} {output} --dry-run", file=sys.stderr)
    return Reply(data={"path": str(path.absolute())})


def export_schema(name: str | None) -> Reply:
    """``llmkit export-schema [STAGE]``: the JSON schema of one stage, or an object of all by name."""
    from llmkit.schema import all_schemas, schema

    if name is not None:
        _known(name, stages.STAGES, "stage")
    found: dict[str, Any] = schema(name) if name is not None else dict(all_schemas())
    return Reply(json.dumps(found, indent=2, ensure_ascii=False), found)


def chat(
    model: str, *, prompt: str | None, system: str | None, max_new_tokens: int, temperature: float, seed: int
) -> Reply:
    """``llmkit chat RUN_OR_MODEL``: answers go to stdout as they come."""
    quiet_libraries()
    from llmkit.inference.chat import chat_loop

    if uris.is_uri(model):
        model = str(mirror.fetched(model, ("model", "adapter"), note=_to_stderr))
    chat_loop(model, prompt=prompt, system=system, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    return Reply()


def merge(run: str, output: str | None) -> Reply:
    """``llmkit merge RUN``."""
    quiet_libraries()
    from llmkit.modeling.adapters import merge_run

    if uris.is_uri(run):
        if output is None:
            raise UsageError(
                f"{run} is in an object store: say with --output in which folder here the merged model shall be."
            )
        run = str(mirror.fetched(run, ("adapter",), note=_to_stderr))
    return _report(merge_run(_run_folder(run), Path(output) if output is not None else None))


def export_weights(checkpoint: str, output: str | None, dtype: str | None) -> Reply:
    """``llmkit export-weights CHECKPOINT``."""
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise UsageError(f"--dtype: there is no {dtype!r} here. Known: float32, bfloat16, float16.")
    quiet_libraries()
    from llmkit.training.weights import export_weights as export

    return _report(export(checkpoint, output, dtype=dtype))  # type: ignore[arg-type]  # checked above


def sync(run: str) -> Reply:
    """``llmkit sync RUN``."""
    quiet_libraries()
    from llmkit.tracking import sync as send

    return _report(send(_run_folder(run), note=_to_stderr))


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _run_folder(run: str) -> Path:
    if uris.is_uri(run):
        raise UsageError(
            f"{run}: this command works on a folder of this machine. The run's scratch folder, where it worked here, is "
            f"{uris.workplace(run)}."
        )
    folder = Path(run).expanduser().absolute()
    if not folder.is_dir():
        raise MissingError(f"There is no run folder {run}.")
    return folder


def _report(report: Any) -> Reply:
    data = asdict(report) if is_dataclass(report) and not isinstance(report, type) else dict(vars(report))
    lines = [f"{key.replace('_', ' ')}: {value}" for key, value in data.items() if value not in (None, [], {})]
    return Reply("\n".join(lines), data)


def _known(name: str, table: Mapping[str, str], what: str, where: str = "") -> None:
    if name in table:
        return
    near = difflib.get_close_matches(name, table, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UsageError(f"{where}there is no {what} {name!r}.{hint} Known: {', '.join(table)}.")


def _yaml(text: str) -> Any:
    import yaml

    return yaml.safe_load(text)
