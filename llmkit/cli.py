"""The command line: it reads arguments, and is the one place that turns an exception into a message and an exit code.

Each command gives back a function without arguments; ``main`` calls it. So typer only parses, and whatever goes wrong
later is treated here. ``main`` looks for ``--json`` and ``--debug`` itself: they hold for mistakes in the arguments too.
Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import ast
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from typer.exceptions import Abort, TyperException

from llmkit import __version__, launch, ranks
from llmkit.errors import GateError
from llmkit.launch import LAUNCHERS
from llmkit.reply import Reply
from llmkit.stages import STAGES

EPILOG = (
    "Exit codes: 0 done, 1 a bug in llmkit or a process that was killed, 2 usage or recipe, 3 data, 4 a gate not met, 5 will not fit, "
    "6 something needed is missing, 138 stopped early with a checkpoint (run the same command again)."
)
STAGE_PANEL = "Stages"
INSTEAD: dict[str, dict[str, Any]] = {
    "prompt-test": {
        "show": Annotated[
            int | None,
            typer.Option(min=1, metavar="N", help="Print case N token by token, with what would be learned of it, and run "
                         "nothing.", show_default=False),
        ]
    },
    "embed": {
        "check_against": Annotated[
            str | None,
            typer.Option(metavar="LIBRARY", help="Compare the vectors of the input's first 200 texts with those of "
                         "sentence-transformers, print the worst cosine, and run nothing.", show_default=False),
        ]
    },
}  # fmt: skip
"""Options of single stages that do something else with the recipe than to run it: the function of that name in the
stage's module gets recipe and value, and gives back the text to print."""

Action = Callable[[], Reply]

RecipeArg = Annotated[str, typer.Argument(metavar="RECIPE", help="YAML file of the recipe.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Recipe keys to change, e.g. train.learning_rate=1e-5.",
                   show_default=False),
]  # fmt: skip
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Same as KEY=VALUE; may be repeated.", show_default=False),
]
LauncherOption = Annotated[
    str | None, typer.Option(metavar="|".join(LAUNCHERS), help="Where the run runs; the recipe's launch.launcher when left "
                             "out.", show_default=False),
]  # fmt: skip
ProfileOption = Annotated[
    str | None,
    typer.Option(metavar="NAME|FILE", help="Launch settings of a site, slurm/NAME.yaml or k8s/NAME.yaml; the recipe's own win.",
                 show_default=False),
]  # fmt: skip
WaitOption = Annotated[
    bool, typer.Option("--wait", help="Follow the submitted job's log, and end with the run's own exit code.")
]
AfterOption = Annotated[
    list[str] | None,
    typer.Option(metavar="JOB", help="Start when this job (a run's folder, or an id) has ended well; may be repeated.",
                 show_default=False),
]  # fmt: skip
SweepOption = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=[V1,V2]", help="One run for each value, as an array of jobs; repeated, for each combination.",
                 show_default=False),
]  # fmt: skip
JobArg = Annotated[
    str,
    typer.Argument(
        metavar="JOB", help="A run's folder, or the scheduler's id of a job under runs/.", show_default=False
    ),
]
OutputDirOption = Annotated[
    str | None, typer.Option(metavar="DIR", help="Folder of the run, instead of the recipe's output_dir.",
                             show_default=False)
]  # fmt: skip
ResumeOption = Annotated[
    str,
    typer.Option(metavar="auto|never|PATH", help="auto goes on from the run's last complete checkpoint; never begins "
                 "anew (an old folder is kept under another name); PATH begins from that checkpoint."),
]  # fmt: skip
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Print the resolved recipe and what would run, and do nothing.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the result as one JSON object on stdout; all else goes to stderr.")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
RunArg = Annotated[str, typer.Argument(metavar="RUN", help="Output folder of a run.", show_default=False)]


def build_app() -> typer.Typer:
    """The whole command line, one command for each of STAGES and the few that are not stages."""
    app = typer.Typer(
        name="llmkit",
        help="Fine-tune language models from a recipe.",
        epilog=EPILOG,
        no_args_is_help=True,
        rich_markup_mode=None,  # rich would double the time that --help takes
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )

    @app.callback()
    def root(
        version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True,
                                              callback=_print_version)] = False,
    ) -> None:  # fmt: skip
        return None

    for stage in STAGES:
        short, long = stage_help(stage)
        app.command(stage, help=long, short_help=short, rich_help_panel=STAGE_PANEL)(_stage_command(stage))
    for command in (plan, run, init, doctor, export_schema, chat, merge, export_weights, sync):
        app.command(command.__name__.replace("_", "-"))(command)
    app.add_typer(_jobs_app(), name="jobs")
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llmkit {__version__}")
        raise typer.Exit


