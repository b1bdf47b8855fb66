"""The command line: check, train, status, shapes, rollouts, verify-resume, export, and jobs. Imports no torch."""

from __future__ import annotations

import argparse
import sys

from trainer.errors import EXIT_FAILED, EXIT_USER, TrainerError


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except TrainerError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except BrokenPipeError:
        return EXIT_FAILED
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return EXIT_USER


def _parser() -> argparse.ArgumentParser:
    from trainer import __version__

    parser = argparse.ArgumentParser(prog="trainer", description="Fine-tuning from one recipe.")
    parser.add_argument("--version", action="version", version=f"tunesmith {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    check = commands.add_parser("check", help="validate a recipe, resolve it on a shape, estimate memory")
    _recipe_arguments(check)
    check.add_argument("--json", action="store_true", help="print the plan as one JSON document")
    check.add_argument("--data", action="store_true", help="show the first rows as tokens, coloured by what is trained")
    check.add_argument("--rewards", action="store_true", help="try the rewards on gold answers and on garbage")
    check.add_argument("--memory", action="store_true", help="measure a step of the model without its weights")
    check.add_argument("--html", default="preview.html", metavar="FILE", help="where --data writes its page")
    check.add_argument("--row", type=int, action="append", default=[], metavar="LINE", help="--data: show this row")
    check.add_argument("--find", metavar="TEXT", help="--data: show rows with this text")
    check.set_defaults(run=_check)

    train = commands.add_parser("train", help="train, or go on with a run; the same command again resumes")
    _recipe_arguments(train)
    train.add_argument("--name", help="run name; the recipe's own when left out")
    train.add_argument("--resubmitted", action="store_true", help=argparse.SUPPRESS)
    train.set_defaults(run=_train)

    status = commands.add_parser("status", help="state, step, rate, time left, last metrics of a run")
    status.add_argument("target", metavar="RUN", help="run directory or name")
    status.add_argument("--follow", action="store_true", help="until the run ends")
    status.add_argument("--json", action="store_true", help="print one JSON document")
    status.set_defaults(run=_status)

    shapes = commands.add_parser("shapes", help="the training shapes; with a recipe, which it fits and why not")
    shapes.add_argument("recipe", nargs="?", metavar="RECIPE")
    shapes.set_defaults(run=_shapes)

    rollouts = commands.add_parser("rollouts", help="what the policy answered in a step, and what it earned")
    rollouts.add_argument("target", metavar="RUN", help="run directory or name")
    rollouts.add_argument("--step", type=int, help="the step that learned from them; the last when left out")
    rollouts.add_argument("--groups", type=int, default=4, metavar="N", help="how many prompts to show")
    rollouts.add_argument("--json", action="store_true", help="print one JSON document")
    rollouts.set_defaults(run=_rollouts)

    verify = commands.add_parser("verify-resume", help="run a recipe whole and again with kills: are they equal?")
    _recipe_arguments(verify)
    verify.add_argument("--kills", type=int, default=3, metavar="N", help="how often it is killed")
    verify.add_argument("--steps", type=int, metavar="N", help="length of both runs; the recipe's own when left out")
    verify.add_argument("--signal", choices=("KILL", "TERM"), default="KILL", help="how it is killed")
    verify.add_argument("--seed", type=int, default=0, metavar="S", help="of the moments")
    verify.add_argument("--json", action="store_true", help="print the certificate as one JSON document")
    verify.set_defaults(run=_verify_resume)

    export = commands.add_parser("export", help="write a merged model of a finished run, and verify it")
    export.add_argument("target", metavar="RUN", help="run directory or name")
    export.add_argument("--merge", action="store_true", help="merge the adapter into a copy of the base model")
    export.add_argument("--best", action="store_true", help="the best held-out weights, not the last")
    export.add_argument("--out", metavar="DIR", help="where to; RUN/merged when left out")
    export.set_defaults(run=_export)
    _job_commands(commands)
    return parser


def _job_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    submit = commands.add_parser("submit", help="start a run and leave; prints its job id")
    _recipe_arguments(submit)
    submit.add_argument("--name", help="run name; the recipe's own when left out")
    submit.add_argument("--launcher", choices=["local", "slurm"], default="local", help="this machine, or Slurm")
    submit.add_argument("--partition", help="of Slurm")
    submit.add_argument("--time", help="Slurm's time limit; the run goes on after it")
    submit.add_argument("--slurm", action="append", default=[], metavar="KEY=VALUE", help="another option of sbatch")
    submit.add_argument("--print", action="store_true", help="print the batch script and submit nothing")
    submit.set_defaults(run=_submit)

    jobs = commands.add_parser("jobs", help="submitted runs and their states")
    jobs.add_argument("--json", action="store_true", help="print one JSON document")
    jobs.set_defaults(run=_jobs)

    cancel = commands.add_parser("cancel", help="let a run save and end; nobody starts it again but you")
    cancel.add_argument("job", metavar="JOB", help="job id, run directory or name")
    cancel.set_defaults(run=_cancel)

    reconnect = commands.add_parser("reconnect", help="join a run, or resume it and wait for its first step")
    reconnect.add_argument("job", metavar="JOB", help="job id, run directory or name")
    reconnect.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="how long to wait")
    reconnect.set_defaults(run=_reconnect)


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe; `train` takes a run directory too")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a field")
    parser.add_argument("--shape", metavar="NAME", help="training shape")


def _check(arguments: argparse.Namespace) -> int:
    from trainer.commands.check import check

    return check(arguments)


def _train(arguments: argparse.Namespace) -> int:
    from trainer.commands.train import train

    return train(arguments)


def _status(arguments: argparse.Namespace) -> int:
    from trainer.commands.status import status

    return status(arguments)


def _shapes(arguments: argparse.Namespace) -> int:
    from trainer.commands.check import shapes

    return shapes(arguments)


def _rollouts(arguments: argparse.Namespace) -> int:
    from trainer.commands.rollouts import rollouts

    return rollouts(arguments)


def _verify_resume(arguments: argparse.Namespace) -> int:
    from trainer.commands.verify import verify_resume

    return verify_resume(arguments)


def _export(arguments: argparse.Namespace) -> int:
    from trainer.commands.train import export

    return export(arguments)


def _submit(arguments: argparse.Namespace) -> int:
    from trainer.commands.jobs import submit

    return submit(arguments)


def _jobs(arguments: argparse.Namespace) -> int:
    from trainer.commands.jobs import list_jobs

    return list_jobs(arguments)


def _cancel(arguments: argparse.Namespace) -> int:
    from trainer.commands.jobs import cancel

    return cancel(arguments)


def _reconnect(arguments: argparse.Namespace) -> int:
    from trainer.commands.jobs import reconnect

    return reconnect(arguments)


if __name__ == "__main__":
    sys.exit(main())
