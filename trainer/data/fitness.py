"""Refuses chat templates with which no answer can be trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from jinja2 import TemplateError

from trainer.data.forms import Conversation
from trainer.data.joining import Joiner
from trainer.data.template import REMEDY, ChatTemplate
from trainer.data.turns import TrainedTurn, trained_turn
from trainer.errors import DataError, ModelError
from trainer.types import Row

QUESTION: Final = {"role": "user", "content": "one"}
ANSWERS: Final[tuple[dict[str, Any], ...]] = (
    {"role": "assistant", "content": "two"},
    {"role": "assistant", "content": "two", "reasoning_content": "why"},
    {"role": "assistant", "content": "<think>\nwhy\n</think>\n\ntwo"},
)
"""A template must be able to render one of these behind its own generation prompt."""


def refuse_unfit(
    template: ChatTemplate, joiner: Joiner, stop_texts: frozenset[str], arguments: Mapping[str, Any]
) -> None:
    """Try chats of one question: plain, and with reasoning.

    Args:
        template: the template that is served.
        joiner: tokenizes the trial turn.
        stop_texts: the stop tokens as text.
        arguments: further variables of the template.

    Raises:
        ModelError: no answer can be rendered behind the prompt it is asked with, or none ends with a stop token.
    """
    try:
        asked = template.chat([QUESTION], None, arguments).text
        whole = template.chat([QUESTION, ANSWERS[0]], None, arguments).text
        template.prompt([QUESTION], None, arguments)
    except (TemplateError, TypeError, ValueError) as error:
        raise ModelError(f"the chat template cannot render a plain chat: {error}. {REMEDY}") from None
    row = Row({}, file="(template check)")
    for answer in ANSWERS:
        turn = _turn(row, answer, template, stop_texts, arguments)
        if turn is not None:
            if template.has_markers and not turn.spans:
                raise ModelError("the `{% generation %}` markers of the chat template enclose no text of an answer")
            joiner.refuse_wrong_stop(row, turn)
            return
    if not whole.startswith(asked.rstrip()):
        raise ModelError(
            "the chat template is not prefix-preserving: earlier turns read otherwise when later ones follow. " + REMEDY
        )
    raise ModelError(f"the chat template trains on another prompt than the model is asked with. {REMEDY}")


def _turn(
    row: Row, answer: dict[str, Any], template: ChatTemplate, stop_texts: frozenset[str], arguments: Mapping[str, Any]
) -> TrainedTurn | None:
    try:
        return trained_turn(
            row, Conversation("check", [QUESTION, answer], {}, None, arguments), 1, template, stop_texts
        )
    except DataError:
        return None