def stage_help(stage: str) -> tuple[str, str]:
    """Short and long help of a stage from its docstrings, read from the source: importing it would cost more."""
    spec = find_spec(STAGES[stage])
    if spec is None or spec.origin is None:
        return stage, stage
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    module = inspect.cleandoc(ast.get_docstring(tree) or stage)
    recipe = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Recipe"), None)
    detail = (ast.get_docstring(recipe) if recipe is not None else None) or ""
    title = module.splitlines()[0].split(": ``")[0].rstrip(".") + "."
    trains = recipe is not None and "TrainingRecipe" in {ast.unparse(base) for base in recipe.bases}
    change = " train.learning_rate=1e-5" if trains else ""
    example = f"llmkit {stage} recipe.yaml{change} --output-dir runs/mine"
    return title, f"{title}\n\n{detail}\n\nExample:\n\n  {example}".replace("``", "`")


def _stage_command(stage: str) -> Callable[..., Action]:
    def command(
        recipe: RecipeArg, overrides: Overrides = None, set_: SetOption = None, launcher: LauncherOption = None,
        profile: ProfileOption = None, output_dir: OutputDirOption = None, resume: ResumeOption = "auto",
        dry_run: DryRunOption = False, wait: WaitOption = False, after: AfterOption = None, sweep: SweepOption = None,
        json: JsonOption = False, debug: DebugOption = False, **instead: Any,
    ) -> Action:  # fmt: skip
        from llmkit import commands

        changes = [*(overrides or []), *(set_ or [])]
        for option, value in instead.items():
            if value is not None:
                return lambda: commands.instead(stage, recipe, changes, option, value)
        return lambda: commands.stage(
            stage,
            recipe,
            changes,
            launcher=launcher,
            output_dir=output_dir,
            resume=resume,
            dry_run=dry_run,
            debug=debug,
            profile=profile,
            wait=wait,
            after=after or (),
            sweep=sweep or (),
        )

    return _with_options(command, INSTEAD.get(stage, {}))


def _with_options(command: Callable[..., Action], options: Mapping[str, Any]) -> Callable[..., Action]:
    """The command with ``options`` in the place of its ``**instead``, as typer reads them."""
    known = inspect.signature(command, eval_str=True)
    plain = [p for p in known.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    more = [
        inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=a) for n, a in options.items()
    ]
    setattr(command, "__signature__", known.replace(parameters=[*plain, *more]))  # noqa: B010  mypy knows no such name
    command.__annotations__ = {p.name: p.annotation for p in [*plain, *more]} | {"return": Action}
    return command


def run(
    recipe: Annotated[
        str, typer.Argument(metavar="OUTPUT/recipe.yaml", help="The frozen recipe of a run.", show_default=False)
    ],
    resume: ResumeOption = "auto",
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> Action:
    """Start or resume a run from its own folder.

    This is what a launcher starts on another machine; the folder may have been moved.

    Example:

      llmkit run runs/mine/recipe.yaml
    """
    from llmkit import commands

    return lambda: commands.run_frozen(recipe, resume=resume, dry_run=dry_run, debug=debug)


def plan(
    recipe: RecipeArg,
    overrides: Overrides = None,
    set_: SetOption = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="h100-80g, a100-40g, l4, t4, … (docs/memory.md), cpu, or this machine's when left "
                     "out.", show_default=False),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Processes, one a device; the recipe's own when left out.",
                     show_default=False),
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option(metavar="STAGE", help="The stage of the recipe, where its folder and keys do not tell.",
                     show_default=False),
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> Action:  # fmt: skip
    """Say whether a run fits, how long it takes and what it costs.

    Loads no weights. Exit code 5 when the recipe as it stands does not fit.

    Example:

      llmkit plan recipe.yaml --device a100-40g --processes 4
    """
    from llmkit import commands

    changes = [*(overrides or []), *(set_ or [])]
    return lambda: commands.plan(recipe, changes, stage=stage, device=device, processes=processes)


