"""From rows to tokens: what is trained, read back as text, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl
from tiny import tiny_tokenizer
from tokenizers import processors

from trainer.config.recipe import DataSettings, DataSource, ModelSettings
from trainer.data.chat import ChatEncoder, load_tokenizer
from trainer.data.tokens import TokenInputs, TokenSequence
from trainer.errors import DataError
from trainer.types import Row

SMOLLM2 = Path("models/SmolLM2-135M-Instruct")
QWEN3 = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}],
}


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **fields) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


def make_encoder(template: str | None = None, tokenizer=None, **data) -> ChatEncoder:
    """An encoder of the tiny tokenizer; its template is SmolLM2's unless another is given."""
    tokenizer = tokenizer or tiny_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    return ChatEncoder(tokenizer, ModelSettings(path="nowhere"), DataSettings(train=DataSource(path="x"), **data))


def rows_of(*fields) -> list[Row]:
    return [Row(field, file="rows.jsonl", line=line, index=line - 1) for line, field in enumerate(fields, start=1)]


def encode(encoder: ChatEncoder, fields: dict[str, Any]) -> TokenSequence:
    (sequence,) = encoder.encode(rows_of(fields)).sequences
    return sequence


def read(encoder: ChatEncoder, fields: dict[str, Any]) -> tuple[str, str]:
    """The whole row and its trained tokens, decoded."""
    sequence = encode(encoder, fields)
    trained = [token for token, is_trained in zip(sequence.token_ids, sequence.loss_mask, strict=True) if is_trained]
    return encoder.tokenizer.decode(sequence.token_ids), encoder.tokenizer.decode(trained)


CHAT = [user("Is it?"), assistant("It is."), user("So?"), assistant("Yes,  so\n 猫.")]


def test_every_assistant_turn_is_trained_with_its_stop_token():
    whole, trained = read(make_encoder(), {"messages": CHAT})
    assert whole == (
        SYSTEM + "<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\nIt is.<|im_end|>\n"
        "<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\nYes,  so\n 猫.<|im_end|>\n"
    )
    assert trained == "It is.<|im_end|>Yes,  so\n 猫.<|im_end|>"


@pytest.mark.parametrize(
    ("weights", "trained"),
    [
        ((0, 1), "Yes,  so\n 猫.<|im_end|>"),
        ((1, 1), "It is.<|im_end|>Yes,  so\n 猫.<|im_end|>"),
        ((None, 1), "It is.<|im_end|>Yes,  so\n 猫.<|im_end|>"),
    ],
)
def test_a_message_of_weight_0_is_not_trained(weights, trained):
    chat = [{**message} for message in CHAT]
    chat[1]["weight"], chat[3]["weight"] = weights
    assert read(make_encoder(), {"messages": chat})[1] == trained


def test_the_weight_of_a_user_message_changes_nothing():
    chat = [{**CHAT[0], "weight": 1}, *CHAT[1:]]
    assert read(make_encoder(), {"messages": chat}) == read(make_encoder(), {"messages": CHAT})


def test_the_weight_of_a_row_is_the_weight_of_each_trained_token():
    assert encode(make_encoder(), {"prompt": "a", "completion": "b", "weight": 0.25}).inputs == TokenInputs(
        weights=(0.25, 0.25)
    )
    assert encode(make_encoder(), {"prompt": "a", "completion": "b"}).inputs == TokenInputs(weights=(1.0, 1.0))


def test_the_system_message_of_the_recipe_replaces_the_default_of_the_template():
    whole, trained = read(make_encoder(system="Be brief."), {"prompt": "a", "completion": "b"})
    assert whole == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    )
    assert trained == "b<|im_end|>"


def test_prompt_and_completion_are_the_same_row_as_messages():
    encoder = make_encoder()
    one = encode(encoder, {"prompt": "a", "completion": "b"})
    assert one == encode(encoder, {"messages": [user("a"), assistant("b")]})
    assert one == encode(encoder, {"prompt": [user("a")], "completion": [assistant("b")]})
    assert one == encode(encoder, {"messages": [user([{"type": "text", "text": "a"}]), assistant("b")]})


def test_rows_encoded_together_are_the_rows_encoded_alone(monkeypatch):
    monkeypatch.setattr("trainer.data.chat.ENCODE_ROWS", 3)
    encoder = make_encoder()
    fields = [{"prompt": "a" * number, "completion": f"{number}"} for number in range(1, 8)]
    encoded = encoder.encode(rows_of(*fields))
    assert encoded.num_rows == 7
    assert [sequence.token_ids for sequence in encoded.sequences] == [encode(encoder, row).token_ids for row in fields]
    assert [sequence.source for sequence in encoded.sequences] == [f"rows.jsonl:{line}" for line in range(1, 8)]


