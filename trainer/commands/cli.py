"""The command line `trainer`: parses arguments and runs one command. Imports no torch."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection
from contextlib import suppress
from typing import TYPE_CHECKING

from trainer.commands import dispatch
from trainer.commands.account_arguments import add_account_commands
from trainer.commands.deploy_arguments import add_deploy_command
from trainer.commands.help_text import SHELLS, add_help, print_completion
from trainer.commands.other_names import ALIASES, guess
from trainer.config.arguments import add_recipe_arguments
from trainer.config.foreign_names import TOOLS
from trainer.config.model_arguments import (
    add_batch_arguments,
    add_chat_arguments,
    add_eval_arguments,
    add_generate_arguments,
    add_serve_arguments,
)
from trainer.errors import EXIT_FAILED, EXIT_USER, TrainerError
from trainer.run.console import tell
from trainer.run.surroundings import complete_surroundings

if TYPE_CHECKING:
    _Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    complete_surroundings()
    argv = sys.argv[1:] if argv is None else list(argv)
    parser, names = _parser()
    if argv and not argv[0].startswith("-"):
        argv[0] = ALIASES.get(argv[0], argv[0])
        if argv[0] not in names:
            tell(f"trainer: no command `{argv[0]}`{guess(argv[0], names)}")
            return EXIT_USER
    arguments = parser.parse_args(argv)
    arguments.argv = argv
    try:
        code = int(arguments.run(arguments))
        sys.stdout.flush()
        return code
    except TrainerError as error:
        tell(str(error))
        return error.exit_code
    except BrokenPipeError:
        return _end_without_output()
    except OSError as error:  # a full disk, a directory that is read-only, ...
        tell(f"{error.filename or 'output'}: {error.strerror or error}")
        return _end_without_output()
    except KeyboardInterrupt:
        tell("interrupted")
        return EXIT_USER


def _end_without_output() -> int:
    """Drop what stdout still holds, so that Python does not complain about it at its end."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    return EXIT_FAILED


