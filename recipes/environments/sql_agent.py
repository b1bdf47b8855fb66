"""Text to SQL: the policy may query a SQLite database with a tool, then answers with one SELECT statement.

The answer is right if it returns what the row's own statement returns, on the database that the policy saw and on one
that lacks some of its rows: a statement that only names the values it has seen (`SELECT 42`) fails there.
"""

from __future__ import annotations

import re
import sqlite3
from collections import Counter
from typing import Any, Final

from trainer.environments.contract import Observation, Start, Turn
from trainer.types import Row

MAX_ROWS_SHOWN: Final = 20
MAX_STEPS: Final = 2_000_000
"""Instructions of SQLite's virtual machine for one statement; about a tenth of a second."""
MAX_BYTES: Final = 1_000_000
"""Of one value, so that `randomblob` and `printf` cannot fill the memory."""
ALLOWED: Final = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE)
TASK: Final = (
    "You answer questions about a SQLite database with one SELECT statement. You may look at the data with the tool "
    "`query` first. Then give the statement alone, in a ```sql block.\n\nTables:\n"
)
HIDDEN_EVERY: Final = 3
"""Every third row of each table is left out of the second database."""


class SQLAgent:
    """One question; its reward is 1 for a statement that returns the right rows and 0 otherwise."""

    def reset(self, row: Row, *, seed: int) -> Start:
        """Make both databases; the row has `question`, `answer` (a statement) and `database` (a script)."""
        self.gold = row["answer"]
        self.seen, self.hidden = _opened(row["database"]), _opened(row["database"], HIDDEN_EVERY)
        self.num_queries = 0
        schema = "\n".join(text for (text,) in _read(self.seen, "SELECT sql FROM sqlite_master WHERE type = 'table'"))
        messages = [{"role": "system", "content": TASK + schema}, {"role": "user", "content": row["question"]}]
        return Start(messages, tools=(self.query,))

    def query(self, sql: str) -> str:
        """Run a SELECT statement and return its first rows.

        Exceptions are told to the policy.
        """
        self.num_queries += 1
        rows = _read(self.seen, sql)
        shown = "\n".join(" | ".join(map(str, each)) for each in rows[:MAX_ROWS_SHOWN])
        more = f"\n({len(rows) - MAX_ROWS_SHOWN} more)" if len(rows) > MAX_ROWS_SHOWN else ""
        return (shown or "(no rows)") + more

    def step(self, turn: Turn) -> Observation:
        """Compare the statement's rows with the right ones."""
        statement = statement_of(turn.text)
        does_run, is_right = True, True
        try:
            for database in (self.seen, self.hidden):
                is_right = is_right and _same(_read(database, statement), _read(database, self.gold), self.gold)
        except (sqlite3.Error, sqlite3.Warning):
            does_run = is_right = False
        parts = {"runs": float(does_run), "queries": float(self.num_queries)}
        return Observation([], done=True, reward=float(is_right), parts=parts, info={"statement": statement})

    def close(self) -> None:
        """Close the databases."""
        self.seen.close()
        self.hidden.close()


def statement_of(text: str) -> str:
    r"""The statement in the last fenced block, or the whole text, after any reasoning.

    >>> statement_of("<think>Count.</think>So:\n```sql\nSELECT 1;\n```")
    'SELECT 1'
    """
    answer = text.rpartition("</think>")[2]
    blocks = re.findall(r"```(?:sql|sqlite)?\s*\n(.*?)```", answer, re.DOTALL | re.IGNORECASE)
    return (blocks[-1] if blocks else answer).strip().rstrip(";").rstrip()


def _opened(script: str, leave_out: int | None = None) -> sqlite3.Connection:
    """A database in memory that can only be read, without every n-th row of each table if `leave_out` is n."""
    database = sqlite3.connect(":memory:", check_same_thread=False)
    database.executescript(script)
    if leave_out is not None:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            database.execute(f'DELETE FROM "{table}" WHERE rowid % {leave_out} = 0')
    database.commit()
    database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_BYTES)
    database.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in ALLOWED else sqlite3.SQLITE_DENY)
    return database


def _read(database: sqlite3.Connection, statement: str) -> list[tuple[Any, ...]]:
    """The rows of one statement.

    Raises:
        sqlite3.Error: it is no SELECT, has an error or takes too long.
    """
    steps_left = [MAX_STEPS // 1000]

    def is_too_long() -> int:
        steps_left[0] -= 1
        return int(steps_left[0] < 0)

    database.set_progress_handler(is_too_long, 1000)
    return database.execute(statement).fetchall()


def _same(rows: list[tuple[Any, ...]], gold: list[tuple[Any, ...]], statement: str) -> bool:
    """Whether two results are equal; their order counts only if the right statement has one."""
    ours, theirs = ([tuple(map(_rounded, row)) for row in each] for each in (rows, gold))
    return (
        ours == theirs if re.search(r"\border\s+by\b", statement, re.IGNORECASE) else Counter(ours) == Counter(theirs)
    )


def _rounded(value: Any) -> Any:
    return round(float(value), 6) if isinstance(value, int | float) else value
