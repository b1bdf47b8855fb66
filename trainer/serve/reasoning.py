"""Reasoning of models that think before they answer: the template's switch for it, and where it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, final

from trainer.serve.api_errors import ApiError
from trainer.serve.models import Served
from trainer.serve.requests import ChatRequest

LEVELS: Final = ("low", "medium", "high")
"""Efforts that every template with `reasoning_effort` is given as they are; others only where it names them."""


@final
@dataclass(frozen=True)
class ReasoningForm:
    """The text around reasoning."""

    open: str
    close: str

    @property
    def tags(self) -> tuple[str, str]:
        """What may be one token each."""
        return self.open.removesuffix("thought\n"), self.close


FORMS: Final = (ReasoningForm("<think>", "</think>"), ReasoningForm("<|channel>thought\n", "<channel|>"))
"""Qwen3, GLM, DeepSeek R1, Nemotron, SmolLM3 and LFM2.5; Gemma 4."""


class Stage(Enum):
    """Where an answer begins."""

    MAY_OPEN = "the answer may begin with reasoning"
    IS_OPEN = "the prompt ends with the beginning of reasoning"
    IS_CLOSED = "the prompt ends with its end"


@final
@dataclass(frozen=True)
class Reasoning:
    """How the reasoning of one request is recognised."""

    form: ReasoningForm
    stage: Stage


def reasoning_of(served: Served, prompt: Sequence[int]) -> Reasoning | None:
    """How the answer to a prompt may show reasoning; None where the template has no form of it.

    Args:
        served: has the template.
        prompt: token ids of the request.
    """
    template = None if served.encoder is None else served.encoder.template
    form = next((each for each in FORMS if template is not None and template.contains(each.close)), None)
    if form is None:
        return None
    end = str(served.tokenizer.decode(list(prompt[-16:]), skip_special_tokens=False)).rstrip()
    stage = Stage.MAY_OPEN
    if end.endswith(form.open.rstrip()):
        stage = Stage.IS_OPEN
    elif end.endswith(form.close):
        stage = Stage.IS_CLOSED
    return Reasoning(form, stage)


def template_arguments(request: ChatRequest, served: Served) -> Mapping[str, Any]:
    """Variables of the template: those of the request, and `reasoning_effort` as the template's own switch.

    `none` is `enable_thinking: false`. Other efforts are the template's `reasoning_effort`, and `enable_thinking: true`
    where it has that alone, which knows no degrees. `chat_template_kwargs` come first.

    Raises:
        ApiError: the template has no such switch.
    """
    given, effort = dict(request.chat_template_kwargs or {}), request.reasoning_effort
    template = None if served.encoder is None else served.encoder.template
    if effort is None or template is None:
        return given
    has_switch, has_levels = template.names("enable_thinking"), template.names("reasoning_effort")
    if not has_switch and not has_levels:
        raise _refused(f"the chat template of {served.name} has no switch for reasoning; leave it out")
    found: dict[str, Any] = {"enable_thinking": effort != "none"} if has_switch else {}
    if effort == "none" and not has_switch:
        raise _refused(f"the chat template of {served.name} cannot turn reasoning off")
    if effort != "none" and has_levels:
        if effort not in LEVELS and not template.contains(f"'{effort}'"):
            raise _refused(f"the chat template of {served.name} does not know {effort!r}; use low, medium or high")
        found["reasoning_effort"] = effort
    return {**found, **given}


def _refused(message: str) -> ApiError:
    return ApiError(400, message, param="reasoning_effort")
