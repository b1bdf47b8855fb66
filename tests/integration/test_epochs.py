"""`epochs` counts the rows that are trained."""

from __future__ import annotations

import json

from project import Project


def test_dropped_rows_do_not_count(project: Project) -> None:
    rows = [{"prompt": f"n{n}", "completion": "short" if n < 5 else "long " * 200} for n in range(10)]
    (project.root / "ten.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data": {"train": "ten.jsonl", "max_seq_tokens": 100, "overlong": "drop"}, "eval_interval": 0}
    recipe = project.recipe("ten.yaml", name="ten", rows_per_step=2, steps=None, epochs=1, **changes)
    first = project.worker(recipe)
    assert first.code == 0, first.said
    assert "5 rows are trained: 3 steps for 1 epochs" in first.stderr
    run = project.run("ten")
    assert run.steps() == [1, 2, 3]
    assert json.loads((run.root / "plan.json").read_text())["steps"] == 3
    again = project.worker(recipe)
    assert again.code == 0, again.said
    assert "is finished" in again.stderr
    assert len(run.attempts()) == 1
