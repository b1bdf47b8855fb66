"""`trainer report`: runs as one HTML page, written once or served while they train."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final

from trainer.commands.status import describe_run
from trainer.errors import UserError
from trainer.files import write_atomically
from trainer.jobs.logs import is_live
from trainer.report.page import page, report_data
from trainer.report.run_report import RunReporter, Standing
from trainer.report.server import serve
from trainer.run.console import tell
from trainer.run.directory import RunDir
from trainer.run.find import find_run

FILE: Final = "report.html"


def report(arguments: argparse.Namespace) -> int:
    """Write the page of the runs, or serve it until Ctrl-C."""
    runs = {run.root.resolve(): run for run in map(find_run, arguments.targets)}  # named twice, shown once
    reporters = [RunReporter(run, standing) for run in runs.values()]
    if arguments.serve:
        if arguments.out is not None:
            raise UserError("--serve writes no file: leave out --out")
        serve(reporters, arguments.port)
        return 0
    if arguments.port:
        raise UserError("--port needs --serve")
    file = Path(arguments.out or FILE)
    reports = [reporter.read() for reporter in reporters]
    text = page(report_data(reports, [reporter.run.read_plan() for reporter in reporters]))
    try:
        write_atomically(file, text)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}. Name another file with --out.") from None
    for each in reports:
        for note in each.notes:
            tell(f"{each.root}: {note}")
    sys.stdout.write(f"page: {file} ({len(text.encode()) / 1e6:.1f} MB)\n")
    return 0


def standing(run: RunDir) -> Standing:
    """How a run stands, as `trainer status` says it."""
    status = describe_run(run)
    return Standing(status.state, is_live(run), status.message, status.phase, status.seconds_left)
