"""`trainer serve` and `trainer batch create`: from arguments to an engine and what uses it."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import ipaddress
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from trainer.config.model_arguments import add_batch_arguments, add_serve_arguments
from trainer.control.core_dumps import forbid_core_dumps
from trainer.control.durations import seconds_of
from trainer.errors import TrainerError, UserError
from trainer.inference.source import ModelSource, base_of
from trainer.run.console import tell
from trainer.serve.access import KeyFile
from trainer.serve.engine import Engine, EngineOwner
from trainer.serve.engine_client import EngineClient
from trainer.serve.engine_process import EngineProcess
from trainer.serve.gateway import served_source
from trainer.serve.tls import tls_settings
from trainer.serve.training.start import refuse_training, start_training

if TYPE_CHECKING:
    from trainer.serve.batch import Progress
    from trainer.serve.gateway import Gateway
    from trainer.serve.traces import Traces
    from trainer.serve.training.start import Training
    from trainer.serve.with_accounts import Accounts

NEEDED: Final = ("fastapi", "uvicorn", "prometheus_client", "python_multipart", "psutil")
"""Modules of the extra `serve`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C, or answer a batch."""
    words = list(sys.argv[1:] if argv is None else argv)
    is_batch = bool(words) and words[0] == "batch"
    parser = argparse.ArgumentParser(prog=f"trainer {'batch' if is_batch else 'serve'}", description=__doc__)
    (add_batch_arguments if is_batch else add_serve_arguments)(parser)
    arguments = parser.parse_args(words[1:] if is_batch else words)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        missing = [name for name in NEEDED if find_spec(name) is None]
        if missing:
            raise UserError(f"trainer serve needs {', '.join(missing)}: pip install 'tunesmith[serve]'")
        if not is_batch:
            _refuse(arguments)
        accounts = None
        if not is_batch and arguments.with_accounts:
            from trainer.serve.with_accounts import open_accounts

            accounts = open_accounts(arguments)
            if arguments.deployments:
                from trainer.serve.fleet_command import serve_deployments

                return serve_deployments(arguments, accounts)
        return _start(arguments, accounts, is_batch=is_batch)
    except TrainerError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _refuse(arguments: argparse.Namespace) -> None:
    if arguments.training:
        refuse_training(arguments)
    if arguments.deployments == (arguments.target is not None):
        raise UserError("trainer serve needs a MODEL, or --deployments, and not both")
    _refuse_backend(arguments)
    arguments.with_accounts |= arguments.deployments
    if arguments.with_accounts and arguments.api_key_file is not None:
        raise UserError("--with-accounts and --api-key-file exclude each other: `trainer keys create` makes keys")
    given = [name for name in ("store", "prices") if getattr(arguments, name) is not None]
    if given and not arguments.with_accounts:
        raise UserError(f"--{given[0]} needs --with-accounts")
    if arguments.with_accounts:
        missing = [name for name in ("sqlalchemy", "alembic") if find_spec(name) is None]
        if missing:
            raise UserError(f"--with-accounts needs {', '.join(missing)}: pip install 'tunesmith[accounts]'")
    if not _is_loopback(arguments.host) and arguments.api_key_file is None and not arguments.with_accounts:
        raise UserError(
            f"--host {arguments.host} is reachable from other machines, and there are no keys: add --with-accounts, or "
            "--api-key-file FILE with one key a line"
        )
    tls_settings(arguments)
    seconds_of(arguments.batch_keep, "--batch-keep")


def _refuse_backend(arguments: argparse.Namespace) -> None:
    if arguments.backend == "ray" and not arguments.deployments:
        raise UserError("--backend ray needs --deployments")
    if arguments.backend == "ray" and arguments.region is not None:
        raise UserError("--region is of the local backend; in Ray each node has its own: ray start --labels region=R")
    if arguments.backend == "ray" and find_spec("ray") is None:
        raise UserError("--backend ray needs ray: pip install 'tunesmith[ray]'")
    if arguments.backend != "ray" and arguments.ray_address is not None:
        raise UserError("--ray-address needs --backend ray")
    arguments.region, arguments.ray_address = arguments.region or "local", arguments.ray_address or "auto"


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
    target = served_source(arguments.target, best=arguments.best, checkpoint=getattr(arguments, "checkpoint", None))
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
        adapters[name] = served_source(where)
    return target, adapters


def _engine_arguments(arguments: argparse.Namespace, base: ModelSource) -> list[str]:
    words = ["--model", base.model.model_dump_json()]
    words += ["--max-rows", str(arguments.max_rows), "--chunk-tokens", str(arguments.chunk_tokens)]
    words += ["--max-adapter-rank", str(arguments.max_adapter_rank), "--speculation", arguments.speculation]
    words += ["--kv-cache-fraction", str(arguments.kv_cache_fraction)]
    if arguments.kv_cache_tokens is not None:
        words += ["--kv-cache-tokens", str(arguments.kv_cache_tokens)]
    return words


def _start(arguments: argparse.Namespace, accounts: Accounts | None, *, is_batch: bool) -> int:
    """Start the engine, and load what renders prompts while it loads its model."""
    forbid_core_dumps()
    base, adapters = sources_of(arguments)
    keys = frozenset() if is_batch else _keys(arguments.api_key_file)
    with tempfile.TemporaryDirectory(prefix="trainer-serve-") as directory:  # mode 0700
        process = _engine(arguments, base, Path(directory), is_batch=is_batch)
        process.launch()
        try:
            traces = None if is_batch else _traces(arguments)
            gateway = _gateway(arguments, base, adapters, process.client, keys, traces)
        except BaseException:
            asyncio.run(process.stop())
            raise
        if is_batch:
            return asyncio.run(_run_batch(arguments, gateway, process))
        meter = None if accounts is None else accounts.meter
        training = start_training(arguments, gateway, base, Path(directory), meter) if arguments.training else None
        return asyncio.run(_listen(arguments, gateway, process, accounts, training))


def _engine(arguments: argparse.Namespace, base: ModelSource, directory: Path, *, is_batch: bool) -> EngineOwner:
    """The engine that the arguments ask for, not started yet."""
    if not is_batch and arguments.engine == "vllm":
        from trainer.serve.vllm_process import VllmProcess

        return VllmProcess(arguments, base.model, directory)
    return EngineProcess(_engine_arguments(arguments, base), directory / "engine.sock", EngineClient())


def _gateway(
    arguments: argparse.Namespace,
    base: ModelSource,
    adapters: dict[str, ModelSource],
    client: Engine,
    keys: frozenset[bytes],
    traces: Traces | None,
) -> Gateway:
    from trainer.serve.gateway import Gateway, Limits
    from trainer.serve.models import ServedModels

    models = ServedModels(base, arguments.served_name or Path(base.model.path).name)
    for key, source in adapters.items():
        models.put(models.add(key, source))
    return Gateway(models, client, Limits(arguments.max_queue, keys), traces=traces)


def _traces(arguments: argparse.Namespace) -> Traces | None:
    from trainer.serve.listening import traces_of

    return traces_of(arguments)


def _paths(gateway: Gateway, training: Training | None = None) -> dict[str, str]:
    """Name and path of each adapter that is served now."""
    sampled = {} if training is None else training.front.samples.adapters.paths()
    return {**{each.name: str(each.path) for each in gateway.models.adapters.values()}, **sampled}


async def _listen(
    arguments: argparse.Namespace,
    gateway: Gateway,
    process: EngineOwner,
    accounts: Accounts | None,
    training: Training | None,
) -> int:
    """Serve; from the first signal on, new requests are refused and those in flight are finished."""
    from trainer.serve.app import make_app
    from trainer.serve.batch_api import BatchStore, running_batches
    from trainer.serve.control import Control
    from trainer.serve.listening import address, make_server

    control = Control(KeyFile(gateway.limits.api_key_digests)) if accounts is None else accounts.control
    keep_s = seconds_of(arguments.batch_keep, "--batch-keep")
    store = BatchStore(gateway, Path(arguments.batch_dir), control, keep_s=keep_s)
    app = make_app(gateway, store, control, None if training is None else training.front)
    if accounts is not None:
        accounts.add_routes(app)
    if gateway.traces is not None:
        gateway.traces.around(app)
    server = make_server(app, arguments)
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises the signal again when it has ended
        signal.signal(number, lambda *_: None)
    ordinary = server.handle_exit

    def handle_exit(number: int, frame: Any) -> None:
        gateway.is_draining = True
        ordinary(number, frame)

    server.handle_exit = handle_exit  # type: ignore[method-assign, assignment]
    try:
        await process.start(lambda: _paths(gateway, training))
        if training is not None:
            await training.process.start_with()
        names = ", ".join([gateway.models.base.name, *gateway.models.adapters])
        tell(f"{address(arguments)}/v1 serves {names}")
        if training is not None:
            tell(f"TINKER_BASE_URL={address(arguments)} trains {gateway.models.base.name}")
        if accounts is None and arguments.api_key_file is None:
            tell("without accounts: only this machine can connect, and everybody on it may")
        async with running_batches(store), AsyncExitStack() as stack:
            if accounts is not None:
                await stack.enter_async_context(accounts.counting())
            await server.serve()
    finally:
        if training is not None:
            await training.process.stop()
        await process.stop()
        if gateway.traces is not None:
            gateway.traces.close()
    return 0 if server.started else 1


async def _run_batch(arguments: argparse.Namespace, gateway: Gateway, process: EngineOwner) -> int:
    """Answer a file; the same command again goes on with it."""
    from trainer.serve.batch import BatchRun

    source = Path(arguments.requests)
    output = Path(arguments.out) if arguments.out else source.with_suffix(".out.jsonl")
    errors = output.with_suffix(".errors.jsonl")
    default = next(reversed([gateway.models.base.name, *gateway.models.adapters]))
    try:
        run = BatchRun(gateway, source, output, errors, default)
        await process.start(lambda: _paths(gateway))
        progress = await run.run(_show)
    finally:
        await process.stop()
    tell(
        f"{progress.completed:,} answered in {output}, {progress.failed:,} failed"
        + (f" in {errors}" if progress.failed else "")
        + f"; {progress.prompt_tokens:,} prompt and {progress.completion_tokens:,} completion tokens in this start"
    )
    return 0


def _show(progress: Progress) -> None:
    done, left = progress.completed + progress.failed, progress.seconds_left
    is_terminal = sys.stderr.isatty()
    if is_terminal or done == progress.total or done % 100 == 0:
        text = f"{done:,}/{progress.total:,}  failed {progress.failed:,}  {left or 0:,.0f} s left"
        sys.stderr.write(f"\r{text}   " if is_terminal and done < progress.total else f"{text}\n")
