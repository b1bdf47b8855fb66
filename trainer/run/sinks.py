"""Copies of metrics.jsonl for TensorBoard, trackio and MLflow, rebuilt from it at each start. No torch.

metrics.jsonl is the truth. A sink is built again from its records whenever an attempt begins, and then gets each step
after it was written there. So after any number of kills it has each step exactly once, with the values that count.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, Protocol, final

from trainer.config.recipe import LoggingSettings
from trainer.files import write_atomically
from trainer.run.directory import SINKS_FILE, RunDir
from trainer.run.metrics_reader import Record

SinkName = Literal["tensorboard", "trackio", "mlflow"]
TAG: Final = "tunesmith.run"
SUFFIX: Final = ".tunesmith"
"""Ends the names of event files that we may replace."""


class Sink(Protocol):
    """Somewhere that metrics are copied to."""

    def rebuild(self, records: Sequence[Record]) -> None:
        """Hold these records and no others."""

    def add(self, record: Record) -> None:
        """Hold one more record, of a later step."""

    def close(self, exit_code: int) -> None:
        """Write what is pending; the attempt ended with this code."""


@final
class TensorBoardSink:
    """One event file in RUN/tensorboard."""

    def __init__(self, run: RunDir) -> None:
        """Load the package; nothing is written yet.

        Args:
            run: whose metrics are copied.

        Raises:
            ImportError: the package is missing.
        """
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._make, self._directory = EventFileWriter, run.tensorboard
        self._writer: Any = None

    def rebuild(self, records: Sequence[Record]) -> None:
        """Write a new event file, and remove those of earlier attempts."""
        self.close(0)
        old = list(self._directory.glob(f"events.out.tfevents.*{SUFFIX}"))
        # the file's name has the second and a counter of the process: a process id keeps two attempts apart
        self._writer = self._make(str(self._directory), filename_suffix=f".{os.getpid()}{SUFFIX}")
        for record in records:
            self._write(record)
        self._writer.flush()
        for file in old:
            file.unlink(missing_ok=True)

    def add(self, record: Record) -> None:
        """Append a step, and hand it to the operating system, so that a killed process loses nothing."""
        self._write(record)
        self._writer.flush()

    def _write(self, record: Record) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers(record).items()]
        moment = record.get("time", time.time())
        self._writer.add_event(Event(wall_time=moment, step=record["step"], summary=Summary(value=values)))

    def close(self, exit_code: int) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


@final
class TrackioSink:
    """One run of trackio's local database."""

    def __init__(self, run: RunDir, project: str) -> None:
        """Load the package; nothing is written yet.

        Args:
            run: whose metrics are copied; trackio's run has its name.
            project: of trackio.

        Raises:
            ImportError: the package is missing.
        """
        from trackio.sqlite_storage import SQLiteStorage

        self._storage, self._project, self._name = SQLiteStorage, project, run.name

    def rebuild(self, records: Sequence[Record]) -> None:
        """Replace the run of this name."""
        self._storage.init_db(self._project)
        self._storage.delete_run(self._project, self._name)
        self._write(records)

    def add(self, record: Record) -> None:
        """Write a step in one transaction. trackio's own client would queue it, and lose it with the process."""
        self._write([record])

    def _write(self, records: Sequence[Record]) -> None:
        if not records:
            return
        moments = (datetime.fromtimestamp(record.get("time", time.time()), UTC).isoformat() for record in records)
        self._storage.bulk_log(
            self._project,
            self._name,
            [numbers(record) for record in records],
            steps=[record["step"] for record in records],
            timestamps=list(moments),
        )

    def close(self, exit_code: int) -> None:
        """Nothing is pending."""


@final
class MlflowSink:
    """One run of an MLflow server or database, known by a tag; each rebuild makes a new one and deletes the old one.

    MLflow keeps the history of a metric for ever, so a step that is made again would be in it twice.
    """

    def __init__(self, run: RunDir, project: str, uri: str | None) -> None:
        """Load the package; nothing is written yet.

        Args:
            run: whose metrics are copied; MLflow's run has its name, and its directory as a tag.
            project: MLflow's experiment.
            uri: where MLflow keeps runs; None is MLflow's own default.

        Raises:
            ImportError: the package is missing.
        """
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        self._client, self._metric = MlflowClient(tracking_uri=uri), Metric
        self._project, self._name, self._place = project, run.name, str(run.root.resolve())
        self._id = ""

    def rebuild(self, records: Sequence[Record]) -> None:
        """Log all records to a new run, then delete those of earlier attempts."""
        known = self._client.get_experiment_by_name(self._project)
        experiment = known.experiment_id if known is not None else self._client.create_experiment(self._project)
        quoted = self._place.replace("'", "\\'")
        old = self._client.search_runs([experiment], f"tags.`{TAG}` = '{quoted}'")
        made = self._client.create_run(experiment, run_name=self._name, tags={TAG: self._place})
        self._id = made.info.run_id
        for record in records:
            self.add(record)
        for each in old:
            self._client.delete_run(each.info.run_id)

    def add(self, record: Record) -> None:
        """Log a step in one request."""
        moment = round(1000 * record.get("time", time.time()))
        values = numbers(record).items()
        self._client.log_batch(
            self._id, metrics=[self._metric(name, value, moment, record["step"]) for name, value in values]
        )

    def close(self, exit_code: int) -> None:
        """End the run."""
        if self._id:
            self._client.set_terminated(self._id, "FINISHED" if exit_code == 0 else "FAILED")