def _parser() -> tuple[argparse.ArgumentParser, Collection[str]]:
    """The parser, and the names of its commands."""
    from trainer import __version__

    parser = argparse.ArgumentParser(prog="trainer", description="Fine-tuning from one recipe.")
    parser.add_argument("--version", action="version", version=f"tunesmith {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _training_commands(commands)
    _run_commands(commands)
    _model_commands(commands)
    add_account_commands(commands)
    add_deploy_command(commands)
    _job_commands(commands)
    _machine_commands(commands)
    add_help(commands.choices)
    return parser, commands.choices.keys()


def _training_commands(commands: _Commands) -> None:
    """Commands that write or take a recipe."""
    begin = commands.add_parser("init", help="write a recipe for your rows: five questions, or flags")
    begin.add_argument("--quickstart", action="store_true", help="write the shipped recipes and rows, make their model")
    begin.add_argument("--method", metavar="METHOD", help="sft or rft")
    begin.add_argument("--model", metavar="MODEL", help="directory or hub name (owner/name)")
    begin.add_argument("--data", metavar="FILE", help="your rows")
    begin.add_argument("--optimize", metavar="WHAT", help="sft: all or last turns; rft: a reward")
    begin.add_argument("--shape", metavar="NAME", help="where it runs: auto, cpu, or a training shape")
    begin.add_argument("--name", metavar="NAME", help="name of the run; from the rows' file when left out")
    begin.add_argument("--out", metavar="FILE", help="the recipe; NAME.yaml when left out")
    begin.add_argument("--force", action="store_true", help="replace an existing recipe")
    begin.add_argument("--yes", action="store_true", help="ask nothing: defaults for what no flag says")
    begin.set_defaults(run=dispatch.init)

    other = commands.add_parser("import-config", help="translate a configuration of Axolotl, LLaMA-Factory or TRL")
    other.add_argument("config", metavar="FILE", help="YAML of the other tool")
    other.add_argument("--from", dest="tool", choices=TOOLS, help="which tool; by its fields when left out")
    other.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs that it was written for")
    other.add_argument("--out", metavar="RECIPE", help="recipe to write; standard output when left out")
    other.add_argument("--force", action="store_true", help="replace an existing recipe")
    other.set_defaults(run=dispatch.import_config)

    check = commands.add_parser("check", help="validate a recipe, resolve it on a shape, estimate memory")
    add_recipe_arguments(check)
    check.add_argument("--json", action="store_true", help="print the plan as one JSON document")
    check.add_argument("--values", action="store_true", help="print every resolved value with its origin")
    check.add_argument("--data", action="store_true", help="show the first rows as tokens, trained ones coloured")
    check.add_argument("--rewards", action="store_true", help="try the rewards on gold answers and on garbage")
    check.add_argument("--cost", action="store_true", help="predict the time of a step on a GPU shape, by parts")
    check.add_argument("--memory", action="store_true", help="measure the memory of one training step without weights")
    check.add_argument("--html", default="preview.html", metavar="FILE", help="where --data writes its page")
    check.add_argument("--row", type=int, action="append", default=[], metavar="LINE", help="--data: show this row")
    check.add_argument("--find", metavar="TEXT", help="--data: show rows that contain this text")
    check.set_defaults(run=dispatch.check)

    train = commands.add_parser("train", help="train; the same command again resumes the run")
    add_recipe_arguments(train, "path of the recipe, or a run directory")
    _name_argument(train)
    train.add_argument("--resubmitted", action="store_true", help=argparse.SUPPRESS)
    train.set_defaults(run=dispatch.train)

    shapes = commands.add_parser("shapes", help="list the training shapes; with a recipe, which of them it fits")
    shapes.add_argument("recipe", nargs="?", metavar="RECIPE", help="path of a recipe")
    shapes.add_argument("--print", metavar="NAME", help="print a shape as YAML, to copy and change it")
    shapes.set_defaults(run=dispatch.shapes)

    verify = commands.add_parser("verify-resume", help="prove that an interrupted run equals an undisturbed one")
    add_recipe_arguments(verify)
    verify.add_argument("--kills", type=int, default=3, metavar="N", help="number of interruptions")
    verify.add_argument("--steps", type=int, metavar="N", help="length of both runs; the recipe's when left out")
    verify.add_argument("--signal", choices=("KILL", "TERM"), default="KILL", help="signal of an interruption")
    verify.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the moments of interruption")
    verify.add_argument("--json", action="store_true", help="print the certificate as one JSON document")
    verify.set_defaults(run=dispatch.verify_resume)


def _run_commands(commands: _Commands) -> None:
    """Commands that take an existing run."""
    status = commands.add_parser("status", help="state, step, rate, time left, last metrics of a run")
    _run_argument(status)
    status.add_argument("--follow", action="store_true", help="show progress until the run ends")
    status.add_argument("--json", action="store_true", help="print one JSON document")
    status.set_defaults(run=dispatch.status)

    rollouts = commands.add_parser("rollouts", help="what the policy answered in a step, and its rewards")
    _run_argument(rollouts)
    rollouts.add_argument("--step", type=int, help="the step trained on them; the newest when left out")
    rollouts.add_argument("--groups", type=int, default=4, metavar="N", help="number of prompts to show")
    rollouts.add_argument("--full", action="store_true", help="show whole prompts and completions")
    rollouts.add_argument("--refused", action="store_true", help="show rollouts that a failing reward made unusable")
    rollouts.add_argument("--json", action="store_true", help="print one JSON document")
    rollouts.set_defaults(run=dispatch.rollouts)

    report = commands.add_parser("report", help="write runs as one HTML page: curves, rollouts, what happened")
    report.add_argument("targets", nargs="+", metavar="RUN", help="run directories or names; several are overlaid")
    report.add_argument("--out", metavar="FILE", help="where the page is written; report.html when left out")
    report.add_argument("--serve", action="store_true", help="serve a page that follows the runs, on this machine only")
    report.add_argument("--port", type=int, default=0, metavar="N", help="--serve: port; a free one when left out")
    report.set_defaults(run=dispatch.report)

    runs = commands.add_parser("runs", help="list every run: state, method, model, step, best value")
    runs.add_argument("--json", action="store_true", help="print one JSON document")
    runs.add_argument("--prometheus", action="store_true", help="last metrics of each run, for a textfile collector")
    runs.set_defaults(run=dispatch.runs)

    diff = commands.add_parser("diff", help="compare two runs: settings, results, held-out prompts one by one")
    diff.add_argument("first", metavar="RUN", help="run directory or name")
    diff.add_argument("second", metavar="RUN", help="run directory or name")
    diff.add_argument("--json", action="store_true", help="print one JSON document")
    diff.set_defaults(run=dispatch.diff)

    logs = commands.add_parser("logs", help="print what the newest attempt of a run printed")
    _run_argument(logs)
    logs.add_argument("--attempt", type=int, metavar="N", help="another attempt, from 1")
    logs.add_argument("--lines", type=int, metavar="N", help="only the last lines")
    logs.add_argument("--follow", action="store_true", help="go on, through restarts, until the run ends")
    logs.set_defaults(run=dispatch.logs)

    delete = commands.add_parser("delete", help="delete runs with their checkpoints and weights")
    delete.add_argument("targets", nargs="+", metavar="RUN", help="run directories or names")
    delete.add_argument("--yes", action="store_true", help="do not ask")
    delete.set_defaults(run=dispatch.delete)

    sync = commands.add_parser("sync", help="send all metrics of a run to W&B, TensorBoard, trackio or MLflow")
    _run_argument(sync)
    sync.add_argument("--to", choices=("wandb", "tensorboard", "trackio", "mlflow"), default="wandb", help="where to")
    sync.set_defaults(run=dispatch.sync)

    export = commands.add_parser("export", help="write a model from a run, verify it, upload it")
    _run_argument(export)
    _export_arguments(export)
    export.set_defaults(run=dispatch.export)


def _export_arguments(export: argparse.ArgumentParser) -> None:
    """What `trainer export` writes, and where."""
    which = export.add_mutually_exclusive_group()
    which.add_argument("--best", action="store_true", help="use the weights of the best held-out value, not the last")
    which.add_argument("--checkpoint", type=int, metavar="STEP", help="use the weights of this checkpoint")
    export.add_argument("--merge", action="store_true", help="merge the adapter into a copy of the base model")
    export.add_argument("--gguf", choices=("bf16", "f16", "q8_0"), help="write one GGUF file, for llama.cpp and Ollama")
    export.add_argument("--converter", metavar="PATH", help="--gguf: converter of llama.cpp, for other model families")
    export.add_argument("--ollama", action="store_true", help="--gguf: also write a Modelfile for `ollama create`")
    export.add_argument("--intended-use", metavar="TEXT", help="what the model card says about the intended use")
    export.add_argument("--push", metavar="OWNER/NAME", help="upload the export to this repository of the hub")
    export.add_argument("--public", action="store_true", help="--push: make a new repository public, not private")
    export.add_argument("--out", metavar="DIR", help="output directory; RUN/export, merged or gguf when left out")


def _model_commands(commands: _Commands) -> None:
    """Commands that load a trained model."""
    chat = commands.add_parser("chat", help="talk to a run or a model; --against puts another one beside it")
    add_chat_arguments(chat)
    chat.set_defaults(run=dispatch.use_model)

    generate = commands.add_parser("generate", help="answer a file of prompts")
    add_generate_arguments(generate)
    generate.set_defaults(run=dispatch.use_model)

    evaluate = commands.add_parser("eval", help="held-out loss and rewards, compared with the base row by row")
    add_eval_arguments(evaluate)
    evaluate.set_defaults(run=dispatch.use_model)

    serve = commands.add_parser("serve", help="answer OpenAI's API with a run or a model, and many adapters")
    add_serve_arguments(serve)
    serve.set_defaults(run=dispatch.serve)

    batch = commands.add_parser("batch", help="answer a file of requests in OpenAI's batch format")
    add_batch_arguments(batch)
    batch.set_defaults(run=dispatch.serve)


def _job_commands(commands: _Commands) -> None:
    """Commands for runs in the background."""
    submit = commands.add_parser("submit", help="start a run in the background; prints its job id")
    add_recipe_arguments(submit)
    _name_argument(submit)
    launchers = ["local", "slurm", "sky", "k8s"]
    submit.add_argument("--launcher", choices=launchers, default="local", help="this machine, Slurm, or elsewhere")
    submit.add_argument("--partition", help="Slurm partition")
    submit.add_argument("--time", help="Slurm time limit; the run is requeued after it")
    submit.add_argument("--slurm", action="append", default=[], metavar="KEY=VALUE", help="another option of sbatch")
    submit.add_argument(
        "--sky", action="append", default=[], metavar="KEY=VALUE", help="an option of the SkyPilot task"
    )
    submit.add_argument(
        "--k8s", action="append", default=[], metavar="KEY=VALUE", help="an option of the Kubernetes job"
    )
    submit.add_argument("--print", action="store_true", help="print batch script, task or job, and submit nothing")
    submit.set_defaults(run=dispatch.submit)

    jobs = commands.add_parser("jobs", help="list submitted runs and their states")
    jobs.add_argument("--json", action="store_true", help="print one JSON document")
    jobs.set_defaults(run=dispatch.jobs)

    cancel = commands.add_parser("cancel", help="let a run save and end; only you start it again")
    cancel.add_argument("job", metavar="JOB", help="job id, run directory or name")
    cancel.set_defaults(run=dispatch.cancel)

    reconnect = commands.add_parser("reconnect", help="join a run, or resume it and wait for its first step")
    reconnect.add_argument("job", metavar="JOB", help="job id, run directory or name")
    reconnect.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="longest time to wait")
    reconnect.set_defaults(run=dispatch.reconnect)


def _machine_commands(commands: _Commands) -> None:
    """Commands about this machine."""
    doctor = commands.add_parser("doctor", help="whether this machine can train: devices, versions, disk, hub")
    doctor.add_argument("--json", action="store_true", help="print one JSON document")
    doctor.set_defaults(run=dispatch.doctor)

    pages = commands.add_parser("docs", help="print a page of the documentation, or list them")
    pages.add_argument("page", nargs="?", metavar="PAGE", help="as messages name it: docs/data.md, or data")
    pages.set_defaults(run=dispatch.docs)

    completion = commands.add_parser("completion", help="print the completion script of a shell")
    completion.add_argument("shell", choices=SHELLS, help="bash, zsh or tcsh")
    completion.set_defaults(run=_completion)


def _name_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", help="name of the run; the recipe's when left out")
    parser.add_argument("--overwrite", action="store_true", help="move another run of this name to runs/NAME.old-N")


def _run_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="RUN", help="run directory or name")


def _completion(arguments: argparse.Namespace) -> int:
    return print_completion(_parser()[0], arguments.shell)


if __name__ == "__main__":
    sys.exit(main())
