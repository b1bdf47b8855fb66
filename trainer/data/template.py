"""The chat template of a model: which one is used, and text rendered by it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Final, final

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from trainer.config.recipe import BUILTIN_TEMPLATES
from trainer.errors import ModelError

TEMPLATES: Final = Path(__file__).parent / "templates"
TURN_ENDS: Final = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "hermes": "<|im_end|>"}
"""The token with which a built-in template ends a turn; zephyr ends it with the tokenizer's own stop token."""
REMEDY: Final = (
    "Set `model.chat_template` to a Jinja file, or to a built-in template: " + ", ".join(BUILTIN_TEMPLATES) + "."
)
MARKERS: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")
CLOCK: Final = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<format>[^'"]*)(?P=quote)\s*\)""")

PREFILLED: Final = re.compile(r"<think>\s*\Z")
PROBE: Final = "zqprobe"
Messages = Sequence[Mapping[str, Any]]


@final
@dataclass(frozen=True)
class Rendered:
    """A chat as text."""

    text: str
    spans: tuple[tuple[int, int], ...] = ()
    """Character ranges inside `{% generation %}` markers, where the template has some."""


@final
class ChatTemplate:
    """The template that is saved with the tokenizer and served, with its clock stopped at one date."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_date: str) -> None:
        """Take the tokenizer's template.

        Raises:
            ModelError: there is none, or it reads the clock in a way that cannot be stopped.
        """
        self._tokenizer = tokenizer
        own = tokenizer.chat_template
        if own is None:
            raise ModelError(f"the tokenizer has no chat template. {REMEDY}")
        named = own if isinstance(own, dict) else {"default": own}
        self._texts = {name: _at_date(text, date.fromisoformat(on_date)) for name, text in named.items()}
        if "default" not in self._texts:
            raise ModelError(f"the tokenizer's chat templates have no default (they are {', '.join(named)}). {REMEDY}")
        self._takes_parts = not self._shows(PROBE) and self._shows([{"type": "text", "text": PROBE}])
        """Whether content must be a list of parts, as templates of vision-language models may want it."""

    @property
    def has_markers(self) -> bool:
        """Whether the template says itself which text is trained."""
        return MARKERS.search(self._texts["default"]) is not None

    def names(self, variable: str) -> bool:
        """Whether a template mentions a variable."""
        return any(re.search(rf"\b{re.escape(variable)}\b", text) for text in self._texts.values())

    def contains(self, text: str) -> bool:
        """Whether a template has this text."""
        return any(text in each for each in self._texts.values())

    def _shows(self, content: Any) -> bool:
        """Whether the text of a message reaches the rendered text in this form."""
        try:
            text = self._render_as([{"role": "user", "content": content}], None, {}, is_prompt=False).text
        except Exception:  # a template raises whatever its author thought of
            return False
        return PROBE in text

    def prompt(self, messages: Messages, tools: list[Any] | None, arguments: Mapping[str, Any]) -> str:
        """The text that the model is asked to continue after `messages`."""
        return self._render(messages, tools, arguments, is_prompt=True).text

    def chat(self, messages: Messages, tools: list[Any] | None, arguments: Mapping[str, Any]) -> Rendered:
        """The text of `messages` alone."""
        return self._render(messages, tools, arguments, is_prompt=False)

    def _render(
        self, messages: Messages, tools: list[Any] | None, arguments: Mapping[str, Any], *, is_prompt: bool
    ) -> Rendered:
        if self._takes_parts:
            messages = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
        return self._render_as(messages, tools, arguments, is_prompt=is_prompt)

    def _render_as(
        self, messages: Messages, tools: list[Any] | None, arguments: Mapping[str, Any], *, is_prompt: bool
    ) -> Rendered:
        text = self._texts["tool_use"] if tools and "tool_use" in self._texts else self._texts["default"]
        texts, spans = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=text,
            return_assistant_tokens_mask=not is_prompt and MARKERS.search(text) is not None,
            add_generation_prompt=is_prompt,
            **{**self._tokenizer.special_tokens_map, **arguments},
        )
        return Rendered(texts[0], tuple(tuple(span) for span in spans[0]) if spans else ())


def apply_override(tokenizer: PreTrainedTokenizerBase, override: str | None) -> None:
    """Give the tokenizer the template of `model.chat_template`, which is saved with it from then on.

    Args:
        tokenizer: is changed in place.
        override: a Jinja file, the name of a built-in template, or None to keep the tokenizer's own.

    Raises:
        ModelError: the file cannot be read, or the tokenizer lacks the end-of-turn token of a built-in template.
    """
    if override is None:
        return
    is_builtin = override in BUILTIN_TEMPLATES and not Path(override).is_file()
    try:
        file = TEMPLATES / f"{override}.jinja" if is_builtin else Path(override)
        template = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"model.chat_template: {override}: cannot be read: {error}") from None
    if is_builtin and override in TURN_ENDS:
        end = TURN_ENDS[override]
        if end not in tokenizer.get_vocab():
            raise ModelError(
                f"model.chat_template: {override} ends turns with {end}, which is no token of this tokenizer. "
                "Use `zephyr`, which ends them with the tokenizer's own stop token."
            )
        tokenizer.eos_token = end
    tokenizer.chat_template = template


def _at_date(template: str, day: date) -> str:
    """The template with the date written in where it reads the clock."""
    text = CLOCK.sub(lambda found: repr(day.strftime(found["format"])), template)
    if "strftime_now(" in text.replace(" ", ""):
        raise ModelError(
            "the chat template reads the clock in a way that cannot be set to data.template_date, so the same recipe "
            f"would give other tokens tomorrow. {REMEDY}"
        )
    return text


def opened_thinking(prompt: str) -> str:
    r"""The thinking that a prompt opens for the answer, such as `<think>` (DeepSeek R1, Qwen3.5); empty if none.

    >>> opened_thinking("Hi<|im_start|>assistant\n<think>\n"), opened_thinking("<think>\n\n</think>\n\n")
    ('<think>\n', '')

    Args:
        prompt: its text, or the end of it.
    """
    found = PREFILLED.search(prompt)
    return found[0] if found is not None else ""
