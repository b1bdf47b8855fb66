"""Opens the store: SQLite in a state directory, or PostgreSQL by URL; migrations; outages as one error."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, final

from sqlalchemy import Connection, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, NoSuchModuleError, OperationalError
from sqlalchemy.pool import NullPool

from trainer.errors import TrainerError, UserError

DEFAULT_STORE: Final = "sqlite:///runs/.control/store.sqlite"
"""URL of the store where neither `--store` nor TRAINER_STORE names another."""
CONNECT_S: Final = 2
"""How long PostgreSQL may take to accept a connection, and a statement to be answered."""
MIGRATION_LOCK: Final = 7305541
"""Advisory lock of PostgreSQL: one process migrates at a time."""


@final
class StoreDownError(TrainerError):
    """The store does not answer now; a retry may succeed."""


@final
class StoreError(UserError):
    """The store's URL, driver or schema must be changed."""


def store_url(given: str | None) -> str:
    """The URL that a command uses: its argument, then TRAINER_STORE, then the default."""
    return given or os.environ.get("TRAINER_STORE") or DEFAULT_STORE


@final
class Store:
    """Connections to one database. Safe to share between threads."""

    def __init__(self, url: str) -> None:
        """Prepare; nothing is opened yet.

        Args:
            url: of SQLAlchemy: `sqlite:///FILE` or `postgresql://USER@HOST/NAME`.

        Raises:
            StoreError: no such kind of database, or its driver is missing.
        """
        try:
            parsed = make_url(url)
        except ArgumentError:
            raise StoreError(f"--store {url!r}: write sqlite:///FILE or postgresql://USER@HOST/NAME") from None
        if parsed.get_backend_name() not in ("sqlite", "postgresql"):
            raise StoreError(f"--store {url!r}: the store is SQLite or PostgreSQL")
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        self.shown = parsed.render_as_string(hide_password=True)
        self.file: Path | None = None
        options: dict[str, Any] = {"pool_pre_ping": True}
        if self.is_sqlite:
            if not parsed.database or parsed.database == ":memory:":
                raise StoreError(f"--store {url!r}: name a file; a store in memory would be lost")
            self.file = Path(parsed.database)
            parsed = parsed.set(database=f"file:{self.file.resolve()}", query={"mode": "rw", "uri": "true"})
            options = {"poolclass": NullPool, "connect_args": {"timeout": 10.0}}
        else:
            if parsed.drivername == "postgresql":
                parsed = parsed.set(drivername="postgresql+psycopg")
            options["connect_args"] = {"connect_timeout": CONNECT_S, "options": f"-c statement_timeout={CONNECT_S}s"}
        try:
            self._engine = create_engine(parsed, **options)
        except NoSuchModuleError as error:
            raise StoreError(f"--store {self.shown}: {error}") from None
        except ModuleNotFoundError as error:
            raise StoreError(
                f"--store {self.shown} needs {error.name}: pip install 'tunesmith[accounts,postgres]'"
            ) from None
        if self.is_sqlite:
            event.listen(self._engine, "connect", _set_pragmas)
            event.listen(self._engine, "begin", _begin_immediate)

    def open(self) -> Store:
        """Create the database's tables, or bring them to this version; returns itself.

        Raises:
            StoreError: a newer version of this program wrote the store, or its directory cannot be used.
            StoreDownError: it does not answer.
        """
        if self.file is not None:
            self._make_file(self.file)
        self._migrate()
        return self

    def _make_file(self, file: Path) -> None:
        """Only the owner reads the directory and the file."""
        try:
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            raise StoreError(f"--store {self.shown}: {error.strerror}") from None

    def _migrate(self) -> None:
        from alembic import command
        from alembic.config import Config
        from alembic.script import ScriptDirectory

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        newest = ScriptDirectory.from_config(config).get_current_head()
        with self.write() as connection:
            if not self.is_sqlite:
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
            current = _revision(connection)
            if current == newest:
                return
            if current is not None and current > str(newest):
                raise StoreError(
                    f"{self.shown} has revision {current}, written by a newer tunesmith; this one knows {newest}: "
                    "upgrade tunesmith"
                )
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that may write; committed at the end of the block, undone by an error.

        Raises:
            StoreDownError: the database does not answer.
        """
        with self._outages(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads.

        Raises:
            StoreDownError: the database does not answer.
        """
        with self._outages(), self._engine.connect().execution_options(is_read=True) as connection:
            yield connection

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @contextmanager
    def _outages(self) -> Iterator[None]:
        try:
            yield
        except (OperationalError, InterfaceError) as error:
            raise StoreDownError(f"the store {self.shown} does not answer: {error.orig}") from None
        except DBAPIError as error:
            if error.connection_invalidated:
                raise StoreDownError(f"the store {self.shown} does not answer: {error.orig}") from None
            raise


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def _set_pragmas(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver begins no transactions: `_begin_immediate` does
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_immediate(connection: Connection) -> None:
    """One writer at a time from its first statement on: a chain of hashes is read and extended in one transaction."""
    is_read = connection.get_execution_options().get("is_read", False)
    connection.exec_driver_sql("BEGIN" if is_read else "BEGIN IMMEDIATE")
