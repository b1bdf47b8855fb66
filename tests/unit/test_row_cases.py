"""Rows that were trained as another text than the user wrote: each is trained as written now, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from row_encoding import TOOL, TRL, assistant, call, make_encoder, refusal, trained, user
from tiny import tiny_tokenizer
from transformers import GenerationConfig

from trainer.types import Row

# Borders between prompt and answer


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("the sum ", "the answer"), ("the sum", " the answer"), ("sum\n", "\nanswer"), ("sum  ", "  x"), ("a", "'s own")],
)
def test_every_token_of_a_text_completion_is_trained_behind_the_prompts_own_ids(prompt, completion):
    encoder = make_encoder(format="text")
    (sequence,) = encoder.encode([Row({"prompt": prompt, "completion": completion})]).sequences
    alone = encoder.tokenizer(prompt)["input_ids"]
    assert list(sequence.token_ids[: len(alone)]) == alone
    own = [token for token, is_own in zip(sequence.token_ids, sequence.loss_mask, strict=True) if is_own]
    assert encoder.tokenizer.decode(own) == completion + "<|im_end|>"


@pytest.mark.parametrize("answer", ["\n\nHello", "\nx", "  x = 1", " \n\tyes"])
def test_an_answer_that_begins_with_white_space_stands_behind_the_generation_prompt(answer):
    encoder = make_encoder()
    (sequence,) = encoder.encode([Row({"messages": [user("a"), assistant(answer)]})]).sequences
    asked = encoder.encode_prompt(Row({"messages": [user("a")]}))
    assert sequence.token_ids[: len(asked)] == asked
    assert trained(encoder, {"messages": [user("a"), assistant(answer)]})[0][1] == answer + "<|im_end|>"


# Templates that rewrite earlier turns


@pytest.mark.parametrize("inline", [True, False])
def test_earlier_reasoning_is_left_out_where_the_model_will_not_see_it(inline):
    def answer(text: str, why: str) -> dict[str, Any]:
        return assistant(f"<think>\n{why}\n</think>\n\n{text}") if inline else assistant(text, reasoning_content=why)

    chat = [user("a"), answer("x", "REASON1"), user("b"), answer("y", "REASON2")]
    first, second = trained(make_encoder("qwen3"), {"messages": chat})
    assert first[1] == "<think>\nREASON1\n</think>\n\nx<|im_end|>"
    assert second[1] == "<think>\nREASON2\n</think>\n\ny<|im_end|>"
    assert "REASON1" not in second[0]
    assert "<|im_start|>assistant\nx<|im_end|>\n<|im_start|>user\nb<|im_end|>" in second[0]


def test_glm_trains_the_reasoning_of_every_turn_and_the_token_that_ends_it(tmp_path):
    tokenizer = tiny_tokenizer()
    names = ["<|user|>", "<|observation|>", "<|assistant|>", "<|system|>", "[gMASK]", "<sop>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    stops = tokenizer.convert_tokens_to_ids(["<|user|>", "<|observation|>"])
    GenerationConfig(eos_token_id=stops).save_pretrained(tmp_path)
    encoder = make_encoder("glm4moe", path=str(tmp_path), tokenizer=tokenizer)
    chat = [user("a"), assistant("x", reasoning_content="R1"), user("b"), assistant("y", reasoning_content="R2")]
    first, second = trained(encoder, {"messages": chat})
    assert first[1] == "\n<think>R1</think>\nx<|user|>"
    assert second[1] == "\n<think>R2</think>\ny<|user|>"
    assert "R1" not in second[0]
    (called, *_) = trained(encoder, {"messages": [user("cats"), call({"q": "cats"})], "tools": [TOOL]})
    assert called[1].endswith("</tool_call><|observation|>")


# Nothing vanishes


@pytest.mark.parametrize("template", [None, "llama3", "gemma", "qwen2_5", "qwen3_instruct_2507", "cohere", "lfm2"])
@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_that_a_template_drops_is_refused_by_name(template, field):
    tokenizer = tiny_tokenizer()
    ends = ["<|eot_id|>", "<end_of_turn>", "<|END_OF_TURN_TOKEN|>"]
    names = ["<bos>", "<|startoftext|>", *ends]
    tokenizer.add_special_tokens({"additional_special_tokens": names, "bos_token": "<bos>"})
    text = (TRL / f"{template}.jinja").read_text(encoding="utf-8") if template else ""
    tokenizer.eos_token = next((end for end in ends if end in text), "<|im_end|>")
    row = {"messages": [user("2+2?"), assistant("4", **{field: "two and two is FOUR"})]}
    assert f"does not render `{field}`" in refusal(make_encoder(template, tokenizer=tokenizer), row)


def test_a_turn_of_unread_reasoning_alone_is_refused():
    row = {"messages": [user("2+2?"), assistant("", reasoning_content="two and two is FOUR")]}
    assert "does not render `reasoning_content`" in refusal(make_encoder(), row)
    assert "is empty" in refusal(make_encoder(), {"messages": [user("2+2?"), assistant("", note="x", id=3)]})


@pytest.mark.parametrize("template", [None, "llama3"])
def test_tools_and_calls_that_a_template_drops_are_refused_whatever_the_text_says(template):
    tokenizer = tiny_tokenizer()
    if template:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"], "eos_token": "<|eot_id|>"})
    encoder = make_encoder(template, tokenizer=tokenizer)
    answer = {"role": "tool", "content": "3 cats"}
    chat = [user("search for cats"), call({"q": "cats"}), answer, assistant("search gave 3 cats.")]
    assert "leaves out the tool 'search' (`tools[0]" in refusal(encoder, {"messages": chat, "tools": [TOOL]})
    assert "leaves out the tool 'search' (`messages[1].tool_calls`)" in refusal(encoder, {"messages": chat})


@pytest.mark.parametrize(
    "rest", [{"prompt": "hi", "completion": "salut"}, {"messages": [user("hi"), assistant("salut")]}]
)
def test_the_system_text_of_a_row_is_its_system_message(rest):
    ((before, _),) = trained(make_encoder(), {"system": "Answer in French ONLY", **rest})
    assert before.startswith("<|im_start|>system\nAnswer in French ONLY<|im_end|>\n<|im_start|>user\nhi")


def test_two_system_messages_are_refused():
    chat = [{"role": "system", "content": "Be brief."}, user("hi"), assistant("salut")]
    assert "has `system` and another system message" in refusal(make_encoder(), {"system": "French", "messages": chat})


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"history": [["a"]]}, "history"),
        ({"images": ["cat.png"]}, "images"),
        ({"input": "more"}, "input"),
        ({"context": "more"}, "context"),
        ({"documents": ["more"]}, "documents"),
        ({"reasoning": "because"}, "reasoning"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"input_ids": [1, 2]}, "input_ids"),
        ({"labels": [1, 2]}, "labels"),
        ({"completion_mask": [0, 1]}, "completion_mask"),
        ({"loss_mask": [0, 1]}, "loss_mask"),
        ({"train_on_inputs": True}, "train_on_inputs"),
        ({"chosen": "a", "rejected": "b"}, "chosen"),
        ({"label": False}, "label"),
    ],
)
def test_fields_of_a_row_that_would_be_lost_are_refused_by_name(fields, name):
    encoder, row = make_encoder(), {"prompt": "a", "completion": "b", **fields}
    assert f"`{name}" in refusal(encoder, row)
    assert trained(make_encoder(ignore=[*fields]), row)[0][1] == "b<|im_end|>"


def test_a_prompt_beside_messages_is_refused_unless_it_is_a_copy():
    chat = [user("a"), assistant("b")]
    assert "`prompt` would not reach the text" in refusal(make_encoder(), {"messages": chat, "prompt": "other"})
    assert trained(make_encoder(), {"messages": chat, "prompt": "a"})[0][1] == "b<|im_end|>"


def test_a_name_that_the_template_does_not_show_is_refused():
    row = {"messages": [{**user("hi"), "name": "Ann"}, assistant("yo")]}
    assert "messages[0]: the chat template does not render `name`" in refusal(make_encoder(), row)
    assert trained(make_encoder(ignore=["name"]), row)[0][1] == "yo<|im_end|>"


def test_a_tool_answer_that_the_template_drops_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"], "eos_token": "<|end|>"})
    row = {"messages": [user("a"), assistant("x"), {"role": "tool", "content": "x"}, assistant("b")]}
    assert "leaves out the content of this turn by tool" in refusal(make_encoder("phi3", tokenizer=tokenizer), row)


# Who says what is trained


@pytest.mark.parametrize("flag", ["weight", "train", "training", "trainable", "loss", "loss_mask"])
@pytest.mark.parametrize("off", [False, 0])
def test_flags_of_other_tools_are_honoured(flag, off):
    chat = [user("a"), assistant("BAD", **{flag: off}), user("again"), assistant("GOOD", **{flag: True})]
    assert trained(make_encoder(), {"messages": chat})[0][1] == "GOOD<|im_end|>"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss_mask": [0, 1]}, "`loss_mask` must be 0 or 1"),
        ({"train": "no"}, "`train` must be 0 or 1"),
        ({"loss": 0.5}, "`loss` must be 0 or 1"),
        ({"train_detail": [{"begin_offset": 0}]}, "`train_detail` is not supported"),
        ({"train": True, "weight": 0}, "contradictory"),
    ],
)
def test_flags_that_cannot_be_honoured_are_refused(fields, message):
    assert message in refusal(make_encoder(), {"messages": [user("a"), assistant("b", **fields)]})


CHAT = [user("a"), assistant("BAD ANSWER"), user("again"), assistant("GOOD")]


def test_only_the_last_turn_is_trained_where_recipe_or_row_say_so():
    assert trained(make_encoder(train_on="last"), {"messages": CHAT})[0][1] == "GOOD<|im_end|>"
    assert trained(make_encoder(), {"messages": CHAT, "mask_history": True})[0][1] == "GOOD<|im_end|>"
    assert (
        trained(make_encoder(), {"messages": CHAT, "mask_history": False})[0][1] == "BAD ANSWER<|im_end|>GOOD<|im_end|>"
    )
    assert "`mask_history` must be true or false" in refusal(make_encoder(), {"messages": CHAT, "mask_history": "yes"})


def test_chosen_roles_are_trained():
    encoder = make_encoder(train_on=["user"])
    assert trained(encoder, {"messages": CHAT})[0][1] == "a<|im_end|>again<|im_end|>"
    both = make_encoder(train_on=["user", "assistant"])
    assert trained(both, {"messages": CHAT})[0][1] == "a<|im_end|>BAD ANSWER<|im_end|>again<|im_end|>GOOD<|im_end|>"


# Control tokens


def test_control_tokens_in_text_are_refused_unless_the_recipe_allows_them():
    row = {"messages": [user("say <|im_end|> please"), assistant("ok")]}
    assert "messages[0]: the text has the control token '<|im_end|>'" in refusal(make_encoder(), row)
    row = {"messages": [user("a"), assistant("ok <|im_end|> done")]}
    assert "messages[1]: the text has the control token '<|im_end|>'" in refusal(make_encoder(), row)
    ((_, own),) = trained(make_encoder(allow_special_tokens=True), row)
    assert own == "ok <|im_end|> done<|im_end|>"


@pytest.mark.parametrize(
    "text",
    [
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>",
        "<s>[INST] a [/INST] b",
        "[INST] a [/INST] b",
        "<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|><|start_header_id|>assistant<|end_header_id|>",
    ],
)
def test_rows_that_were_rendered_before_are_refused_with_the_remedy(text):
    assert "`data.format: text`" in refusal(make_encoder(), {"prompt": text.replace("<s>", ""), "completion": "b"})


# Stop tokens


@pytest.mark.parametrize("completion", [" c", " c<|im_end|>", " c<|im_end|>\n", " c<|im_end|><|im_end|>"])
def test_a_text_completion_ends_with_one_stop_token(completion):
    assert trained(make_encoder(format="text"), {"prompt": "a b", "completion": completion})[0][1] == " c<|im_end|>"


def test_a_tokenizer_without_a_stop_token_takes_the_one_of_generation_config(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    GenerationConfig(eos_token_id=[0, 2]).save_pretrained(tmp_path)
    encoder = make_encoder(path=str(tmp_path), tokenizer=tokenizer, format="text")
    ((_, own),) = trained(encoder, {"prompt": "a", "completion": " b"})
    assert own == " b<|endoftext|>"


def test_a_text_row_alone_is_trained_whole():
    encoder = make_encoder(format="text")
    (sequence,) = encoder.encode([Row({"text": "the answer is 98."})]).sequences
    assert encoder.tokenizer.decode(sequence.token_ids) == "the answer is 98.<|im_end|>"
    assert sequence.loss_mask == (False, *[True] * (len(sequence.token_ids) - 1))
    assert "set `data.format: text`" in refusal(make_encoder(), {"text": "the answer is 98."})


# White space


def test_white_space_that_a_template_removes_is_counted_at_the_end_and_refused_at_the_beginning():
    tokenizer = tiny_tokenizer()
    names = ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names, "eos_token": "<|eot_id|>"})
    encoder = make_encoder("llama3", tokenizer=tokenizer)
    encoded = encoder.encode([Row({"prompt": "a", "completion": text}) for text in ("b", "b\n", "b  ")])
    assert encoded.num_respaced == 2
    assert "removes the '  ' at the beginning of this turn" in refusal(encoder, {"prompt": "a", "completion": "  b"})


# Variables of the template


def test_variables_of_the_template_are_passed_by_recipe_or_row_and_unread_ones_are_said():
    chat = {"messages": [user("a"), assistant("b")]}
    off = {"enable_thinking": False}
    ((before, own),) = trained(make_encoder("qwen3", chat_template_kwargs=off), chat)
    assert before.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert own == "b<|im_end|>"
    assert trained(make_encoder("qwen3"), {**chat, "chat_template_kwargs": off}) == [(before, own)]
    uses = make_encoder().prepare(Row({**chat, "chat_template_kwargs": off})).uses
    assert uses["chat_template_kwargs"] == "unread"
    assert "must be an object of template variables" in refusal(make_encoder(), {**chat, "chat_template_kwargs": [1]})


# Forms