def init(
    stage: Annotated[str, typer.Argument(metavar="STAGE", help=f"One of {', '.join(STAGES)}.", show_default=False)],
    output: Annotated[
        str | None, typer.Option(metavar="FILE", help="File to write instead of stdout.", show_default=False)
    ] = None,
    debug: DebugOption = False,
) -> Action:
    """Write a commented recipe to start from.

    Example:

      llmkit init sft --output recipe.yaml
    """
    from llmkit import commands

    return lambda: commands.init(stage, output)


def doctor(json: JsonOption = False, debug: DebugOption = False) -> Action:
    """Say what this machine has and what is missing.

    Example:

      llmkit doctor
    """

    def action() -> Reply:
        from llmkit import doctor as checks

        report = checks.examine()
        return Reply(checks.as_text(report), report)

    return action


def export_schema(
    stage: Annotated[
        str | None, typer.Argument(metavar="STAGE", help="One stage; all of them when left out.", show_default=False)
    ] = None,
    debug: DebugOption = False,
) -> Action:
    """Print the JSON schema of the recipes.

    With it an editor completes and checks recipes.

    Example:

      llmkit export-schema sft > sft.schema.json
    """
    from llmkit import commands

    return lambda: commands.export_schema(stage)


def chat(
    model: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="A run's output folder, or a model's.", show_default=False)
    ],
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Answer this and leave.", show_default=False)
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="System message; the run's own (data.system) when left out.", show_default=False
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    debug: DebugOption = False,
) -> Action:
    """Talk to a trained model in the terminal. Without a terminal each line of stdin is a question of its own.

    Example:

      llmkit chat runs/mine --prompt "What is a list comprehension?"
    """

    from llmkit import commands

    return lambda: commands.chat(
        model, prompt=prompt, system=system, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
    )


def merge(
    run: RunArg,
    output: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder of the merged model; RUN/merged when left out.",
                                 show_default=False)
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> Action:  # fmt: skip
    """Merge a run's adapter into its base model.

    The merged model's logits are compared with the unmerged one's.

    Example:

      llmkit merge runs/mine --output models/mine
    """
    from llmkit import commands

    return lambda: commands.merge(run, output)


def export_weights(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Folder of a checkpoint, RUN/checkpoints/checkpoint-N.",
                            show_default=False)
    ],
    output: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder of the result; RUN/model-N or RUN/adapter-N when left out.",
                                 show_default=False)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="float32|bfloat16|float16", help="Type of the weights; that of the recipe when "
                                 "left out.", show_default=False)
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> Action:  # fmt: skip
    """Make a model or an adapter of a checkpoint that DeepSpeed or FSDP divided.

    The result is opened again and compared before it gets its name.

    Example:

      llmkit export-weights runs/mine/checkpoints/checkpoint-500
    """
    from llmkit import commands

    return lambda: commands.export_weights(checkpoint, output, dtype)


def sync(run: RunArg, json: JsonOption = False, debug: DebugOption = False) -> Action:
    """Send the metrics that a tracking server missed.

    They wait in the run's folder when the server is away.

    Example:

      llmkit sync runs/mine
    """
    from llmkit import commands

    return lambda: commands.sync(run)


