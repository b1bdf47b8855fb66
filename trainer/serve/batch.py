"""Batch inference: a file of requests in OpenAI's format, each answered exactly once, whatever is killed.

A finished request is one line of the output file (or of the errors file), written when it ends. A run that is started
again skips the `custom_id`s that it finds there, after removing a line that was cut by a kill.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, Final, TextIO, TypeAlias, final

from pydantic import BaseModel, ValidationError

from trainer.errors import UserError
from trainer.serve.answers import ChatAnswer, TextAnswer
from trainer.serve.api_errors import ApiError
from trainer.serve.choices import Job, Usage, run_all
from trainer.serve.gateway import Gateway
from trainer.serve.metering import Counted, NoMeter
from trainer.serve.requests import ChatRequest, CompletionRequest, validation_error

IN_FLIGHT: Final = 128
"""Requests that are sent to the engine at once."""
CHAT_URL: Final = "/v1/chat/completions"
TEXT_URL: Final = "/v1/completions"


Admit: TypeAlias = Callable[[str, list[Job], int], Awaitable[Counted]]
"""Counts the sequences of a request and the tokens of its prompts, for a base model or deployment."""
Route: TypeAlias = Callable[[str], Awaitable[tuple[Gateway, str]]]
"""Where what a request names as `model` is answered, and its name there."""


async def admit_all(base: str, jobs: list[Job], prompt_tokens: int) -> Counted:
    """Let every request through."""
    return await NoMeter().open(None, base, jobs, prompt_tokens)


def only(gateway: Gateway) -> Route:
    """The route to one gateway, whatever the model."""

    async def route(model: str) -> tuple[Gateway, str]:
        return gateway, model

    return route


class BatchLine(BaseModel):
    """A line of the input."""

    custom_id: str
    method: str = "POST"
    url: str
    body: dict[str, Any]


@final
@dataclass(frozen=True)
class Pending:
    """A request that has no result yet, or a line that is none."""

    key: str
    """`custom_id`, or `line-N` of a line without one."""
    line: BatchLine | None
    problem: str | None = None


@final
@dataclass
class Progress:
    """How far a batch is."""

    total: int = 0
    completed: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    begun: float = field(default_factory=monotonic)
    before: int = 0
    """Requests that an earlier start had finished."""

    @property
    def seconds_left(self) -> float | None:
        """By the rate so far; None before the first result."""
        done = self.completed + self.failed - self.before
        return (self.total - self.before - done) * (monotonic() - self.begun) / done if done else None


def read_batch(file: Path) -> list[Pending]:
    """The requests of a file; a malformed line is one that will fail.

    Raises:
        UserError: the file cannot be read, or two lines have one custom_id.
    """
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    found: dict[str, int] = {}
    requests = []
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        request = _read_line(number, text)
        if request.key in found:
            raise UserError(f"{file}:{number}: custom_id {request.key!r} is that of line {found[request.key]}")
        found[request.key] = number
        requests.append(request)
    if not requests:
        raise UserError(f"{file}: has no requests")
    return requests


def _read_line(number: int, text: str) -> Pending:
    try:
        raw = json.loads(text)
        line = BatchLine.model_validate(raw)
    except ValidationError as error:
        key = raw.get("custom_id") if isinstance(raw, dict) else None
        name = key if isinstance(key, str) else f"line-{number}"
        return Pending(name, None, f"line {number}: {validation_error(list(error.errors())).message}")
    except ValueError as error:
        return Pending(f"line-{number}", None, f"line {number}: no JSON: {error}")
    if line.url not in (CHAT_URL, TEXT_URL):
        return Pending(line.custom_id, None, f"line {number}: url must be {CHAT_URL} or {TEXT_URL}, not {line.url}")
    return Pending(line.custom_id, line)


def finished(file: Path) -> set[str]:
    """The custom_ids of a result file; a last line that was cut by a kill is removed from it."""
    if not file.exists():
        return set()
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with file.open("r+b") as handle:
            handle.truncate(len(whole))
    return {json.loads(line)["custom_id"] for line in whole.splitlines()}


@final
class BatchRun:
    """Answers the requests of one file."""

    def __init__(
        self,
        route: Route,
        source: Path,
        output: Path,
        errors: Path,
        model: str | None = None,
        *,
        admit: Admit = admit_all,
    ) -> None:
        """Read the requests and what is finished.

        Args:
            route: who answers.
            source: the input file.
            output: results are appended to it.
            errors: failures are appended to it.
            model: of requests that name none.
            admit: lets the sequences of a request through.

        Raises:
            UserError: the input cannot be used.
        """
        self._route, self._output, self._errors, self._model = route, output, errors, model
        self._admit = admit
        requests = read_batch(source)
        done, failed = finished(output), finished(errors)
        self.progress = Progress(len(requests), len(done), len(failed), before=len(done) + len(failed))
        left = [each for each in requests if each.key not in done and each.key not in failed]
        # equal beginnings stand together, so that the store of prefixes serves them
        self._left = sorted(left, key=lambda each: "" if each.line is None else json.dumps(each.line.body))

    async def run(self, tell_progress: Callable[[Progress], None] = lambda _: None) -> Progress:
        """Answer what is left; may be cancelled and begun again.

        Args:
            tell_progress: is called after each result.
        """
        following = iter(self._left)
        with self._output.open("a", encoding="utf-8") as out, self._errors.open("a", encoding="utf-8") as bad:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(IN_FLIGHT, len(self._left))):
                    group.create_task(self._work(following, out, bad, tell_progress))
        return self.progress

    async def _work(
        self, following: Iterator[Pending], out: TextIO, bad: TextIO, tell_progress: Callable[[Progress], None]
    ) -> None:
        for request in following:
            try:
                body = await self._answer(request)
            except ApiError as error:
                self.progress.failed += 1
                _write(bad, request.key, error.status, error.body())
            else:
                self.progress.completed += 1
                _write(out, request.key, 200, body)
            tell_progress(self.progress)

    async def _answer(self, request: Pending) -> dict[str, Any]:
        if request.line is None:
            raise ApiError(400, request.problem or "malformed")
        answer: ChatAnswer | TextAnswer
        try:
            body = {"model": self._model, **request.line.body} if self._model else request.line.body
            if request.line.url == CHAT_URL:
                chat = ChatRequest.model_validate(body)
                gateway, name = await self._route(chat.model)
                jobs = gateway.chat_jobs(chat.model_copy(update={"model": name}))
                answer = ChatAnswer(chat, jobs[0].served, jobs[0].reasoning)
            else:
                text = CompletionRequest.model_validate(body)
                gateway, name = await self._route(text.model)
                jobs = gateway.completion_jobs(text.model_copy(update={"model": name}))
                answer = TextAnswer(text, jobs[0].served)
        except ValidationError as error:
            raise validation_error(list(error.errors())) from None
        return await self._run(gateway, answer, jobs)

    async def _run(self, gateway: Gateway, answer: ChatAnswer | TextAnswer, jobs: list[Job]) -> dict[str, Any]:
        usage = Usage(prompt_tokens=sum(len(job.prompt) for job in jobs if job.sampling.sample == 0))
        ticket = await self._admit(gateway.models.base.name, jobs, usage.prompt_tokens)
        try:
            pieces = [piece async for piece in run_all(gateway.engine, jobs, usage)]
        finally:
            ticket.close(usage.completion_tokens)
        self.progress.prompt_tokens += usage.prompt_tokens
        self.progress.completion_tokens += usage.completion_tokens
        return answer.whole(pieces, usage)


def _write(file: TextIO, key: str, status: int, body: dict[str, Any]) -> None:
    identity = secrets.token_hex(8)
    result = {
        "id": f"batch_req_{identity}",
        "custom_id": key,
        "response": {"status_code": status, "request_id": identity, "body": body},
        "error": None if status == 200 else {"code": str(status), "message": body["error"]["message"]},
    }
    file.write(json.dumps(result) + "\n")
    file.flush()
