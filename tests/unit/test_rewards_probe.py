"""`trainer check --rewards`: a reward that would waste a run is found before it."""

import pytest

from trainer.config.rft_sections import RewardSpec
from trainer.errors import RewardError
from trainer.rewards.dry_run import ProbeSettings, probe, refuse_missing_fields
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
    report = probe([RewardSpec(use="last_number")], ROWS, ProbeSettings(base_dir))
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
        probe([RewardSpec(use="last_number"), RewardSpec(use=use)], ROWS, ProbeSettings(base_dir))


def test_a_reward_that_wants_a_form_is_shown_it(base_dir):
    report = probe([RewardSpec(use="mine.py:tagged")], ROWS, ProbeSettings(base_dir))
    assert report.rewards[0].gold_format == "tags"


def test_a_whole_completion_can_be_named_as_gold(base_dir):
    fields = rows({"answer": "4711", "best": "%% 4711"}, {"answer": "1", "best": "%% 1"})
    report = probe([RewardSpec(use="mine.py:secret")], fields, ProbeSettings(base_dir, gold_field="best"))
    assert report.rewards[0].highest == 1.0
    with pytest.raises(RewardError, match=r"sums.jsonl:1: no field `worst`"):
        probe([RewardSpec(use="mine.py:secret")], fields, ProbeSettings(base_dir, gold_field="worst"))


def test_the_last_message_of_the_assistant_is_gold(base_dir):
    talk = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "%% 4"}]
    report = probe([RewardSpec(use="mine.py:secret")], rows({"messages": talk}), ProbeSettings(base_dir))
    assert report.rewards[0].num_gold_above == 1


def test_a_reward_that_is_not_deterministic_is_reported(base_dir):
    report = probe([RewardSpec(use="mine.py:count")], ROWS, ProbeSettings(base_dir))
    assert not report.rewards[0].is_deterministic
    assert "  same answer twice    NO: it is not deterministic" in report.lines()


def test_a_reward_turned_round_is_reported(base_dir):
    report = probe([RewardSpec(use="mine.py:backwards")], ROWS, ProbeSettings(base_dir))
    assert report.rewards[0].num_gold_below == 3


def test_the_slowest_call_is_named(base_dir):
    reward = probe([RewardSpec(use="mine.py:slow")], ROWS, ProbeSettings(base_dir)).rewards[0]
    assert reward.slowest_label == "100 kB"
    assert reward.slowest_s >= 0.2


def test_a_hang_on_a_tower_of_powers_is_reported_and_refuses_nothing(base_dir):
    reward = probe([RewardSpec(use="mine.py:hangs")], ROWS, ProbeSettings(base_dir, timeout_s=0.5)).rewards[0]
    assert reward.failures == ("5^5^5^5: no answer within 0.5 s (sums.jsonl:1)",)
    assert reward.num_gold_above == 3


def test_a_reward_that_scores_nothing_is_refused_with_its_failure(base_dir):
    with pytest.raises(RewardError, match="OSError: no disk"):
        probe([RewardSpec(use="mine.py:broken")], ROWS, ProbeSettings(base_dir))
    with pytest.raises(RewardError, match="always abstained"):
        probe([RewardSpec(use="mine.py:abstains")], ROWS, ProbeSettings(base_dir))


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
        probe([RewardSpec(use="last_number")], [], ProbeSettings(base_dir))


MORE = """
import time
def hangs_on_nearly_all(completion, row):
    if len(completion) > 3: time.sleep(1000)
    return 1.0
def fails_often(completion, row):
    if len(completion) > 3: raise ValueError("too long")
    return float(len(completion))
def hangs(completion, row): time.sleep(1000)
def raises_on_words(completion, row):
    if "lorem" in completion: raise ValueError("no words")
    return 1.0
def longest(group, row): return [float(len(text) == max(map(len, group))) for text in group]
def ranked(group, row): return [float(row["answer"] in text) / group.count(text) for text in group]
"""


@pytest.fixture
def more(tmp_path):
    (tmp_path / "mine.py").write_text(MORE)
    return tmp_path


