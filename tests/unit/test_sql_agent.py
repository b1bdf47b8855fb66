"""The text-to-SQL agent: right statements earn 1, and neither writing nor guessing the seen values does."""

from __future__ import annotations

import json
import sqlite3
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from trainer.environments.contract import Turn
from trainer.environments.pool import EnvironmentPool, EnvironmentSettings
from trainer.environments.tool_calls import parse_turn
from trainer.environments.trial import play_trials
from trainer.types import Row

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "datasets").glob("sql_rft_*.jsonl"))
TELL = {"invalid_json": "tell", "unclosed": "tell", "unknown_tool": "tell", "bad_arguments": "tell"}


@pytest.fixture(scope="module")
def agent() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT / "recipes" / "environments"))
    yield import_module("sql_agent")
    sys.path.pop(0)


def rows() -> list[Row]:
    return [
        Row(json.loads(line), str(file), number, number)
        for file in FILES
        for number, line in enumerate(file.read_text().splitlines())
    ]


def turn(text: str) -> Turn:
    return Turn(0, text, {"role": "assistant", "content": text}, "stop")


def answered(agent: Any, row: Row, text: str) -> Any:
    played = agent.SQLAgent()
    played.reset(row, seed=0)
    observation = played.step(turn(text))
    played.close()
    return observation


def test_the_right_statement_of_every_row_earns_1_and_returns_something(agent):
    for row in rows():
        played = agent.SQLAgent()
        played.reset(row, seed=0)
        assert played.query(row["answer"]) not in ("(no rows)", "None"), row
        assert played.step(turn(f"So:\n```sql\n{row['answer']};\n```")).reward == 1.0, row
        played.close()


def test_statements_that_name_the_seen_values_earn_nothing(agent):
    """The second database lacks some of the rows."""
    for row in rows():
        played = agent.SQLAgent()
        played.reset(row, seed=0)
        seen = played.seen.execute(row["answer"]).fetchall()
        values = ", ".join("(" + ", ".join(map(repr, each)) + ")" for each in seen)
        observation = played.step(turn(f"SELECT * FROM (VALUES {values})"))
        assert (observation.parts["runs"], observation.reward) == (1.0, 0.0), row
        played.close()


@pytest.mark.parametrize(
    ("statement", "does_run"),
    [
        ("SELECT COUNT(*) + 0 FROM {items}", 1.0),
        ("DROP TABLE {items}", 0.0),
        ("DELETE FROM {items}", 0.0),
        ("ATTACH '/tmp/x.db' AS x", 0.0),
        ("PRAGMA writable_schema = 1", 0.0),
        ("SELECT load_extension('x')", 0.0),
        ("SELECT randomblob(900000000)", 0.0),
        ("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n", 0.0),
        ("SELECT 1; DROP TABLE {items}", 0.0),
        ("not SQL", 0.0),
        ("", 1.0),
    ],
)
def test_only_short_reading_statements_run(agent, statement, does_run):
    row = rows()[0]
    items = row["answer"].split(" FROM ")[1].split()[0]
    observation = answered(agent, row, statement.format(items=items))
    assert observation.reward == 0.0
    assert observation.parts["runs"] == does_run


def test_order_counts_only_where_the_question_has_one(agent):
    database = "CREATE TABLE t (a INTEGER, b TEXT); INSERT INTO t VALUES (1, 'x'), (2, 'y'), (4, 'z'), (5, 'w');"
    free = Row({"question": "?", "answer": "SELECT a FROM t", "database": database}, "r.jsonl", 0, 0)
    ordered = Row({**free.fields, "answer": "SELECT a FROM t ORDER BY a"}, "r.jsonl", 0, 0)
    backwards = "SELECT a * 1.0 FROM t ORDER BY a DESC"
    assert answered(agent, free, backwards).reward == 1.0
    assert answered(agent, ordered, backwards).reward == 0.0


def test_the_policy_queries_by_tool_and_errors_are_told(agent):
    settings = EnvironmentSettings("recipes/environments/sql_agent.py:SQLAgent", (), TELL, ROOT)
    row = rows()[0]
    with EnvironmentPool(settings) as pool:
        remote = pool.open()
        start = remote.reset(row, (), 0)
        assert [each["function"]["name"] for each in start["tools"]] == ["query"]
        assert start["tools"][0]["function"]["parameters"]["required"] == ["sql"]
        assert "CREATE TABLE" in start["messages"][0]["content"]
        for sql, expected in (("SELECT 40 + 2", "42"), ("SELECT absent", "error: OperationalError: no such column")):
            parsed = parse_turn(
                "<tool_call>" + json.dumps({"name": "query", "arguments": {"sql": sql}}) + "</tool_call>"
            )
            wire = {"number": 0, "text": "", "message": parsed.message, "finish": "stop"}
            reply = remote.step(wire | {"calls": [call.__dict__ for call in parsed.calls]})
            assert expected in reply["messages"][0]["content"]
        remote.close()
        lines = play_trials(pool, rows()[:4], lambda _row: (), max_turns=3, has_rewards=True)
    assert any(line.split()[:4] == ["gold", "mean", "reward", "1.000,"] for line in lines)
    assert any(line.split()[:4] == ["silent", "mean", "reward", "0.000,"] for line in lines)


def test_train_and_held_out_share_no_table():
    tables = []
    for file in FILES:
        scripts = [json.loads(line)["database"] for line in file.read_text().splitlines()]
        names = set()
        for script in scripts:
            with sqlite3.connect(":memory:") as database:
                database.executescript(script)
                names |= {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            database.close()
        tables.append(names)
    assert len(tables) == 2
    assert not tables[0] & tables[1]
