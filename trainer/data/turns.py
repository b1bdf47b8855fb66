"""Which text of a chat is trained, and behind which text the model will be asked for it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

from trainer.config.recipe import DataSettings
from trainer.data.forms import Conversation
from trainer.data.messages import REASONING_FIELDS
from trainer.data.template import ChatTemplate, Messages, Rendered
from trainer.errors import DataError
from trainer.types import Row

MARKER: Final = "zqlast"
THINK: Final = "<think>"


@final
@dataclass(frozen=True)
class TrainedTurn:
    r"""A turn as text, before it is tokenized.

    ChatML's answer "Yes." to "Is it?" is the prompt `<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n`
    and the rest `Yes.<|im_end|>\n`.
    """

    prompt: str
    """What the model's template yields for the messages before the turn, with the generation prompt."""
    rest: str
    """The turn itself, and what the template puts after it."""
    texts: tuple[str, ...]
    """What the row wrote: content, reasoning and names of tools called; the turn's stop token comes after all of it."""
    spans: tuple[tuple[int, int], ...]
    """Character ranges of `rest` inside generation markers; empty without markers."""
    following: str = ""
    """How the next turn begins: it holds the end of this one where the template writes it there (GLM)."""
    opening: str = ""
    """What the row wrote that the generation prompt already holds, such as `<think>` (DeepSeek R1)."""


def trained_indices(row: Row, chat: Conversation, settings: DataSettings) -> list[int]:
    """Positions of the messages that are trained.

    Raises:
        DataError: none is, or one has nothing to train.
    """
    roles = settings.train_on if isinstance(settings.train_on, list) else ["assistant"]
    indices = [
        index for index, message in enumerate(chat.messages) if message["role"] in roles and message.get("weight", 1)
    ]
    if chat.only_last or settings.train_on == "last":
        indices = indices[-1:]
    for index in indices:
        if is_empty(chat.messages[index]):
            role = chat.messages[index]["role"]
            article = "an assistant" if role == "assistant" else f"a {role}"
            raise DataError(f"{row}: {article} turn is empty. Remove it or the row, or give the turn `weight: 0`.")
    if not indices:
        raise DataError(f"{row}: no token would be trained (no turn by {' or '.join(roles)} with weight 1)")
    return indices


def is_empty(message: Mapping[str, Any]) -> bool:
    """Whether a message has neither text nor reasoning nor a tool call."""
    texts = [message["content"], *(message.get(name) for name in REASONING_FIELDS)]
    has_text = any(isinstance(text, str) and text.strip() for text in texts)
    return not has_text and not message.get("tool_calls")


def trained_turn(
    row: Row, chat: Conversation, index: int, template: ChatTemplate, stop_texts: Collection[str]
) -> TrainedTurn:
    """The turn at `index` behind the prompt that the model will see.

    Args:
        row: for messages to people.
        chat: the row.
        index: which message.
        template: the template that is served.
        stop_texts: the stop tokens as text.

    Raises:
        DataError: the template renders the turn behind another prompt than it asks with.
    """
    message = chat.messages[index]
    before, upto = chat.messages[:index], chat.messages[: index + 1]
    whole = render(row, template, upto, chat, is_prompt=False)
    if message["role"] == "assistant":
        prompt = render(row, template, before, chat, is_prompt=True).text
        if not whole.text.startswith(prompt):
            continued = _continued(message, prompt, whole.text)
            if continued is not None:
                return continued
            same = common_length(prompt, whole.text)
            begin = max(0, same - 20)
            raise DataError(
                f"{row}: messages[{index}]: the chat template asks for this turn with {prompt[begin:][-40:]!r} and "
                f"renders it as {whole.text[begin : same + 20]!r}: it would be trained behind another text than the "
                "model is served. Change the turn (reasoning may be missing or unwanted), set "
                "data.chat_template_kwargs (such as `enable_thinking: false`) as you will when serving, or give the "
                "turn `weight: 0`."
            )
    else:
        content = message["content"].strip()
        start = whole.text.rfind(content)
        if start < 0:
            raise DataError(f"{row}: messages[{index}]: the chat template rewrites this turn; it cannot be trained")
        prompt = whole.text[:start]
    rest = whole.text[len(prompt) :]
    own = [(low, high) for low, high in whole.spans if high > len(prompt)]
    spans = tuple((max(0, low - len(prompt)), high - len(prompt)) for low, high in own)
    ends_itself = any(text in rest for text in stop_texts)
    following = "" if ends_itself else _following(chat, index, template)
    opening = THINK if prompt.rstrip().endswith(THINK) else ""
    return TrainedTurn(prompt, rest, _texts(message), spans, following, opening)