def test_timeouts_and_errors_are_named_as_such(more):
    settings = ProbeSettings(more, timeout_s=0.3, num_workers=4)
    with pytest.raises(RewardError) as caught:
        probe([RewardSpec(use="mine.py:hangs_on_nearly_all")], rows({"answer": "7"}), settings)
    first, second, *_ = str(caught.value).splitlines()
    # the plain gold answer and the empty string are short; nine others are not
    assert first == (
        "reward hangs_on_nearly_all: of 10 texts 8 ran out of time (reward_limits.timeout_s); the others get 1. "
        "The first failure, on boxed:"
    )
    assert second == "on sums.jsonl:1"
    often = probe([RewardSpec(use="mine.py:fails_often")], rows({"answer": "7"}), ProbeSettings(more))
    assert often.problems == ("reward fails_often: failed on 8 of 10 texts, which would stop a run",)
    with pytest.raises(RewardError, match="of 10 texts 1 failed with an error; the others get 1"):
        probe([RewardSpec(use="mine.py:raises_on_words")], rows({"answer": "7"}), ProbeSettings(more))


def test_the_check_ends_whatever_a_reward_does(more):
    settings = ProbeSettings(more, timeout_s=600.0, budget_s=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.rewards.dry_run.MIN_BUDGET_S", 1.0)
        with pytest.raises(RewardError, match="reward hangs: no text could be tried within 0 s"):
            probe([RewardSpec(use="mine.py:hangs")], ROWS, settings)


def test_gold_below_garbage_is_a_problem_of_the_sum_not_of_a_part(base_dir):
    backwards = probe([RewardSpec(use="mine.py:backwards")], ROWS, ProbeSettings(base_dir))
    assert backwards.problems[0].startswith(
        "sums.jsonl:1: a gold answer gets less reward than garbage, on 3 of 3 rows."
    )
    outweighed = probe(
        [RewardSpec(use="mine.py:backwards", weight=0.1), RewardSpec(use="last_number")], ROWS, ProbeSettings(base_dir)
    )
    assert outweighed.problems == ()
    assert outweighed.rewards[0].num_gold_below == 3
    negative = probe([RewardSpec(use="last_number", weight=-1.0)], ROWS, ProbeSettings(base_dir))
    assert len(negative.problems) == 1


def test_held_out_rows_are_looked_at_too(base_dir):
    held_out = [Row({"answer": "x"}, "held_out.jsonl", 5)]
    with pytest.raises(RewardError, match=r"held_out.jsonl:5: answer is not a number"):
        probe([RewardSpec(use="last_number")], ROWS, ProbeSettings(base_dir), held_out)
    with pytest.raises(RewardError, match=r"held_out.jsonl:6: no field `answer`, which reward slow reads"):
        probe([RewardSpec(use="mine.py:slow")], ROWS, ProbeSettings(base_dir), [Row({}, "held_out.jsonl", 6)])
    held_out = rows({"answer": "5"}, {"answer": "6"}, {"answer": "7"})
    assert probe([RewardSpec(use="last_number")], ROWS, ProbeSettings(base_dir), held_out).rewards[0].num_rows == 5


def test_a_group_reward_is_tried_on_all_texts_of_a_row(more):
    (reward,) = probe([RewardSpec(use="mine.py:ranked")], ROWS, ProbeSettings(more)).rewards
    assert (reward.num_gold_above, reward.is_deterministic) == (3, True)
    (reward,) = probe([RewardSpec(use="mine.py:longest")], ROWS, ProbeSettings(more)).rewards
    assert (reward.lowest, reward.highest) == (0.0, 1.0)


def test_each_reward_is_tried_on_the_rows_that_choose_it(base_dir):
    words = [Row({"task": "words", "answer": "yes"}, "sums.jsonl", line) for line in range(1, 20)]
    sums = [
        Row({"task": "sums", "answer": "7"}, "sums.jsonl", 30),
        Row({"task": "sums", "answer": "8"}, "sums.jsonl", 31),
    ]
    specs = [
        RewardSpec(use="exact_match", label="words"),
        RewardSpec(use="last_number", label="sums"),
        RewardSpec(use="last_number", label="unused"),
    ]
    report = probe(specs, words + sums, ProbeSettings(base_dir, column="task"))
    assert [(reward.name, reward.num_rows, reward.num_gold_above) for reward in report.rewards] == [
        ("words", 8, 8),
        ("sums", 2, 2),
    ]
    assert report.lines()[-1] == "reward unused: NO ROW names it in its reward_column"
