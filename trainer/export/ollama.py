"""Writes the Modelfile with which `ollama create` imports an exported GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from trainer.data.chat import load_tokenizer
from trainer.data.stop_tokens import stop_token_ids
from trainer.data.template import ChatTemplate
from trainer.errors import ModelError
from trainer.export.go_template import REMEDY, Chat, ChatFormat, default_system, derive_format, varied_chats
from trainer.planning.plan import Plan


def modelfile(plan: Plan, file_name: str) -> str:
    """The Modelfile of a run's exported model.

    Args:
        plan: model, template and system message.
        file_name: of the GGUF file, in the same directory.

    Raises:
        ModelError: the chat template has no equal in Ollama's language, or gives other token ids there.
    """
    recipe = plan.recipe
    tokenizer = load_tokenizer(recipe.model)
    data = recipe.data
    if data.format == "text":
        raise ModelError("`data.format: text` trains without a chat template, so there is none for Ollama")
    chat_format = chat_format_of(tokenizer, data.template_date, data.chat_template_kwargs)
    system = data.system or default_system(chat_format)
    stops = sorted(tokenizer.convert_ids_to_tokens(sorted(stop_token_ids(tokenizer, recipe.model.path))))
    texts = [chat_format.go_template(), *([system] if system else []), *stops]
    if any('"""' in text for text in texts):
        raise ModelError(
            f'the chat template or system message contains """, which ends a text in a Modelfile. {REMEDY}'
        )
    lines = [
        f"# ollama create {recipe.name} -f Modelfile",
        "# Chats without tools. White space around a message is kept, also where the chat template removes it.",
        f"FROM ./{file_name}",
        f'TEMPLATE """{chat_format.go_template()}"""',
        *([f'SYSTEM """{system}"""'] if system else []),
        *(f'PARAMETER stop "{stop}"' for stop in stops),
    ]
    return "\n".join(lines) + "\n"


def chat_format_of(tokenizer: PreTrainedTokenizerBase, template_date: str, arguments: Mapping[str, Any]) -> ChatFormat:
    """The chat template of a tokenizer as fixed texts, without the first token that the tokenizer adds by itself.

    Args:
        tokenizer: has the template.
        template_date: what the template reads as today, see `data.template_date`.
        arguments: variables of the template, see `data.chat_template_kwargs`.

    Raises:
        ModelError: it does not decompose, or gives other token ids.
    """
    template = ChatTemplate(tokenizer, template_date)
    bos = str(tokenizer.bos_token) if _adds_bos(tokenizer) else ""

    def render(chat: Chat, is_prompt: bool) -> str:
        text = template.prompt(chat, None, arguments) if is_prompt else template.chat(chat, None, arguments).text
        return text.removeprefix(bos)

    chat_format = derive_format(render)
    for chat in varied_chats(with_system=chat_format.system is not None):
        wanted = tokenizer(template.prompt(chat, None, arguments), add_special_tokens=False)["input_ids"]
        if tokenizer(chat_format.render(chat))["input_ids"] != wanted:
            raise ModelError(f"Ollama would read other tokens than the chat template gives. {REMEDY}")
    return chat_format


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer, and with it Ollama, puts its first token before a text by itself."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