def test_tools_and_calls_are_rendered_and_the_call_is_trained():
    encoder = make_encoder(QWEN3)
    chat = [user("1+2?"), CALL, {"role": "tool", "content": "3"}, assistant("It is 3.")]
    encoded = encoder.encode(rows_of({"messages": chat, "tools": TOOLS}))
    # Qwen3 leaves the empty reasoning out of earlier turns, so the two turns stand behind different tokens.
    call, answer = ([encoder.tokenizer.decode(part) for part in parts_of(each)] for each in encoded.sequences)
    assert (encoded.num_rows, encoded.num_split) == (1, 1)
    assert '<tools>\n{"type": "function", "function": {"name": "add"' in call[0]
    assert call[1] == (
        '<think>\n\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>'
    )
    assert "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n" in answer[0]
    assert "<think>" not in answer[0]
    assert answer[1] == "<think>\n\n</think>\n\nIt is 3.<|im_end|>"


def parts_of(sequence: TokenSequence) -> tuple[list[int], list[int]]:
    """Ids that are not trained, and ids that are."""
    pairs = list(zip(sequence.token_ids, sequence.loss_mask, strict=True))
    return [token for token, own in pairs if not own], [token for token, own in pairs if own]


def test_a_row_may_end_with_a_tool_call():
    assert read(make_encoder(QWEN3), {"messages": [user("1+2?"), CALL]})[1].endswith("</tool_call><|im_end|>")


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [user("1+2?"), CALL]},
        {"prompt": "1+2?", "completion": "3", "tools": TOOLS},
    ],
    ids=["calls", "tools"],
)
def test_a_template_that_knows_no_tools_refuses_them(fields):
    with pytest.raises(DataError, match=r"^rows.jsonl:1: the chat template leaves out the tool 'add'"):
        encode(make_encoder(), fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tools": "[]"}, r"`tools` must be a list \(got str\)"),
        ({"tools": [{"name": "add"}]}, r"tools\[0\] needs function.name \(got \{'name': 'add'\}\)"),
        ({"tools": [TOOLS[0], 5]}, r"tools\[1\] needs function.name \(got 5\)"),
        ({"messages": [user("?"), assistant("", tool_calls=[{"name": "add"}])]}, "a tool call needs function.name"),
        (
            {"messages": [user("?"), assistant("", tool_calls=[{"function": {"name": "add", "arguments": "{a"}}])]},
            "a tool call needs function.name and JSON arguments",
        ),
        ({"completion": ""}, "an assistant turn is empty. Remove it or the row"),
        ({"completion": " \n"}, "an assistant turn is empty"),
        ({"messages": [user("a"), assistant(""), user("b"), assistant("c")]}, "an assistant turn is empty"),
        ({"completion": "half \ud83d"}, r"'\\ud83d' is half a character"),
        ({"weight": 0}, r"no token would be trained \(weight 0\)"),
    ],
)
def test_rows_that_teach_nothing_or_nonsense_are_refused(fields, message):
    row = fields if "messages" in fields else {"prompt": "a", "completion": "b", **fields}
    with pytest.raises(DataError, match="^rows.jsonl:1: .*" + message):
        encode(make_encoder(QWEN3), row)


def test_an_empty_turn_that_is_not_trained_is_a_turn():
    chat = [user("a"), assistant("", weight=0), user("b"), assistant("c")]
    assert read(make_encoder(), {"messages": chat})[1] == "c<|im_end|>"


def test_what_the_template_raises_is_told_with_the_row():
    raising = (
        "{% for m in messages %}{% if m['content'] == 'bad' %}{{ raise_exception('no bad words') }}{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    with pytest.raises(DataError, match=r"rows.jsonl:1: the chat template refuses the row: no bad words"):
        encode(make_encoder(raising), {"prompt": "bad", "completion": "b"})


def test_tokens_of_spaces_are_trained_where_the_tokenizer_trims_offsets():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=True)
    code = "  x =  1\n\n  y\n "
    assert read(make_encoder(tokenizer=tokenizer), {"prompt": " a ", "completion": code})[1] == code + "<|im_end|>"


LONG = {"prompt": "a", "completion": "b c d e f g h"}
SHORT = {"prompt": "a", "completion": "b"}


@pytest.fixture
def short_length() -> int:
    return len(encode(make_encoder(), SHORT).token_ids)


def test_a_row_that_is_too_long_is_an_error_by_default(short_length):
    assert make_encoder(max_seq_tokens=short_length).encode(rows_of(SHORT)).num_rows == 1  # the limit itself fits
    message = rf"rows.jsonl:2: \d+ tokens are more than data.max_seq_tokens \({short_length}\). Raise it, or set"
    with pytest.raises(DataError, match=message):
        make_encoder(max_seq_tokens=short_length).encode(rows_of(SHORT, LONG))


def test_overlong_rows_are_dropped_and_counted(short_length):
    encoded = make_encoder(max_seq_tokens=short_length, overlong="drop").encode(rows_of(LONG, SHORT, LONG))
    assert [sequence.source for sequence in encoded.sequences] == ["rows.jsonl:2"]
    assert (encoded.num_rows, encoded.num_dropped, encoded.num_truncated) == (3, 2, 0)


