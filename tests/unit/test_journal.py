"""The journal: what was written comes back bit for bit, or not at all."""

from __future__ import annotations

import json
import math
import random
import struct
from dataclasses import replace
from datetime import date
from typing import Any

import pytest

from trainer.run.directory import RunDir
from trainer.run.journal import (
    ChunkHeader,
    JournalPrompt,
    count_sampled,
    note_begun,
    read_chunk,
    read_step,
    set_aside,
    write_chunk,
)
from trainer.types import Group, Rollout, Row

STEP, NUMBER = 3, 1
ROWS = tuple(Row({"answer": index}, file="rows.jsonl", line=index + 1, index=index) for index in range(10))
HEADER = ChunkHeader(step=STEP, rows=(4, 7), group_size=2, world_size=1, length=(15, None))
AWKWARD = (
    'a\u2028b\u2029c\u0085d\x0b\x0c\x1c\r\n\te\x00 \x7f \U0001d518 日本 \N{COMBINING ACUTE ACCENT}\ud800 "\\ \ufffd'
)
"""Every end of a line that Python knows, and half a surrogate pair."""
LOGPROBS = (-0.1, -5e-324, -math.pi, -1 / 3, float("-inf"))


def rollout(text: str = "it is 4", reward: Any = 0.1 + 0.2, **changes: Any) -> Rollout:
    """A rollout of two prompt tokens and six drawn ones, one of them not trained, as a tool's answer would be."""
    fields: dict[str, Any] = {
        "token_ids": (1, 500, 7, 8, 9, 10, 11, 2),
        "loss_mask": (False, False, True, True, False, True, True, True),
        "sampler_logprobs": LOGPROBS,
        "finish_reason": "stop",
        "policy_version": STEP,
        "text": text,
        "reward": reward,
        "rewards": {"right": reward, "right/form": 1e-17},
    }
    return Rollout(**{**fields, **changes})


GROUPS = (
    Group(ROWS[4], (rollout(advantage=0.5), rollout(AWKWARD, reward=-0.0, finish_reason="length", advantage=-0.5))),
    Group(
        ROWS[7],
        (
            rollout("", reward=None, rewards={"right": None}, failure=f"Error: {AWKWARD}"),
            rollout("x", 1.0, advantage=0.0),
        ),
    ),
)


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path)
    write_chunk(run, NUMBER, HEADER, GROUPS)
    return run


def read(run, **changes):
    header = replace(HEADER, **changes)
    return read_chunk(run, NUMBER, header, [ROWS[index] for index in header.rows])


def prompts(run: RunDir) -> list[dict[str, Any]]:
    return [group.prompt for group in read_step(run, STEP) if group.prompt is not None]


def test_everything_comes_back_exactly(run):
    found = read(run)
    assert tuple(found) == GROUPS
    assert repr(found[0].rollouts[1].reward) == "-0.0"  # which == does not tell from 0.0


def test_prompts_of_two_groups_of_one_row_stay_apart(run):
    # A row comes twice in a step that reaches into the next epoch.
    twice = (GROUPS[0], Group(ROWS[4], (rollout("other", 2.0), rollout("and other", 3.0))))
    header = replace(HEADER, rows=(4, 4))
    write_chunk(run, 2, header, twice)
    assert tuple(read_chunk(run, 2, header, [ROWS[4], ROWS[4]]) or ()) == twice


def test_a_chunk_cut_anywhere_is_no_chunk(run):
    file = run.journal_chunk(STEP, NUMBER)
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        assert read(run) is None, length
    file.write_bytes(whole)
    assert tuple(read(run)) == GROUPS


def test_a_chunk_that_lost_a_line_is_no_chunk(run):
    file = run.journal_chunk(STEP, NUMBER)
    lines = file.read_text().split("\n")
    for gone in range(8):  # header, the ids of two prompts, four rollouts, end
        file.write_text("\n".join(lines[:gone] + lines[gone + 1 :]))
        assert read(run) is None, gone


def test_a_missing_chunk_is_none(tmp_path):
    assert read(RunDir(tmp_path)) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": (4, 8)},
        {"rows": (7, 4)},
        {"rows": (4,)},
        {"world_size": 2},
        {"group_size": 4},
        {"step": 4},
        {"length": (16, None)},
        {"length": (None, 2.0)},
    ],
    ids=str,
)
def test_a_chunk_of_other_rows_or_ranks_is_not_replayed(run, changes):
    assert read(run) is not None
    assert read(run, **changes) is None


@pytest.mark.parametrize(
    ("ours", "theirs"), [('"world_size": 1', '"world_size": 2'), ('"step": 3', '"step": 3, "new": 1')]
)
def test_a_chunk_with_another_header_on_disk_is_not_replayed(run, ours, theirs):
    file = run.journal_chunk(STEP, NUMBER)
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(ours, theirs, 1), encoding="utf-8")
    assert file.read_text(encoding="utf-8") != text
    assert read(run) is None


