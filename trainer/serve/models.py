"""What is served: a base model and adapters, each with the prompts that it was trained on."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import time
from typing import Any, Final, final

from transformers import PreTrainedTokenizerBase

from trainer.config.recipe import DataSettings, ModelSettings
from trainer.data.chat import ChatEncoder, load_tokenizer
from trainer.errors import DataError, LaunchError
from trainer.inference.source import ModelSource
from trainer.serve.api_errors import ApiError
from trainer.types import Row

UNBOUNDED: Final = 1 << 30
"""The engine checks lengths against its window."""
SEPARATOR: Final = "#"
"""`base#adapter` names an adapter of a base."""


@final
@dataclass(frozen=True)
class Served:
    """A model as clients name it."""

    name: str
    adapter: str | None
    """Its name in the engine; None is the base."""
    path: str | None
    """Of the adapter."""
    tokenizer: PreTrainedTokenizerBase
    encoder: ChatEncoder | None
    """None where it was trained on text without a chat template."""
    stop_ids: tuple[int, ...]
    version: str | None = None
    """Name and digest of an adapter that was loaded at run time."""
    created: int = field(default_factory=lambda: int(time()))

    def prompt_ids(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, arguments: Mapping[str, Any]
    ) -> tuple[int, ...]:
        """Token ids of a chat, by the code that renders training rows.

        Args:
            messages: of the request.
            tools: of the request.
            arguments: further variables of the template.

        Raises:
            ApiError: the chat is none that the template renders whole.
        """
        if self.encoder is None:
            raise ApiError(400, f"{self.name} was trained on text without a chat template; use /v1/completions")
        fields: dict[str, Any] = {"messages": list(messages)}
        if tools:
            fields["tools"] = list(tools)
        if arguments:
            fields["chat_template_kwargs"] = dict(arguments)
        try:
            return self.encoder.encode_prompt(Row(fields, file="request", line=1))
        except DataError as error:
            raise ApiError(400, str(error).removeprefix("request:1: "), param="messages") from None
        except UnicodeEncodeError:
            raise ApiError(400, "the text has half a surrogate pair, which is no character", param="messages") from None


@final
class ServedModels:
    """The names that requests may use."""

    def __init__(self, base: ModelSource, base_name: str) -> None:
        """Serve the base model.

        Args:
            base: model and the form of its prompts.
            base_name: its name for clients.
        """
        self._model = base.model
        self._tokenizers: dict[str | None, PreTrainedTokenizerBase] = {}
        self.base = self._served(base_name, base, adapter=None)
        self.adapters: dict[str, Served] = {}

    @property
    def path(self) -> str:
        """Of the base model."""
        return self._model.path

    def add(self, name: str, source: ModelSource) -> Served:
        """An adapter under a name, not served yet; see `put`.

        Raises:
            LaunchError: it belongs to another base model, or the name is taken by the base.
        """
        if source.adapter is None:
            raise LaunchError(f"{source.label}: is no adapter; start a server of its own for it")
        if _place(source.model) != _place(self._model) or source.model.revision != self._model.revision:
            raise LaunchError(f"{source.label}: was trained on {source.model.path}; this server has {self._model.path}")
        if name == self.base.name or SEPARATOR in name:
            raise LaunchError(f"{name}: the name of an adapter must differ from the base's and have no {SEPARATOR!r}")
        return self._served(name, source, adapter=name)

    def put(self, served: Served) -> None:
        """Serve an adapter from now on."""
        self.adapters[served.name] = served

    def find(self, name: str) -> Served:
        """What a request names: the base, an adapter, or `base#adapter`.

        Raises:
            ApiError: there is none of this name.
        """
        base, separator, adapter = name.partition(SEPARATOR)
        if separator and base == self.base.name:
            name = adapter
        if name == self.base.name:
            return self.base
        if name not in self.adapters:
            known = ", ".join([self.base.name, *self.adapters])
            raise ApiError(404, f"no model {name!r}; there are: {known}", param="model", code="model_not_found")
        return self.adapters[name]

    def _served(self, name: str, source: ModelSource, adapter: str | None) -> Served:
        tokenizer = self._tokenizer(source.model)
        data: DataSettings = source.data.model_copy(update={"max_seq_tokens": UNBOUNDED})
        encoder = ChatEncoder(tokenizer, source.model, data, for_prompts=True) if data.format == "chat" else None
        stop_ids = tuple(sorted(encoder.stop_ids)) if encoder is not None else (int(tokenizer.eos_token_id),)
        path = None if source.adapter is None else str(source.adapter.resolve())
        return Served(name, adapter, path, tokenizer, encoder, stop_ids)

    def _tokenizer(self, model: ModelSettings) -> PreTrainedTokenizerBase:
        """The tokenizer with the template of this source; loaded once."""
        if None not in self._tokenizers:
            self._tokenizers[None] = load_tokenizer(model.model_copy(update={"chat_template": None}))
        if model.chat_template not in self._tokenizers:
            self._tokenizers[model.chat_template] = copy.deepcopy(
                self._tokenizers[None]
            )  # the encoder sets its template
        return self._tokenizers[model.chat_template]


def _place(model: ModelSettings) -> str:
    """Absolute path of a directory, or a hub name: a run may have named the same directory from another one."""
    path = Path(model.path)
    return str(path.resolve()) if path.is_dir() else model.path
