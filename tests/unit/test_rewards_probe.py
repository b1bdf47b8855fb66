"""`trainer check --rewards`: a reward that would waste a run is found before it."""

import pytest

from trainer.config.rft_sections import RewardSpec
from trainer.errors import RewardError
from trainer.rewards.dry_run import probe, refuse_missing_fields
from trainer.rewards.runner import RewardRunner
from trainer.types import Row

MINE = """
import itertools, time

counter = itertools.count()

def constant(completion, row): return 0.5
def count(completion, row): return float(next(counter))
def backwards(completion, row): return float(row["answer"] not in completion)
def slow(completion, row):
    if len(completion) > 50_000: time.sleep(0.2)
    return float(row["answer"] in completion)
def broken(completion, row): raise OSError("no disk")
def abstains(completion, row): return None
def hangs(completion, row):
    while "5^5^5^5" in completion: pass
    return float(row["answer"] == completion)
def optional(completion, row):
    bonus = row["bonus"] if "bonus" in row else row.get("extra", 0.0)
    try:
        bonus += row["more"]
    except KeyError:
        pass
    return bonus + float(row["answer"] in completion)
def other_dict(completion, row): return {"a": 1.0}[completion]
def columns(completions, answer, unit="m"): return [float(a in c) for a, c in zip(answer, completions)]
def tagged(completion, row): return float(f"<answer>{row['answer']}</answer>" in completion)
def secret(completion, row): return float(completion.startswith("%%"))
"""


def check_rows(specs, rows, base_dir):
    with RewardRunner(specs, base_dir=base_dir) as runner:
        refuse_missing_fields(runner, specs, rows)


@pytest.fixture
def base_dir(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def rows(*fields):
    return [Row(each, file="sums.jsonl", line=number + 1, index=number) for number, each in enumerate(fields)]


ROWS = rows({"answer": "4711"}, {"answer": "1234"}, {"answer": "99"})


def test_a_sound_reward_is_reported(base_dir):
    report = probe([RewardSpec(use="last_number")], ROWS, base_dir=base_dir)
    reward = report.rewards[0]
    assert (reward.name, reward.lowest, reward.highest) == ("last_number", 0.0, 1.0)
    assert (reward.num_gold_above, reward.num_gold, reward.num_gold_below) == (3, 3, 0)
    assert reward.is_deterministic
    assert reward.failures == ()
    assert report.lines()[:3] == [
        "reward last_number: from 0 to 1 on 3 rows",
        "  gold above garbage   3 of 3 rows, written as plain",
        "  same answer twice    yes",
    ]


@pytest.mark.parametrize("use", ["mine.py:constant", "mine.py:secret"])
def test_a_reward_that_gives_the_same_to_all_is_refused(use, base_dir):
    with pytest.raises(RewardError, match="to everything"):
        probe([RewardSpec(use="last_number"), RewardSpec(use=use)], ROWS, base_dir=base_dir)


def test_a_reward_that_wants_a_form_is_shown_it(base_dir):
    report = probe([RewardSpec(use="mine.py:tagged")], ROWS, base_dir=base_dir)
    assert report.rewards[0].gold_format == "tags"


def test_a_whole_completion_can_be_named_as_gold(base_dir):
    fields = rows({"answer": "4711", "best": "%% 4711"}, {"answer": "1", "best": "%% 1"})
    report = probe([RewardSpec(use="mine.py:secret")], fields, base_dir=base_dir, gold_field="best")
    assert report.rewards[0].highest == 1.0
    with pytest.raises(RewardError, match=r"sums.jsonl:1: no field `worst`"):
        probe([RewardSpec(use="mine.py:secret")], fields, base_dir=base_dir, gold_field="worst")


def test_the_last_message_of_the_assistant_is_gold(base_dir):
    talk = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "%% 4"}]
    report = probe([RewardSpec(use="mine.py:secret")], rows({"messages": talk}), base_dir=base_dir)
    assert report.rewards[0].num_gold_above == 1


def test_a_reward_that_is_not_deterministic_is_reported(base_dir):
    report = probe([RewardSpec(use="mine.py:count")], ROWS, base_dir=base_dir)
    assert not report.rewards[0].is_deterministic
    assert "  same answer twice    NO: it is not deterministic" in report.lines()


def test_a_reward_turned_round_is_reported(base_dir):
    report = probe([RewardSpec(use="mine.py:backwards")], ROWS, base_dir=base_dir)
    assert report.rewards[0].num_gold_below == 3


def test_the_slowest_call_is_named(base_dir):
    reward = probe([RewardSpec(use="mine.py:slow")], ROWS, base_dir=base_dir).rewards[0]
    assert reward.slowest_label == "100 kB"
    assert reward.slowest_s >= 0.2


def test_a_hang_on_a_tower_of_powers_is_reported_and_refuses_nothing(base_dir):
    reward = probe([RewardSpec(use="mine.py:hangs")], ROWS, base_dir=base_dir, timeout_s=0.5).rewards[0]
    assert reward.failures == ("5^5^5^5: no answer within 0.5 s (sums.jsonl:1)",)
    assert reward.num_gold_above == 3


def test_a_reward_that_scores_nothing_is_refused_with_its_failure(base_dir):
    with pytest.raises(RewardError, match="OSError: no disk"):
        probe([RewardSpec(use="mine.py:broken")], ROWS, base_dir=base_dir)
    with pytest.raises(RewardError, match="always abstained"):
        probe([RewardSpec(use="mine.py:abstains")], ROWS, base_dir=base_dir)


@pytest.mark.parametrize("use", ["last_number", "mine.py:slow", "mine.py:columns"])
def test_rows_without_a_field_are_named_by_file_and_line(use, base_dir):
    spoiled = [*ROWS, Row({"anser": "5"}, "more.jsonl", 12), Row({"anser": "6"}, "more.jsonl", 13)]
    name = use.rpartition(":")[2]
    with pytest.raises(RewardError) as caught:
        check_rows([RewardSpec(use=use)], spoiled, base_dir)
    expected = f"more.jsonl:12: no field `answer`, which reward {name} reads; did you mean `anser`? (1 more rows)"
    assert str(caught.value) == expected


def test_fields_that_a_reward_can_do_without_may_be_missing(base_dir):
    mixed = rows({"answer": "1", "bonus": 1.0, "more": 2.0}, {"answer": "2"}, {"answer": "3", "extra": 1.0})
    check_rows([RewardSpec(use="mine.py:optional"), RewardSpec(use="mine.py:columns")], mixed, base_dir)


def test_a_key_error_of_another_dictionary_is_not_taken_for_a_missing_field(base_dir):
    check_rows([RewardSpec(use="mine.py:other_dict")], ROWS, base_dir)


def test_no_rows_are_refused(base_dir):
    with pytest.raises(RewardError, match="no rows"):
        probe([RewardSpec(use="last_number")], [], base_dir=base_dir)
