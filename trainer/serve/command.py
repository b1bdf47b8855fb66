"""`trainer serve`: from arguments to a listening gateway."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import ipaddress
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainer.config.model_arguments import add_serve_arguments
from trainer.errors import TrainerError, UserError
from trainer.inference.source import ModelSource, base_of, find_source
from trainer.run.console import tell

NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(prog="trainer serve", description=__doc__)
    add_serve_arguments(parser)
    arguments = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        _refuse(arguments)
        return _serve(arguments)
    except TrainerError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _refuse(arguments: argparse.Namespace) -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(f"trainer serve needs {', '.join(missing)}: pip install 'tunesmith[serve]'")
    if arguments.engine == "vllm":
        raise UserError("--engine vllm is not available yet; the embedded engine serves without it")
    if not _is_loopback(arguments.host) and arguments.api_key_file is None:
        raise UserError(
            f"--host {arguments.host} is reachable from other machines: add --api-key-file FILE, with one key a line"
        )


def _is_loopback(host: str) -> bool:
    """Whether an address is this machine's own.

    >>> _is_loopback("127.0.0.1"), _is_loopback("localhost"), _is_loopback("0.0.0.0")
    (True, True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _keys(file: str | None) -> frozenset[bytes]:
    """SHA-256 of each key in a file."""
    if file is None:
        return frozenset()
    try:
        lines = Path(file).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api-key-file {file}: {error}") from None
    if not lines:
        raise UserError(f"--api-key-file {file}: has no key")
    return frozenset(hashlib.sha256(line.encode()).digest() for line in lines)


def sources_of(arguments: argparse.Namespace) -> tuple[ModelSource, dict[str, ModelSource]]:
    """The base model, and the adapters by name.

    Raises:
        TrainerError: a name means nothing, or `--adapter` is not NAME=RUN.
    """
    target = find_source(arguments.target, best=arguments.best)
    adapters: dict[str, ModelSource] = {}
    if target.adapter is not None:
        adapters[target.label] = target
        target = base_of(target)
        while target.adapter is not None:  # a run that began with the adapter of another one
            target = ModelSource(target.label, target.model, target.data)
    for given in arguments.adapter:
        name, separator, where = given.partition("=")
        if not separator or not name or not where:
            raise UserError(f"--adapter {given}: write NAME=RUN")
        if name in adapters:
            raise UserError(f"--adapter {given}: {name} is served already")
        adapters[name] = find_source(where)
    return target, adapters


def _engine_arguments(arguments: argparse.Namespace, base: ModelSource) -> list[str]:
    words = ["--model", base.model.model_dump_json()]
    words += ["--max-rows", str(arguments.max_rows), "--chunk-tokens", str(arguments.chunk_tokens)]
    words += ["--max-adapter-rank", str(arguments.max_adapter_rank)]
    words += ["--kv-cache-fraction", str(arguments.kv_cache_fraction)]
    if arguments.kv_cache_tokens is not None:
        words += ["--kv-cache-tokens", str(arguments.kv_cache_tokens)]
    return words


def _serve(arguments: argparse.Namespace) -> int:
    import uvicorn

    from trainer.serve.app import make_app
    from trainer.serve.engine_client import EngineClient
    from trainer.serve.engine_process import EngineProcess
    from trainer.serve.gateway import Gateway, Limits
    from trainer.serve.models import ServedModels

    base, adapters = sources_of(arguments)
    name = arguments.served_name or Path(base.model.path).name
    models = ServedModels(base, name)
    for key, source in adapters.items():
        models.put(models.add(key, source))
    client = EngineClient()
    limits = Limits(arguments.max_queue, _keys(arguments.api_key_file))
    gateway = Gateway(models, client, limits)

    @asynccontextmanager
    async def lifespan(_app: Any) -> AsyncIterator[None]:
        with tempfile.TemporaryDirectory(prefix="trainer-serve-") as directory:  # mode 0700
            process = EngineProcess(
                _engine_arguments(arguments, base),
                Path(directory) / "engine.sock",
                client,
                lambda: {each.name: str(each.path) for each in models.adapters.values()},
            )
            try:
                await process.start()
                names = ", ".join([models.base.name, *models.adapters])
                tell(f"http://{arguments.host}:{arguments.port}/v1 serves {names}")
                yield
            finally:
                await process.stop()

    config = uvicorn.Config(
        make_app(gateway, lifespan),
        host=arguments.host,
        port=arguments.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=arguments.drain_s,
    )
    server = uvicorn.Server(config)
    asyncio.run(_run(server, gateway))
    return 0 if server.started else 1


async def _run(server: Any, gateway: Any) -> None:
    """Serve; from the first signal on, new requests are refused and those in flight are finished."""
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises the signal again when it has ended
        signal.signal(number, lambda *_: None)
    ordinary = server.handle_exit

    def handle_exit(number: int, frame: Any) -> None:
        gateway.is_draining = True
        ordinary(number, frame)

    server.handle_exit = handle_exit
    await server.serve()
