"""Choosing a chat template: the ones that cannot be trained with are refused with a remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
import trl
from tiny import tiny_tokenizer
from transformers import GenerationConfig

from trainer.config.recipe import DataSettings, DataSource, ModelSettings
from trainer.data.chat import ChatEncoder, load_tokenizer
from trainer.errors import DataError, ModelError
from trainer.types import Row

TRL = Path(trl.__file__).parent / "chat_templates"

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
UNMARKED = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
REMEDY = (
    r"Set `model.chat_template` to a Jinja file, or to a built-in template: chatml, llama3, gemma, zephyr, hermes\.$"
)


def make_encoder(template=None, *, tokenizer=None, path: str = "nowhere", override=None) -> ChatEncoder:
    tokenizer = tokenizer or tiny_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    settings = ModelSettings(path=path, chat_template=None if override is None else str(override))
    return ChatEncoder(tokenizer, settings, DataSettings(train=DataSource(path="x")))


def trained_text(encoder: ChatEncoder) -> str:
    (sequence,) = encoder.encode([Row({"prompt": "a", "completion": "b"})]).sequences
    trained = [token for token, is_trained in zip(sequence.token_ids, sequence.loss_mask, strict=True) if is_trained]
    return encoder.tokenizer.decode(trained)


@pytest.mark.parametrize(
    ("template", "trained"),
    [
        (CHATML, "b<|im_end|>"),
        ({"default": CHATML, "tool_use": UNMARKED}, "b<|im_end|>"),  # named variants: the default one
        ((TRL / "qwen3.jinja").read_text(encoding="utf-8"), "<think>\n\n</think>\n\nb<|im_end|>"),
        ((TRL / "qwen3_instruct_2507.jinja").read_text(encoding="utf-8"), "b<|im_end|>"),
        (UNMARKED, "b<|im_end|>"),
    ],
    ids=["marked", "variants", "qwen3", "qwen3-2507", "unmarked"],
)
def test_the_answer_and_its_stop_token_are_trained(template, trained):
    assert trained_text(make_encoder(template)) == trained


@pytest.mark.parametrize(
    ("name", "specials", "end"),
    [
        ("llama3", ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>"),
        ("gemma3", ["<bos>", "<start_of_turn>", "<end_of_turn>"], "<end_of_turn>"),
    ],
)
def test_templates_of_other_families_train_the_answer_and_their_stop_token(name, specials, end):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": specials, "bos_token": specials[0], "eos_token": end})
    template = (TRL / f"{name}.jinja").read_text(encoding="utf-8")
    assert trained_text(make_encoder(template, tokenizer=tokenizer)).rstrip("\n") == "b" + end


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            CHATML.replace("+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}{{ '<|im_end|>' }}"),
            r"the chat template never trains its stop token: the model would not end\. Put it inside the `",
        ),
        (
            "{{ messages | length }}" + CHATML,
            r"the chat template is not prefix-preserving: earlier turns read otherwise when later ones follow\. "
            + REMEDY,
        ),
        (
            CHATML.replace("{% if add", "{% if add_generation_prompt %}{{ 'Think. ' }}{% endif %}{% if add"),
            r"the chat template trains on another prompt than the model is asked with\. " + REMEDY,
        ),
        (CHATML + "{{ nothing.of.this }}", r"the chat template cannot render a plain chat: .*undefined.*\. " + REMEDY),
        (CHATML + "{% if %}", r"the chat template cannot render a plain chat: Expected an expression.*\. " + REMEDY),
    ],
    ids=["stop-not-trained", "not-prefix-preserving", "other-prompt", "undefined", "no-jinja"],
)
def test_templates_that_cannot_be_trained_with_are_refused_with_a_remedy(template, message):
    with pytest.raises(ModelError, match=message):
        make_encoder(template)


def test_a_tokenizer_without_a_template_is_refused_with_a_remedy():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match=r"the tokenizer has no chat template\. " + REMEDY):
        make_encoder(tokenizer=tokenizer)


def test_a_turn_that_the_template_rewrites_once_its_tool_has_answered_stands_in_a_sequence_of_its_own():
    forgetting = CHATML.replace(
        "{% generation %}{{ m['content']",
        "{% generation %}{% for c in m.tool_calls or [] %}{{ c.function.name ~ c.function.arguments | tojson }}"
        "{% endfor %}{{ 'thought ' if m.tool_calls and loop.last }}{{ m['content']",
    )
    encoder = make_encoder(forgetting)
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
    chat = [
        {"role": "user", "content": "a"},
        call,
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "b"},
    ]
    first, second = (
        encoder.tokenizer.decode(each.token_ids) for each in encoder.encode([Row({"messages": chat})]).sequences
    )
    assert first.endswith('assistant\nadd{"a": 1}thought <|im_end|>\n')
    assert second.endswith(
        'assistant\nadd{"a": 1}<|im_end|>\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n'
    )


def test_two_begin_tokens_are_refused():
    with pytest.raises(
        (DataError, ModelError), match=r"begins with two <\|im_start\|> tokens; change the chat template"
    ):
        make_encoder("{{ bos_token }}" + CHATML)


@pytest.mark.parametrize(
    "template", [CHATML, (TRL / "qwen3.jinja").read_text(encoding="utf-8")], ids=["plain", "qwen3"]
)
def test_training_another_stop_token_than_generation_stops_at_is_refused(template):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    message = (
        r"training ends a turn with '<\|im_end\|>', but generation stops at \['<\|endoftext\|>'\]. "
        "Set eos_token_id in the model's generation_config.json, or another chat template."
    )
    with pytest.raises(ModelError, match=message):
        make_encoder(template, tokenizer=tokenizer)


@pytest.mark.parametrize("stop", [2, [0, 2]], ids=["one", "several"])
def test_generation_config_names_stop_tokens_too(tmp_path, stop):
    GenerationConfig(eos_token_id=stop).save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    assert make_encoder(tokenizer=tokenizer, path=str(tmp_path)).stop_ids == {0, 2}


def test_a_model_without_a_stop_token_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match=r"nowhere: knows no stop token; set eos_token in tokenizer_config.json"):
        make_encoder(tokenizer=tokenizer)


def test_a_file_replaces_the_template(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(CHATML.replace("<|im_start|>", "<|im_start|>the "), encoding="utf-8")
    encoder = make_encoder(UNMARKED, override=file)
    assert trained_text(encoder) == "b<|im_end|>"
    prompt = encoder.tokenizer.decode(encoder.encode_prompt(Row({"prompt": "a"})))
    assert prompt == "<|im_start|>the user\na<|im_end|>\n<|im_start|>the assistant\n"
    # It is saved with the tokenizer, so that the adapter is asked as it was trained.
    assert encoder.tokenizer.chat_template == file.read_text(encoding="utf-8")


def test_a_file_needs_no_markers(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(UNMARKED, encoding="utf-8")
    assert trained_text(make_encoder(override=file)) == "b<|im_end|>"


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"model.chat_template: .*gone.jinja: cannot be read"):
        make_encoder(override=tmp_path / "gone.jinja")


def test_the_tokenizer_keeps_its_own_template():
    # What is published with the adapter renders as the model's own, without our markers.
    tokenizer = tiny_tokenizer()
    own = tokenizer.chat_template
    encoder = make_encoder(tokenizer=tokenizer)
    assert tokenizer.chat_template == own
    assert trained_text(encoder) == "b<|im_end|>"
    assert "generation %}" not in own


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="needs a fast tokenizer"):
        make_encoder(tokenizer=Slow())


@pytest.mark.parametrize("content", [None, "{"], ids=["no-tokenizer", "no-directory"])
def test_a_directory_without_a_tokenizer_is_refused(tmp_path, content):
    directory = tmp_path if content is None else tmp_path / "gone"
    with pytest.raises(ModelError, match="no tokenizer can be loaded"):
        load_tokenizer(ModelSettings(path=str(directory)))
