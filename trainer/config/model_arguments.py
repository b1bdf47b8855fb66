"""The command-line arguments of `trainer chat`, `generate` and `eval`, for the launcher and the process it starts."""

from __future__ import annotations

import argparse


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `trainer chat`."""
    _add_model(parser, "run, adapter directory, model directory, hub name, or http://HOST:PORT/v1[#NAME] of a server")
    _add_draw(parser)
    parser.add_argument("--against", metavar="MODEL", help="answer beside this run or model; `base`: the run's base")
    parser.add_argument("--system", metavar="TEXT", help="a system message; the recipe's when left out")


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `trainer generate`."""
    _add_model(parser)
    parser.add_argument("prompts", metavar="PROMPTS", help="rows in any form that is read; or .txt, a prompt a line; -")
    _add_draw(parser)
    parser.add_argument(
        "--text", action="store_true", help="answers as plain text, token by token; a blank line between"
    )
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="answers per prompt")
    parser.add_argument("--out", metavar="FILE", help="JSONL file; standard output when left out")


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `trainer eval`."""
    _add_model(parser)
    parser.add_argument("--against", metavar="MODEL", help="compare with this run or model; the run's base; `none`")
    parser.add_argument("--of", metavar="RUN", help="take rows, rewards and sampling of this run")
    parser.add_argument("--data", metavar="FILE", help="other rows than the held-out ones of the run")
    parser.add_argument("--reward", action="append", default=[], metavar="USE", help="another reward, as in a recipe")
    parser.add_argument("--rows", type=int, metavar="N", help="only the first rows")
    parser.add_argument("--samples", type=int, metavar="N", help="answers per row")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest answer")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 takes the likeliest token")
    parser.add_argument("--tasks", metavar="TASKS", help="lm-eval: names or YAML files of tasks, with commas between")
    parser.add_argument("--apply-chat-template", action="store_true", help="--tasks: prompts as chats")
    parser.add_argument("--out", metavar="FILE", help="JSONL file with the answers and losses of each row")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `trainer serve`."""
    _add_model(parser, is_optional=True)
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=RUN", help="serve another run or adapter as NAME"
    )
    _add_engine(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address; any but loopback needs keys")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--api-key-file", metavar="FILE", help="keys that clients may use, one a line")
    _add_control(parser)
    _add_vllm(parser)
    parser.add_argument("--drain-s", type=int, default=60, metavar="S", help="after SIGTERM, time for running requests")
    parser.add_argument(
        "--batch-dir", default="runs/.batches", metavar="DIR", help="files of /v1/files and /v1/batches"
    )
    parser.add_argument(
        "--traces", choices=("otlp", "console"), help="OpenTelemetry spans of requests, to OTEL_EXPORTER_OTLP_* or here"
    )
    parser.add_argument("--batch-keep", default="30d", metavar="TIME", help="lifetime of files and batches")
    _add_training(parser)