def _jobs_app() -> typer.Typer:
    """``llmkit jobs``: the same five verbs for every launcher."""
    jobs = typer.Typer(
        help="Look after jobs that were submitted to a scheduler.", no_args_is_help=True, rich_markup_mode=None
    )

    @jobs.command("list")
    def list_(
        folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Where the runs' folders are.")] = "runs",
        json: JsonOption = False,
        debug: DebugOption = False,
    ) -> Action:
        """List the jobs of the runs in a folder, with their states.

        Example:

          llmkit jobs list
        """
        from llmkit import jobs

        return lambda: jobs.listing(folder)

    @jobs.command()
    def status(job: JobArg, json: JsonOption = False, debug: DebugOption = False) -> Action:
        """Say how a job stands: queued, running, done, failed, cancelled, timed out or preempted.

        Example:

          llmkit jobs status runs/mine
        """
        from llmkit import jobs

        return lambda: jobs.status(job)

    @jobs.command()
    def logs(
        job: JobArg,
        follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the job ends.")] = False,
        debug: DebugOption = False,
    ) -> Action:
        """Print what a job has written.

        Example:

          llmkit jobs logs runs/mine -f
        """
        from llmkit import jobs

        return lambda: jobs.logs(job, follow=follow)

    @jobs.command()
    def cancel(job: JobArg, json: JsonOption = False, debug: DebugOption = False) -> Action:
        """Take a job out of the queue, or end it. What it saved stays; the same command submits it again.

        Example:

          llmkit jobs cancel runs/mine
        """
        from llmkit import jobs

        return lambda: jobs.cancel(job)

    @jobs.command()
    def wait(job: JobArg, json: JsonOption = False, debug: DebugOption = False) -> Action:
        """Wait for the end of a job, and end with its run's exit code.

        Example:

          llmkit jobs wait runs/mine
        """
        from llmkit import jobs

        return lambda: jobs.wait(job)

    return jobs


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; gives back the exit code."""
    ranks.follow_launcher()
    if argv is None:
        launch.PROGRAM = _program()
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    as_json, debug = "--json" in options, "--debug" in options
    with _stdout(as_json) as out:
        try:
            reply = _call(arguments)
            _answer(reply, out, as_json=as_json)
            return reply.exit_code
        except BrokenPipeError:
            # Whoever read the output has left (`| head`); the interpreter must not flush into the pipe again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except BaseException as exc:  # noqa: BLE001  the one place that knows what every exception means
            return _fail(exc, out, as_json=as_json, debug=debug)


def _program() -> list[str]:
    """What this process was started with, less the arguments: ``python -m llmkit``, or a script."""
    spec = sys.modules["__main__"].__spec__
    if spec is not None:
        return [sys.executable, "-m", spec.parent or spec.name]
    return [sys.executable, str(Path(sys.argv[0]).absolute())]


def _call(arguments: list[str]) -> Reply:
    """Parse, then act. ``--help``, ``--version`` and completion answer by themselves."""
    action = build_app()(arguments, standalone_mode=False, prog_name="llmkit")
    if callable(action):
        reply: Reply = action()
        return reply
    return Reply(exit_code=action if isinstance(action, int) else 0)


def _answer(reply: Reply, out: TextIO, *, as_json: bool) -> None:
    if as_json:
        import json

        print(json.dumps(reply.data, ensure_ascii=False, indent=2, default=str), file=out, flush=True)
    elif reply.text:
        print(reply.text.rstrip("\n"), file=out, flush=True)


def _fail(exc: BaseException, out: TextIO, *, as_json: bool, debug: bool) -> int:
    message, code = _explain(exc)
    told = ranks.tell_launcher(ranks.Report(_kind(exc), message, code)) and ranks.Ranks.from_environment().is_main
    if debug and not isinstance(exc, TyperException):
        traceback.print_exception(exc)
    if message and not told:
        print(f"llmkit: {message}" if "\n" not in message else message, file=sys.stderr, flush=True)
    if as_json and not (isinstance(exc, SystemExit) and code == 0):
        numbers = {"metrics": exc.metrics, "artifacts": exc.artifacts} if isinstance(exc, GateError) else {}
        _answer(Reply(data={"error": message, "exit_code": code, **numbers}), out, as_json=True)
    return code


def _kind(exc: BaseException) -> str:
    """The class of ``llmkit.errors`` that ``exc`` amounts to, by name."""
    from llmkit.faults import translate

    known = translate(exc)
    return type(known).__name__ if known is not None else "LlmkitError"


def _explain(exc: BaseException) -> tuple[str, int]:
    """Message for stderr and exit code."""
    from llmkit.faults import EXIT_BUG, EXIT_INTERRUPTED, describe_bug, translate

    if isinstance(exc, TyperException):
        usage = getattr(exc, "ctx", None)
        hint = f"\nSee: {usage.command_path} --help" if usage is not None else ""
        return exc.format_message() + hint, 2
    if isinstance(exc, KeyboardInterrupt | Abort):
        return "interrupted", EXIT_INTERRUPTED
    if isinstance(exc, SystemExit):
        return "", exc.code if isinstance(exc.code, int) else EXIT_BUG if exc.code else 0
    known = translate(exc)
    if known is not None:
        return str(known), known.exit_code
    return describe_bug(exc), EXIT_BUG


@contextmanager
def _stdout(as_json: bool) -> Iterator[TextIO]:
    """Where the answer goes. With ``--json`` everything else that is written to stdout, also by C code and by child
    processes, goes to stderr until the end."""
    if not as_json:
        yield sys.stdout
        return
    sys.stdout.flush()
    real, python_stdout = os.dup(1), sys.stdout
    try:
        with os.fdopen(os.dup(real), "w", encoding="utf-8") as out:
            os.dup2(2, 1)
            sys.stdout = sys.stderr
            yield out
    finally:
        sys.stdout = python_stdout
        os.dup2(real, 1)
        os.close(real)