def render(row: Row, template: ChatTemplate, messages: Messages, chat: Conversation, *, is_prompt: bool) -> Rendered:
    """Render messages of a row.

    Raises:
        DataError: the template refuses them; says why.
    """
    try:
        if is_prompt:
            return Rendered(template.prompt(messages, chat.tools, chat.template_arguments))
        return template.chat(messages, chat.tools, chat.template_arguments)
    except Exception as error:  # a template raises whatever its author thought of
        raise DataError(f"{row}: the chat template refuses the row: {error}") from None


def _continued(message: Mapping[str, Any], prompt: str, whole: str) -> TrainedTurn | None:
    """The turn where the prompt ends with an opening that only the row's text goes on from.

    DeepSeek R1's prompt ends with `<think>`, and its template leaves the reasoning out of an answer; an answer
    written as `<think>why</think>so` goes on from that prompt with `why</think>so`.
    """
    same = common_length(prompt, whole)
    opening, content = prompt[same:], message["content"]
    shown = content.rpartition("</think>")[2].strip()
    if not opening.strip() or not content.lstrip().startswith(opening.strip()) or not shown:
        return None
    answer = whole[same:].lstrip()
    if not answer.startswith(shown):
        return None
    rest = content.lstrip()[len(opening.strip()) :]
    rest = rest.removeprefix("\n") if opening.endswith("\n") else rest
    return TrainedTurn(prompt, rest.rstrip() + answer[len(shown) :], _texts(message), (), opening=opening.strip())


def _following(chat: Conversation, index: int, template: ChatTemplate) -> str:
    """What the template puts between the turn and the next one, where that can be seen.

    Both are rendered with a marker as content, because earlier reasoning may vanish once another turn follows.
    """
    turn = {**chat.messages[index], "content": MARKER}
    follower = {"role": "tool" if turn.get("tool_calls") else "user", "content": "next"}
    tails = []
    for messages in ([*chat.messages[:index], turn], [*chat.messages[:index], turn, follower]):
        try:
            text = template.chat(messages, chat.tools, chat.template_arguments).text
        except Exception:  # the template does not take another turn here
            return ""
        tails.append(text.rpartition(MARKER)[2])
    tail, longer = tails
    return longer[len(tail) :] if longer.startswith(tail) else ""


def _texts(message: Mapping[str, Any]) -> tuple[str, ...]:
    texts = [message["content"], *(message.get(name) for name in REASONING_FIELDS)]
    names = [call["function"]["name"] for call in message.get("tool_calls") or []]
    return tuple(text for text in (*texts, *names) if isinstance(text, str) and text.strip())


def written(message: Mapping[str, Any]) -> str:
    """All text of a message."""
    texts = [message["content"], *(message.get(name) for name in REASONING_FIELDS)]
    calls = [str(message["tool_calls"])] if message.get("tool_calls") else []
    return "\n".join([text for text in texts if isinstance(text, str)] + calls)


def common_length(one: str, two: str) -> int:
    """Characters that both texts begin with."""
    pairs = enumerate(zip(one, two, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(one), len(two)))