HEADER_LINE = '{"format": %d, "step": 3, "rows": [4], "group_size": 2, "world_size": 1, "length": [15, null]}'
LINES = (
    '{"row": 4, "where": "rows.jsonl:5", "advantage": 0.5, "token_ids": [1, 500, 7, 8], "trained": "0011", '
    '"sampler_logprobs": [0.0, 0.0, -0.25, -0.5], "finish_reason": "stop", "policy_version": 3, "text": "it is 4", '
    '"reward": 1.0, "rewards": {"right": 1.0}, "failure": null}',
    '{"row": 4, "where": "rows.jsonl:5", "advantage": -0.5, "token_ids": [1, 500, 9], "trained": "001", '
    '"sampler_logprobs": [0.0, 0.0, -2.5], "finish_reason": "length", "policy_version": 3, "text": "é", '
    '"reward": 0.0, "rewards": {"right": 0.0}, "failure": null}',
)
"""Of formats 1 and 2: logprobs are as long as the tokens, 0.0 where nothing was drawn."""
LINES_3 = (
    '{"row": 4, "where": "rows.jsonl:5", "advantage": 0.5, "num_shared": 2, "token_ids": [7, 8], "trained": "11", '
    '"float32": true, "sampler_logprobs": [-0.25, -0.5], "finish_reason": "stop", "policy_version": 3, '
    '"text": "it is 4", "reward": 1.0, "rewards": {"right": 1.0}, "failure": null}',
    '{"row": 4, "where": "rows.jsonl:5", "advantage": -0.5, "num_shared": 2, "token_ids": [9], "trained": "1", '
    '"float32": true, "sampler_logprobs": [-2.5], "finish_reason": "length", "policy_version": 3, "text": "é", '
    '"reward": 0.0, "rewards": {"right": 0.0}, "failure": null}',
)
WRITTEN = Group(
    ROWS[4],
    (
        Rollout((1, 500, 7, 8), (False, False, True, True), (-0.25, -0.5), "stop", 3, "it is 4", 1.0,
                {"right": 1.0}, advantage=0.5),
        Rollout((1, 500, 9), (False, False, True), (-2.5,), "length", 3, "é", 0.0, {"right": 0.0}, advantage=-0.5),
    ),
)  # fmt: skip
ASKED = JournalPrompt(4, "rows.jsonl:5", ({"role": "user", "content": "2+2?"},), {"answer": "4"})


@pytest.mark.parametrize("known", [1, 2])
def test_earlier_formats_stay_readable(tmp_path, known):
    """A chunk as earlier versions wrote it; an interrupted run replays it."""
    run = RunDir(tmp_path)
    file = run.journal_chunk(STEP, NUMBER)
    file.parent.mkdir(parents=True)
    file.write_text("\n".join([HEADER_LINE % known, *LINES, '{"end": 2}']) + "\n", encoding="utf-8")
    assert read(run, rows=(4,)) == [WRITTEN]
    (group,) = read_step(run, STEP)
    assert group.prompt is None
    assert [record["text"] for record in group.rollouts] == ["it is 4", "é"]


def test_a_prompt_is_written_once_per_chunk_and_does_not_change_the_replay(tmp_path):
    run = RunDir(tmp_path)
    header = replace(HEADER, rows=(4, 4))
    write_chunk(run, NUMBER, header, [WRITTEN, WRITTEN], [ASKED, ASKED])
    asked = (
        '{"row": 4, "where": "rows.jsonl:5", "prompt": [{"role": "user", "content": "2+2?"}], '
        '"fields": {"answer": "4"}}'
    )
    ids = '{"row": 4, "shared_ids": [1, 500]}'
    lines = [(HEADER_LINE % 3).replace("[4]", "[4, 4]"), asked, ids, *LINES_3, *LINES_3, '{"end": 6}']
    assert run.journal_chunk(STEP, NUMBER).read_text(encoding="utf-8") == "\n".join(lines) + "\n"
    assert read_chunk(run, NUMBER, header, [ROWS[4], ROWS[4]]) == [WRITTEN, WRITTEN]
    assert [prompt["fields"] for prompt in prompts(run)] == [{"answer": "4"}, {"answer": "4"}]


def test_a_prompt_belongs_to_its_own_row(tmp_path):
    run = RunDir(tmp_path)
    other = replace(ASKED, row=7, messages=({"role": "user", "content": "3+4?"},))
    write_chunk(run, NUMBER, HEADER, GROUPS, [ASKED, other])
    shown = [prompt["prompt"][0]["content"] for prompt in prompts(run)]
    assert shown == ["2+2?", "3+4?"]


def test_long_fields_and_such_that_are_no_json_are_kept_as_text(tmp_path):
    run = RunDir(tmp_path)
    fields = {"tests": "x" * 5000, "when": date(2026, 1, 2)}
    write_chunk(run, NUMBER, replace(HEADER, rows=(4,)), [WRITTEN], [replace(ASKED, fields=fields)])
    (prompt,) = prompts(run)
    assert prompt["fields"] == {"tests": '"' + "x" * 1999 + "...", "when": "2026-01-02"}


