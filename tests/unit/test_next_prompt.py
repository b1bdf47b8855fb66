"""The prompt of a further turn: sampled ids stay as they were drawn, and what a template rewrites begins anew."""

from __future__ import annotations

from typing import Any

import pytest
from prompt_writer import FORGETFUL, STOP, ids, writer

from trainer.data.next_prompt import PromptWriter
from trainer.data.template import TEMPLATES
from trainer.environments.tool_calls import parse_turn
from trainer.errors import ModelError
from trainer.training.tool_template import SCHEMA, refuse_template_without_tools

ASK = {"role": "user", "content": "what is the sum of 8 and 90?"}
MORE = {"role": "user", "content": "and 12?"}
CALL = '<tool_call>{"arguments":{"a":7},"name":"zqtool"}</tool_call>'


def follow(one: PromptWriter, drawn: list[int], observation: dict[str, Any], *tools: Any) -> Any:
    """The first prompt, and the ids that follow a drawn turn; None where a new sequence begins."""
    first = one.first([ASK], tools, "row")
    message = parse_turn(one.raw_text(drawn)).message
    later = one.first([ASK, message, observation], tools, "row")
    return first, one.tail(first.text, drawn, later.text), later


def test_the_next_prompt_is_the_previous_ids_and_what_the_template_renders_behind_the_turn():
    one = writer()
    drawn = [*ids(one, "98"), STOP]
    first, tail, later = follow(one, drawn, MORE)
    assert (*first.token_ids, *drawn, *tail) == later.token_ids


def test_sampled_ids_stay_where_tokenizing_again_would_give_others():
    one = writer()
    letters = [token for letter in "answer" for token in ids(one, letter)]
    assert letters != ids(one, "answer"), "drawn letter by letter"
    first, tail, later = follow(one, [*letters, STOP], MORE)
    assert (*first.token_ids, *letters, STOP, *tail) != later.token_ids
    assert one.tokenizer.decode([*first.token_ids, *letters, STOP, *tail]) == later.text


def test_a_turn_without_a_stop_token_gets_one():
    one = writer()
    drawn = ids(one, "98")
    first, tail, later = follow(one, drawn, MORE)
    assert tail[0] == STOP
    assert (*first.token_ids, *drawn, *tail) == later.token_ids


def test_reasoning_that_the_template_drops_begins_a_new_sequence():
    one = writer(FORGETFUL)
    assert follow(one, [*ids(one, "<think>8 and 90</think>98"), STOP], MORE)[1] is None
    assert follow(one, [*ids(one, "98"), STOP], MORE)[1] is not None


def test_a_call_stays_as_it_was_spelled():
    one = writer((TEMPLATES / "hermes.jinja").read_text())
    result = {"role": "tool", "tool_call_id": "call_0", "name": "zqtool", "content": "14"}
    drawn = [*ids(one, CALL), STOP]
    first, tail, later = follow(one, drawn, result, SCHEMA)
    text = one.tokenizer.decode([*first.token_ids, *drawn, *tail])
    assert CALL in text
    assert CALL not in later.text, "the template spells it in another way"
    assert text.endswith("<tool_response>\n14\n</tool_response><|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("turn", ["<tool_call>{'name': 3}</tool_call>", '<tool_call>{"name": "zqtool"'])
def test_a_faulty_call_is_shown_to_the_policy_as_it_wrote_it(turn):
    one = writer((TEMPLATES / "hermes.jinja").read_text())
    result = {"role": "tool", "tool_call_id": "call_0", "name": "", "content": "error: no JSON"}
    _, tail, later = follow(one, [*ids(one, turn), STOP], result, SCHEMA)
    assert tail is not None
    assert turn in later.text


def test_a_template_that_shows_no_tools_is_refused():
    with pytest.raises(ModelError, match="shows no tools to the model"):
        refuse_template_without_tools(writer().template, {})
    refuse_template_without_tools(writer((TEMPLATES / "hermes.jinja").read_text()).template, {})