def test_overlong_rows_are_truncated_and_counted(short_length):
    encoder = make_encoder(max_seq_tokens=short_length, overlong="truncate")
    too_long_prompt = {"prompt": "a b c d e f g h", "completion": "x"}  # nothing trained is left of it
    encoded = encoder.encode(rows_of(LONG, SHORT, too_long_prompt))
    assert (encoded.num_rows, encoded.num_dropped, encoded.num_truncated) == (3, 1, 1)
    cut, whole = encoded.sequences
    assert len(cut.token_ids) == short_length
    assert encoder.tokenizer.decode(cut.token_ids).endswith("assistant\nb c")  # and no stop token
    assert len(cut.inputs.weights) == cut.num_trained == 3
    assert encoder.tokenizer.decode(whole.token_ids).endswith("b<|im_end|>\n")


def test_no_row_within_the_limit_is_refused():
    with pytest.raises(DataError, match=r"none of 2 rows is within data.max_seq_tokens \(4\)"):
        make_encoder(max_seq_tokens=4, overlong="drop").encode(rows_of(SHORT, LONG))


def test_plain_text_trains_the_completion_and_the_stop_token():
    whole, trained = read(make_encoder(format="text"), {"prompt": "1+1=", "completion": " 2", "weight": 3})
    assert whole == "1+1= 2<|im_end|>"
    assert trained == " 2<|im_end|>"


def test_plain_text_needs_no_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    assert read(make_encoder(tokenizer=tokenizer, format="text"), SHORT)[1] == "b<|im_end|>"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": CHAT}, "`format: text` needs the texts `prompt` and `completion`"),
        ({"prompt": [user("a")], "completion": "b"}, "`format: text` needs the texts"),
        ({"prompt": "a", "completion": " "}, "the completion is empty"),
    ],
)
def test_plain_text_refuses_what_is_none(fields, message):
    with pytest.raises(DataError, match="^rows.jsonl:1: " + message):
        encode(make_encoder(format="text"), fields)


def test_plain_text_of_a_tokenizer_that_adds_a_begin_token_has_it_once():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    encoder = make_encoder(tokenizer=tokenizer, format="text")
    assert read(encoder, SHORT) == ("<|im_start|>ab<|im_end|>", "b<|im_end|>")
    with pytest.raises(
        DataError, match=r"rows.jsonl:1: begins with two <\|im_start\|> tokens; change the chat template or the row"
    ):
        encode(encoder, {"prompt": "<|im_start|>a", "completion": "b"})


def test_an_rft_prompt_ends_where_the_model_goes_on():
    encoder = make_encoder()
    (row,) = rows_of({"prompt": "1+1?", "answer": "2"})
    text = encoder.tokenizer.decode(encoder.encode_prompt(row))
    assert text == SYSTEM + "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    trained_on = encode(encoder, {"prompt": "1+1?", "completion": "2"}).token_ids
    assert trained_on[: len(encoder.encode_prompt(row))] == encoder.encode_prompt(row)


def test_an_rft_prompt_without_room_for_a_completion_is_refused():
    with pytest.raises(DataError, match=r"rows.jsonl:1: the prompt has \d+ tokens; data.max_seq_tokens is 8"):
        make_encoder(max_seq_tokens=8).encode_prompt(rows_of({"prompt": "1+1?"})[0])


@pytest.mark.model
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason=f"{SMOLLM2} is not there; scripts/quickstart makes it")
def test_smollm2_is_trained_on_the_text_its_own_template_renders():
    settings = ModelSettings(path=str(SMOLLM2))
    tokenizer = load_tokenizer(settings)
    encoder = ChatEncoder(tokenizer, settings, DataSettings(train=DataSource(path="x")))
    for chat in (CHAT, [{"role": "system", "content": "Be brief."}, *CHAT[:2]]):
        own = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
        sequence = encode(encoder, {"messages": chat})
        assert list(sequence.token_ids) == list(own)
    assert read(encoder, {"messages": CHAT})[1] == "It is.<|im_end|>Yes,  so\n 猫.<|im_end|>"
    assert encoder.stop_ids == {2}


@pytest.mark.parametrize(
    ("opening", "prefilled"),
    [
        ("<think>\n", "<think>\n"),  # DeepSeek R1, Qwen3.5
        ("<think>", "<think>"),
        ("<think>\n\n</think>\n\n", ""),  # Qwen3 with `enable_thinking: false`: nothing is left to be thought
        ("", ""),
    ],
)
def test_thinking_that_the_prompt_opens_is_found(opening, prefilled):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n" + opening.replace("\n", "{{ '\\n' }}") + "{% endif %}"
    )
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    data = DataSettings(train=DataSource(path="x"))
    encoder = ChatEncoder(tokenizer, ModelSettings(path="nowhere"), data, for_prompts=True)
    row = Row({"messages": [user("write <think> please")]}, "rows.jsonl", 1)
    assert encoder.prefilled(encoder.encode_prompt(row)) == prefilled