def test_drawn_tokens_are_counted_without_the_prompts(tmp_path):
    run = RunDir(tmp_path)
    write_chunk(run, NUMBER, replace(HEADER, rows=(4,)), [WRITTEN], [ASKED])
    note_begun(run, STEP, NUMBER)
    note_begun(run, STEP, NUMBER)
    assert count_sampled(run) == (3, 3)  # two and one drawn tokens; begun twice


def test_nothing_half_written_is_left_by_an_error(tmp_path):
    run = RunDir(tmp_path)
    unwritable = Group(ROWS[4], (rollout(reward=object()),))
    with pytest.raises(TypeError):
        write_chunk(run, NUMBER, replace(HEADER, rows=(4,)), [unwritable])
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_chunk_is_replaced_as_a_whole(run):
    before = run.journal_chunk(STEP, NUMBER).stat().st_ino
    write_chunk(run, NUMBER, replace(HEADER, rows=(7,)), GROUPS[1:])
    assert run.journal_chunk(STEP, NUMBER).stat().st_ino != before  # a reader of the old file reads on in it
    assert tuple(read(run, rows=(7,))) == GROUPS[1:]


def test_people_read_a_step_group_by_group_in_order_of_chunks(run):
    first = Group(ROWS[2], (rollout("first", 5.0, advantage=1.0), rollout(advantage=0.0)))
    write_chunk(run, 0, replace(HEADER, rows=(2,)), [first])
    (run.journal(STEP) / "chunk-0002.jsonl").write_text('{"format": 1}\n{"cut')
    groups = read_step(run, STEP)
    assert [[record["row"] for record in group.rollouts] for group in groups] == [[2, 2], [4, 4], [7, 7]]
    record = groups[0].rollouts[0]
    assert (record["where"], record["advantage"], record["reward"]) == ("rows.jsonl:3", 1.0, 5.0)
    assert record["trained"] == "00110111"
    assert groups[1].rollouts[1]["text"] == AWKWARD


def test_a_step_without_rollouts_has_no_groups(tmp_path):
    assert read_step(RunDir(tmp_path), STEP) == []


def test_every_line_is_json_of_its_own_and_readable(run):
    text = run.journal_chunk(STEP, NUMBER).read_text(encoding="utf-8")
    assert len([json.loads(line) for line in text.rstrip("\n").split("\n")]) == 8
    assert "日本" in text


def test_a_step_set_aside_is_not_replayed_and_the_newest_one_is_kept(run):
    aside = set_aside(run, STEP)
    assert read(run) is None
    assert aside == run.rollouts / "refused-step-000003"
    assert [file.name for file in aside.iterdir()] == ["chunk-0001.jsonl"]
    assert (read_step(run, STEP), len(read_step(run, STEP, refused=True))) == ([], 2)
    assert (run.journal_steps(), run.journal_steps(refused=True)) == ([], [STEP])
    write_chunk(run, 5, HEADER, GROUPS)
    assert set_aside(run, STEP) == aside
    assert [file.name for file in aside.iterdir()] == ["chunk-0005.jsonl"]


def test_logprobs_of_float32_come_back_bit_for_bit(tmp_path):
    run = RunDir(tmp_path)
    generator = random.Random(4711)
    bits = [generator.getrandbits(32) for _ in range(20_000)]
    singles = struct.unpack(f"{len(bits)}f", struct.pack(f"{len(bits)}I", *bits))
    finite = tuple(value for value in singles if math.isfinite(value))
    drawn = Rollout(tuple(range(len(finite))), (True,) * len(finite), finite, "stop", STEP, "", 1.0)
    header = replace(HEADER, rows=(4,), group_size=1)
    write_chunk(run, NUMBER, header, [Group(ROWS[4], (drawn,))])
    found = read_chunk(run, NUMBER, header, [ROWS[4]])
    assert found is not None
    assert struct.pack(f"{len(finite)}d", *found[0].rollouts[0].sampler_logprobs) == struct.pack(
        f"{len(finite)}d", *finite
    )


def test_prompts_that_differ_between_rollouts_share_what_they_have_in_common(tmp_path):
    """As of an environment whose `reset` is random."""
    run = RunDir(tmp_path)
    mask = (False, False, False, True)
    groups = [
        Group(ROWS[4], tuple(Rollout((1, 2, last, 9), mask, (-0.5,), "stop", STEP, "", 1.0) for last in (3, 4))),
        Group(
            ROWS[7],
            (Rollout((), (), (), "stop", STEP, "", 0.0), Rollout((5, 9), (False, True), (-1.0,), "stop", 3, "")),
        ),
    ]
    write_chunk(run, NUMBER, HEADER, groups)
    assert read(run) == groups
    lines = [json.loads(line) for line in run.journal_chunk(STEP, NUMBER).read_text().splitlines()]
    assert [line for line in lines if "shared_ids" in line] == [
        {"row": 4, "shared_ids": [1, 2]},
        {"row": 7, "shared_ids": []},
    ]