def _add_control(parser: argparse.ArgumentParser) -> None:
    """Add who may use the server."""
    parser.add_argument("--with-accounts", action="store_true", help="keys, limits, use and audit log in a store")
    parser.add_argument("--store", metavar="URL", help="sqlite:///FILE or postgresql://...; or TRAINER_STORE")
    parser.add_argument("--deployments", action="store_true", help="serve what `trainer deploy` made, not one MODEL")
    parser.add_argument("--region", metavar="R", help="of this machine, with --deployments; `local` when left out")
    parser.add_argument(
        "--backend", choices=("local", "ray"), default="local", help="with --deployments: where replicas run"
    )
    parser.add_argument("--ray-address", metavar="HOST:PORT", help="--backend ray: the cluster; `auto` when left out")
    parser.add_argument("--prices", metavar="FILE", help="price table in YAML, for credit")
    parser.add_argument("--tls-cert", metavar="PEM", help="answer HTTPS with this certificate")
    parser.add_argument("--tls-key", metavar="PEM", help="its private key")
    parser.add_argument(
        "--trusted-proxy",
        metavar="IPS",
        help="believe X-Forwarded-For and -Proto of these addresses",
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    """Add what the training API is started with."""
    group = parser.add_argument_group("training API (docs/training_api.md)")
    group.add_argument("--training", action="store_true", help="answer tinker clients, which train, at /api/v1")
    group.add_argument(
        "--training-dir", default="runs/.training", metavar="DIR", help="sessions, models and saved states"
    )
    group.add_argument("--training-slots", type=int, default=8, metavar="N", help="models in memory at once")
    group.add_argument(
        "--training-lease-s",
        type=float,
        default=120.0,
        metavar="S",
        help="silence after which a client loses its slot",
    )
    group.add_argument(
        "--training-checkpoint-s", type=float, default=30.0, metavar="S", help="work that a crash may have to repeat"
    )
    group.add_argument(
        "--training-dtype", choices=("float32", "bfloat16"), help="of the base in training; as the model is served"
    )
    group.add_argument("--micro-batch-tokens", type=int, default=4096, metavar="N", help="trained in one pass")


def add_batch_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `trainer batch`."""
    parser.add_argument("action", choices=("create",), help="answer a file of requests; again: go on with it")
    parser.add_argument("requests", metavar="IN.jsonl", help="requests in the format of OpenAI's batches")
    parser.add_argument("--model", dest="target", required=True, metavar="MODEL", help="run, adapter or model")
    parser.add_argument("--best", action="store_true", help="of a run: the best weights, not the last")
    parser.add_argument("--out", metavar="OUT.jsonl", help="results; IN.out.jsonl when left out")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=RUN", help="one more adapter")
    _add_engine(parser)


def _add_vllm(parser: argparse.ArgumentParser) -> None:
    """Add the choice of the engine, and what vLLM is started with."""
    parser.add_argument(
        "--engine", choices=("embedded", "vllm"), default="embedded", help="embedded: on CPUs; vllm: on GPUs"
    )
    parser.add_argument("--vllm-python", metavar="PYTHON", help="interpreter of vLLM's environment; .venv-vllm")
    parser.add_argument("--vllm-devices", metavar="0,1", help="GPUs of vLLM, by tensor parallelism; 0")
    parser.add_argument("--vllm-log", metavar="FILE", default="runs/.vllm.log", help="what vLLM prints")
    parser.add_argument("--vllm-argument", action="append", default=[], metavar="ARG", help="--vllm-argument=--x=1")
    parser.add_argument("--max-model-tokens", type=int, metavar="N", help="vLLM: prompt and answer; the model's limit")


def _add_engine(parser: argparse.ArgumentParser) -> None:
    """Add what the embedded engine is started with."""
    parser.add_argument("--served-name", metavar="NAME", help="name of the base model; the last part of its path")
    parser.add_argument("--kv-cache-fraction", type=float, default=0.1, metavar="F", help="of the available memory")
    parser.add_argument("--kv-cache-tokens", type=int, metavar="N", help="tokens of the cache, not a fraction")
    parser.add_argument("--max-rows", type=int, default=64, metavar="N", help="sequences continued in one step")
    parser.add_argument("--chunk-tokens", type=int, default=256, metavar="N", help="prompt tokens read in one step")
    parser.add_argument("--max-adapter-rank", type=int, default=128, metavar="R")
    parser.add_argument(
        "--speculation", choices=("prompt", "off"), default="prompt", help="propose tokens that followed the same words"
    )
    parser.add_argument("--max-queue", type=int, default=256, metavar="N", help="sequences in flight; then 429")


def _add_model(
    parser: argparse.ArgumentParser,
    text: str = "run, adapter directory, model directory or hub name",
    *,
    is_optional: bool = False,
) -> None:
    parser.add_argument("target", metavar="MODEL", nargs="?" if is_optional else None, help=text)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--best", action="store_true", help="of a run: the best weights, not the last")
    which.add_argument("--checkpoint", type=int, metavar="STEP", help="of a run: the weights of this checkpoint")


def _add_draw(parser: argparse.ArgumentParser) -> None:
    """Add how answers are drawn."""
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="longest answer")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the noise, with a temperature")
