"""Imports the module of a command when the command runs: `trainer --help` loads none of them. For cli.py only."""

from __future__ import annotations

import argparse


def init(arguments: argparse.Namespace) -> int:
    """Run `trainer init`."""
    from trainer.commands.init import init

    return init(arguments)


def import_config(arguments: argparse.Namespace) -> int:
    """Run `trainer import-config`."""
    from trainer.commands.import_config import import_config

    return import_config(arguments)


def check(arguments: argparse.Namespace) -> int:
    """Run `trainer check`."""
    from trainer.commands.check import check

    return check(arguments)


def train(arguments: argparse.Namespace) -> int:
    """Run `trainer train`."""
    from trainer.commands.train import train

    return train(arguments)


def status(arguments: argparse.Namespace) -> int:
    """Run `trainer status`."""
    from trainer.commands.status import status

    return status(arguments)


def shapes(arguments: argparse.Namespace) -> int:
    """Run `trainer shapes`."""
    from trainer.commands.check import shapes

    return shapes(arguments)


def rollouts(arguments: argparse.Namespace) -> int:
    """Run `trainer rollouts`."""
    from trainer.commands.rollouts import rollouts

    return rollouts(arguments)


def report(arguments: argparse.Namespace) -> int:
    """Run `trainer report`."""
    from trainer.commands.report import report

    return report(arguments)


def runs(arguments: argparse.Namespace) -> int:
    """Run `trainer runs`."""
    from trainer.commands.runs import list_runs

    return list_runs(arguments)


def diff(arguments: argparse.Namespace) -> int:
    """Run `trainer diff`."""
    from trainer.commands.diff import diff

    return diff(arguments)


def logs(arguments: argparse.Namespace) -> int:
    """Run `trainer logs`."""
    from trainer.commands.runs import logs

    return logs(arguments)


def delete(arguments: argparse.Namespace) -> int:
    """Run `trainer delete`."""
    from trainer.commands.runs import delete

    return delete(arguments)


def use_model(arguments: argparse.Namespace) -> int:
    """Run `trainer chat`, `generate` or `eval`."""
    from trainer.commands.inference import use_model

    return use_model(arguments.argv)


def serve(arguments: argparse.Namespace) -> int:
    """Run `trainer serve` or `batch`."""
    from trainer.commands.inference import serve

    return serve(arguments.argv)


def sync(arguments: argparse.Namespace) -> int:
    """Run `trainer sync`."""
    from trainer.commands.sync import sync

    return sync(arguments)


def verify_resume(arguments: argparse.Namespace) -> int:
    """Run `trainer verify-resume`."""
    from trainer.commands.verify import verify_resume

    return verify_resume(arguments)


def export(arguments: argparse.Namespace) -> int:
    """Run `trainer export`."""
    from trainer.commands.train import export

    return export(arguments)


def submit(arguments: argparse.Namespace) -> int:
    """Run `trainer submit`."""
    from trainer.commands.jobs import submit

    return submit(arguments)


def jobs(arguments: argparse.Namespace) -> int:
    """Run `trainer jobs`."""
    from trainer.commands.jobs import list_jobs

    return list_jobs(arguments)


def cancel(arguments: argparse.Namespace) -> int:
    """Run `trainer cancel`."""
    from trainer.commands.jobs import cancel

    return cancel(arguments)


def reconnect(arguments: argparse.Namespace) -> int:
    """Run `trainer reconnect`."""
    from trainer.commands.jobs import reconnect

    return reconnect(arguments)


def doctor(arguments: argparse.Namespace) -> int:
    """Run `trainer doctor`."""
    from trainer.commands.doctor import doctor

    return doctor(arguments)


def docs(arguments: argparse.Namespace) -> int:
    """Run `trainer docs`."""
    from trainer.commands.docs import docs

    return docs(arguments)


def account(arguments: argparse.Namespace) -> int:
    """Run `trainer account`."""
    from trainer.commands.accounts import account

    return account(arguments)


def keys(arguments: argparse.Namespace) -> int:
    """Run `trainer keys`."""
    from trainer.commands.accounts import keys

    return keys(arguments)


def quota(arguments: argparse.Namespace) -> int:
    """Run `trainer quota`."""
    from trainer.commands.accounts import quota

    return quota(arguments)


def usage(arguments: argparse.Namespace) -> int:
    """Run `trainer usage`."""
    from trainer.commands.accounts import usage

    return usage(arguments)


def audit(arguments: argparse.Namespace) -> int:
    """Run `trainer audit`."""
    from trainer.commands.accounts import audit

    return audit(arguments)


def deploy(arguments: argparse.Namespace) -> int:
    """Run `trainer deploy`."""
    from trainer.commands.deployments import deploy

    return deploy(arguments)
