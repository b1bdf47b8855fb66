"""Choosing a chat template that says which tokens are trained, and refusing the others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import (
    get_training_chat_template,
    has_generation_markers,
    is_chat_template_prefix_preserving,
    is_chat_template_stop_token_trained,
    supports_tool_calling,
)

from trainer.errors import ModelError

TEMPLATES: Final = Path(__file__).parent / "templates"
OWN_TEMPLATES: Final = ("smollm2",)
"""Templates that TRL has no training form of: NAME.jinja as published, NAME_training.jinja with markers."""
REMEDY: Final = "Write one with `{% generation %}` markers and set `model.chat_template` to the file."


@final
@dataclass(frozen=True)
class Rendered:
    """A chat as text."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """Character ranges that are trained, one for each assistant turn that has markers."""


def training_template(tokenizer: PreTrainedTokenizerBase, override: str | None) -> str:
    """The template to train with: rendered text is the model's own, with marks around what the model writes.

    Raises:
        ModelError: there is none, it changes earlier turns when later ones follow, or never trains its stop token.
    """
    if override is not None:
        try:
            template = Path(override).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ModelError(f"model.chat_template: {override}: cannot be read: {error}") from None
        if not has_generation_markers(template):
            raise ModelError(f"{override}: has no `{{% generation %}}` markers, so no token would be trained")
        tokenizer.chat_template = template
    elif tokenizer.chat_template is None:
        raise ModelError(f"the tokenizer has no chat template. {REMEDY}")
    else:
        template = _known_template(tokenizer)
    _refuse_unfit(tokenizer, template)
    return template


def _known_template(tokenizer: PreTrainedTokenizerBase) -> str:
    own = tokenizer.chat_template
    own = own["default"] if isinstance(own, dict) else own
    for name in OWN_TEMPLATES:
        if own.strip() == (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8").strip():
            return (TEMPLATES / f"{name}_training.jinja").read_text(encoding="utf-8").removesuffix("\n")
    try:
        return get_training_chat_template(tokenizer) or own
    except ValueError:
        if has_generation_markers(own):
            return own  # its fault is another one, which `_refuse_unfit` names
        raise ModelError(f"the tokenizer's chat template does not say which tokens are trained. {REMEDY}") from None


def _refuse_unfit(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    question, answer = {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}
    try:
        short = render(template, tokenizer, [question, answer]).text
        long = render(template, tokenizer, [question, answer, question, answer]).text
        prompt = render(template, tokenizer, [question], add_generation_prompt=True).text
    except (TemplateError, TypeError, ValueError) as error:
        raise ModelError(f"the chat template cannot render a plain chat: {error}. {REMEDY}") from None
    if not long.startswith(short.rstrip()):
        raise ModelError(
            "the chat template is not prefix-preserving: earlier turns read otherwise when later ones follow. " + REMEDY
        )
    if not short.startswith(prompt):
        raise ModelError(f"the chat template trains on another prompt than the model is asked with. {REMEDY}")
    if not is_chat_template_stop_token_trained(tokenizer, template):
        raise ModelError(f"the chat template never trains its stop token: the model would not end. {REMEDY}")
    own = tokenizer.chat_template
    tokenizer.chat_template = template
    try:
        if supports_tool_calling(tokenizer) and not is_chat_template_prefix_preserving(tokenizer):
            raise ModelError(f"the chat template is not prefix-preserving with tool calls. {REMEDY}")
    finally:
        tokenizer.chat_template = own


def render(
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    *,
    tools: list[Any] | None = None,
    add_generation_prompt: bool = False,
) -> Rendered:
    """Render a chat to text and trained character ranges."""
    texts, spans = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=template,
        return_assistant_tokens_mask=not add_generation_prompt,
        add_generation_prompt=add_generation_prompt,
        **tokenizer.special_tokens_map,
    )
    return Rendered(texts[0], tuple(spans[0]) if spans else ())
