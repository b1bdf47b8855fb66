"""A writer of prompts with a tiny tokenizer, for tests of conversations."""

from __future__ import annotations

from tiny import tiny_tokenizer

from trainer.data.next_prompt import PromptWriter
from trainer.data.template import ChatTemplate
from trainer.environments.tool_calls import same_turn

STOP = 2
"""Id of the stop token."""
FORGETFUL = """{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{{ message['content'].split('</think>')[-1] if message['role'] == 'assistant' else message['content'] }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""
"""Drops earlier reasoning, as templates of thinking models do."""


def writer(template: str | None = None) -> PromptWriter:
    tokenizer = tiny_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    return PromptWriter(tokenizer, ChatTemplate(tokenizer, "2026-01-01"), frozenset({STOP}), {}, same_turn)


def ids(one: PromptWriter, text: str) -> list[int]:
    encoded: list[int] = one.tokenizer(text, add_special_tokens=False)["input_ids"]
    return encoded
