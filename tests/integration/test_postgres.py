"""The store in a real PostgreSQL: migrations, the chain under concurrent writers, outage and return."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from project import Project, wait_for
from serving import serving
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from trainer.control import audit
from trainer.control.accounts import create_account
from trainer.control.audit import Actor
from trainer.control.store import Store, StoreDownError
from trainer.control.tables import METADATA
from trainer.control.usage import Used, add_usage, usage_by

pytestmark = pytest.mark.heavy
ACTOR = Actor("cli test")
PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))


@dataclass
class Postgres:
    """A server in a temporary directory, owned by a user who is not root."""

    data: Path
    port: int
    user: str
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"postgresql://{self.user}@127.0.0.1:{self.port}/postgres"

    def run(self, *words: str) -> subprocess.Popen[bytes]:
        is_root = os.getuid() == 0
        return subprocess.Popen(words, user=self.user if is_root else None, cwd="/", stdout=subprocess.DEVNULL)

    def start(self) -> None:
        program = str(PROGRAMS[-1])
        words = (program, "-D", str(self.data), "-p", str(self.port), "-k", str(self.data), "-h", "127.0.0.1", "-F")
        self.process = self.run(*words)
        ready = [str(PROGRAMS[-1].with_name("pg_isready")), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        wait_for(lambda: subprocess.run(ready, check=False).returncode == 0)

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGQUIT)  # at once, without waiting for clients
            self.process.wait(30)
            self.process = None


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    if not PROGRAMS:
        pytest.skip("no PostgreSQL: apt-get install postgresql")
    user = "postgres" if os.getuid() == 0 else pwd.getpwuid(os.getuid()).pw_name
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path("/tmp") / f"trainer-postgres-{os.getpid()}"  # the parents of pytest's directories are root's alone
    root.mkdir(mode=0o755)
    if os.getuid() == 0:
        shutil.chown(root, user)
    server = Postgres(root / "data", port, user)
    words = (
        str(PROGRAMS[-1].with_name("initdb")),
        "-D",
        str(server.data),
        "-A",
        "trust",
        "-U",
        user,
        "-N",
        "-E",
        "UTF8",
    )
    assert server.run(*words).wait(60) == 0
    server.start()
    yield server
    server.stop()
    shutil.rmtree(root)


def test_tables_sums_and_the_chain_under_concurrent_writers(postgres: Postgres) -> None:
    with ThreadPoolExecutor(4) as pool:  # four processes' worth of migrations at once: one does it
        stores = list(pool.map(lambda _: Store(postgres.url).open(), range(4)))
    store = stores[0]
    with store.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: create_account(stores[number % 4], ACTOR, f"team-{number}"), range(40)))
        list(pool.map(lambda _: add_usage(store, [Used("2026-11-26", "team-1", "m", "", 1, 2)]), range(40)))
    assert audit.verify(store).number == 40
    assert usage_by(store, ["account"])[0]["prompt_tokens"] == 80
    for statement in ("UPDATE audit SET entry = ''", "DELETE FROM audit", "TRUNCATE audit"):
        with pytest.raises(DBAPIError, match="append-only"), store.write() as connection:
            connection.execute(text(statement))
    assert audit.prune(store, ACTOR, keep_days=0) == 40
    assert audit.verify(store).number == 41
    for each in stores:
        each.close()


def test_a_server_goes_on_through_an_outage_of_its_store(postgres: Postgres, project: Project) -> None:
    arguments = ("model", "--with-accounts", "--store", postgres.url, "--kv-cache-tokens", "4096")
    with serving(project, *arguments) as server:
        admin = server.running.out.read_text().strip()

        def call(method: str, path: str, body: Any = None, key: str = admin) -> httpx.Response:
            headers = {"Authorization": f"Bearer {key}"}
            return httpx.request(method, f"{server.url}{path}", json=body, headers=headers, timeout=60)

        assert call("POST", "/v1/accounts", {"name": "steady"}).status_code == 200
        key, unused = (call("POST", "/v1/keys", {"account": "steady"}).json()["key"] for _ in range(2))
        chat = {"model": "model", "messages": [{"role": "user", "content": "8 and 90?"}], "max_tokens": 3}
        assert call("POST", "/v1/chat/completions", chat, key).status_code == 200
        postgres.stop()
        begin = time.monotonic()
        statuses = set()
        while time.monotonic() - begin < 8:  # keys and limits are older than the 2 s in which they are not read again
            statuses.add(call("POST", "/v1/chat/completions", chat, key).status_code)
        assert statuses == {200}
        answer = call("POST", "/v1/accounts", {"name": "late"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_down")
        assert call("GET", "/v1/models", key=unused).status_code == 503
        wait_for(lambda: call("POST", "/v1/chat/completions", chat, key).status_code == 503, poll_s=1)
        assert 26 < time.monotonic() - begin < 60  # after 30 s since the last check
        postgres.start()
        wait_for(lambda: call("POST", "/v1/chat/completions", chat, key).status_code == 200)
        assert call("POST", "/v1/accounts", {"name": "late"}).status_code == 200
        (row,) = call("GET", "/v1/usage?by=account&account=steady").json()["data"]
        assert row["requests"] > 3  # those of the outage too
        assert call("GET", "/v1/audit/verify").json()["is_whole"] is True


def test_a_database_that_is_away_is_said(postgres: Postgres) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        with pytest.raises(StoreDownError, match="does not answer"):
            Store(f"postgresql://nobody:secret@127.0.0.1:{port}/none").open()
