"""`python -m trainer.engine`: load the base model and listen on a Unix socket, or on TCP."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any, Final

import psutil
from transformers import PreTrainedTokenizerBase

from trainer.config.recipe import ModelSettings
from trainer.data.chat import load_tokenizer
from trainer.data.stop_tokens import stop_token_ids
from trainer.engine.connections import Connections, Listening
from trainer.engine.draft import Drafter, check_vocabularies, num_draft_pages
from trainer.engine.grammar import Grammars
from trainer.engine.handshake import SECRET_VARIABLE
from trainer.engine.model import EngineModel
from trainer.engine.own_model import OwnModel, open_model
from trainer.engine.pages import PAGE
from trainer.engine.scheduler import SPECULATION_ROWS, Scheduler
from trainer.engine.service import Service
from trainer.errors import ModelError, TrainerError
from trainer.model.quiet import quiet_transformers
from trainer.run.surroundings import end_with_parent

LEAST_PAGES: Final = 16
CACHED_SHAPES: Final = 128
"""Shapes of products whose kernels stay prepared. By default it is 1,024, in two caches: steps have other numbers of
tokens all the time, so that memory grew by 0.6 MiB a request for hundreds of MiB (docs/log.md), for no speed."""
SHAPE_CACHES: Final = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
"""Variables of PyTorch's and of oneDNN's cache; read at the first product."""


def main(argv: list[str] | None = None) -> int:
    """Serve until the process that started this one closes standard input, or until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m trainer.engine", description=__doc__)
    parser.add_argument("--model", required=True, help="model settings as JSON")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--socket", type=Path, help="Unix socket")
    where.add_argument(
        "--tcp-handle", type=int, help=f"file descriptor that listens; the secret is in {SECRET_VARIABLE}"
    )
    parser.add_argument("--orphan-s", type=float, default=float("inf"), help="end without a client for this long")
    parser.add_argument("--kv-cache-fraction", type=float, default=0.1, help="of the memory that is available")
    parser.add_argument("--kv-cache-tokens", type=int, help="instead of the fraction")
    parser.add_argument("--max-rows", type=int, default=64)
    parser.add_argument("--chunk-tokens", type=int, default=256)
    parser.add_argument("--speculation", choices=("prompt", "off"), default="prompt")
    parser.add_argument("--draft-model", help="settings of a smaller model as JSON, which proposes tokens")
    parser.add_argument("--max-adapter-rank", type=int, default=128)
    arguments = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for variable in SHAPE_CACHES:
        os.environ.setdefault(variable, str(CACHED_SHAPES))
    if arguments.tcp_handle is not None and not os.environ.get(SECRET_VARIABLE):
        parser.error(f"--tcp-handle needs a secret in {SECRET_VARIABLE}")
    quiet_transformers()
    try:
        service = _service(arguments)
    except TrainerError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the gateway, which ends this process
    signal.signal(signal.SIGTERM, lambda *_: service.stop())
    threading.Thread(target=end_with_parent, daemon=True).start()
    service.run()
    os._exit(0)  # threads that load adapters or read the socket need no end


def _service(arguments: argparse.Namespace) -> Service:
    settings = ModelSettings.model_validate_json(arguments.model)
    model = open_model(settings, arguments.max_adapter_rank)
    if model.note:
        sys.stderr.write(f"{settings.path}: {model.note}\n")
    tokenizer = load_tokenizer(settings)
    pages = _num_pages(model.page_bytes, arguments.kv_cache_fraction, arguments.kv_cache_tokens)
    hello: dict[str, Any] = {
        "hello": "trainer.engine",
        "window": min(model.window, pages * PAGE),
        "vocab": model.vocab_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "kv_tokens": pages * PAGE,
    }
    scheduler = Scheduler(
        model,
        model.pool(pages),
        max_rows=arguments.max_rows,
        chunk_tokens=arguments.chunk_tokens,
        speculates=arguments.speculation == "prompt",
        drafter=None if arguments.draft_model is None else _drafter(arguments.draft_model, model, tokenizer, pages),
    )
    grammars = Grammars(tokenizer, model.vocab_size, sorted(stop_token_ids(tokenizer, settings.path)))
    secret = os.environ.pop(SECRET_VARIABLE, "")
    listening = Listening(arguments.socket, arguments.tcp_handle, secret, arguments.orphan_s)
    return Service(model, scheduler, grammars, Connections(listening, hello))


def _drafter(given: str, model: EngineModel | OwnModel, tokenizer: PreTrainedTokenizerBase, pages: int) -> Drafter:
    """The draft model.

    Raises:
        ModelError: it cannot be loaded, or has another tokenizer.
    """
    settings = ModelSettings.model_validate_json(given)
    if not model.is_paged:
        raise ModelError(f"--draft-model {settings.path}: the model that it would draft for takes none: {model.note}")
    check_vocabularies(load_tokenizer(settings).get_vocab(), tokenizer.get_vocab(), settings.path)
    small = EngineModel(settings, 1)
    return Drafter(small, num_draft_pages(small, SPECULATION_ROWS, pages), model.vocab_size)


def _num_pages(page_bytes: int, fraction: float, tokens: int | None) -> int:
    """Pages of the budget."""
    if tokens is not None:
        return max(1, -(-tokens // PAGE))
    return max(LEAST_PAGES, int(psutil.virtual_memory().available * fraction) // page_bytes)


if __name__ == "__main__":
    sys.exit(main())