@final
class Sinks:
    """The sinks of a run; one that fails is said once, left out, and never stops the training."""

    def __init__(
        self, run: RunDir, names: Iterable[SinkName], logging: LoggingSettings, say: Callable[[str], None]
    ) -> None:
        """Open the sinks.

        Args:
            run: whose metrics are copied.
            names: which sinks.
            logging: the recipe's settings of the sinks.
            say: prints a message to the user.
        """
        self._run, self._say = run, say
        self._names = list(names)
        self._step: int | None = None
        self._sinks: dict[SinkName, Sink] = {}
        self.problems: dict[str, str] = {}
        """Why a sink receives nothing more."""
        for name in self._names:
            try:
                self._sinks[name] = _opened(name, run, logging)
            except ImportError:
                self._lose(name, f"the package is missing: pip install 'tunesmith[{name}]'")
        self._note()

    def rebuild(self, records: Sequence[Record]) -> None:
        """Make every sink hold these records and no others."""
        self._each(lambda sink: sink.rebuild(records))
        self._step = records[-1]["step"] if records else None

    def add(self, record: Record) -> None:
        """Copy one more record, of a later step."""
        self._each(lambda sink: sink.add(record))
        self._step = record["step"]

    def close(self, exit_code: int) -> None:
        """Write what is pending; the attempt ended with this code."""
        self._each(lambda sink: sink.close(exit_code))

    def _each(self, act: Callable[[Sink], None]) -> None:
        for name, sink in list(self._sinks.items()):
            try:
                act(sink)
            except Exception as error:  # of a foreign package: any
                first_line = str(error).partition("\n")[0]
                self._lose(name, f"{type(error).__name__}: {first_line}")

    def _lose(self, name: SinkName, why: str) -> None:
        self._sinks.pop(name, None)
        self.problems[name] = why if self._step is None else f"after step {self._step}: {why}"
        self._note()
        self._say(
            f"warning: {name} receives nothing more ({why}); metrics.jsonl has everything, "
            f"`trainer sync {self._run.root} --to {name}` copies it"
        )

    def _note(self) -> None:
        """Write the problems for `trainer status`; those of other sinks stay. A failure is said and changes nothing."""
        problems: dict[str, str] = {
            name: why for name, why in sink_problems(self._run).items() if name not in self._names
        }
        problems.update(self.problems)
        try:
            if problems:
                write_atomically(sinks_file(self._run), json.dumps(problems) + "\n", durable=False)
            else:
                sinks_file(self._run).unlink(missing_ok=True)
        except OSError as error:
            self._say(f"warning: {sinks_file(self._run)}: not written: {error.strerror or error}")


def sinks_file(run: RunDir) -> Path:
    """Why a copy of the metrics receives nothing more, by its name; there only where one does not."""
    return run.root / SINKS_FILE


def sink_problems(run: RunDir) -> dict[str, str]:
    """Why copies of the metrics receive nothing more, by name; empty where all do, or nothing readable says so."""
    try:
        problems = json.loads(sinks_file(run).read_text())
    except (OSError, ValueError):
        return {}
    return {str(name): str(why) for name, why in problems.items()} if isinstance(problems, dict) else {}


def _opened(name: SinkName, run: RunDir, logging: LoggingSettings) -> Sink:
    match name:
        case "tensorboard":
            return TensorBoardSink(run)
        case "trackio":
            return TrackioSink(run, logging.wandb_project)
        case "mlflow":
            return MlflowSink(run, logging.wandb_project, logging.mlflow)


def wanted_sinks(logging: LoggingSettings) -> list[SinkName]:
    """The sinks that a recipe asks for."""
    wanted: dict[SinkName, bool] = {
        "tensorboard": logging.tensorboard,
        "trackio": logging.trackio,
        "mlflow": logging.mlflow is not None,
    }
    return [name for name, is_wanted in wanted.items() if is_wanted]


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The values of a step that can be drawn.

    >>> numbers({"step": 3, "time": 5.0, "train/loss": 0.5, "train/skipped_rows": ["a.jsonl:1"]})
    {'train/loss': 0.5}
    """
    found = {}
    for name, value in record.items():
        if name not in {"step", "time"} and isinstance(value, int | float):
            with suppress(OverflowError):
                found[name] = float(value)
    return found
