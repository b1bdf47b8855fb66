"""Score completions by a language model behind an OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final, final

from trainer.config.judge_settings import LLMJudgeSettings
from trainer.rewards.call_result import CallResult
from trainer.rewards.judges.cache import AnswerCache, content_key
from trainer.rewards.judges.caller import Caller, split_groups
from trainer.rewards.judges.endpoint import Endpoint, RefusedError
from trainer.rewards.judges.protocol import Item, PendingResults, Surroundings
from trainer.rewards.judges.question import (
    InvalidAnswerError,
    Question,
    ask_score,
    ask_scores,
    ask_winner,
    read_answer,
    shown_text,
)
from trainer.rewards.judges.threads import Call, Threads

CHAT: Final = "/chat/completions"
FORMAT_REFUSED: Final = (400, 404, 415, 422, 501)
"""Statuses with which servers refuse a `response_format` that they do not know."""


@final
class LLMJudge:
    """Asks a language model; its answers are validated, scaled to 0 to 1 and kept by content."""

    def __init__(self, name: str, settings: LLMJudgeSettings, rubric: str, cache: AnswerCache, around: Surroundings):
        """Nothing is asked yet.

        Args:
            name: of the reward.
            settings: arguments of the recipe.
            rubric: what a good completion is.
            cache: of answers; others may share it.
            around: the run.

        Raises:
            RewardError: the environment variable of the key is not set.
        """
        url = settings.url.rstrip("/")
        url = url if url.endswith(CHAT) else url + CHAT
        self._settings, self._rubric, self._cache, self._around = settings, rubric, cache, around
        self._endpoint = Endpoint(name, url, settings, settings.timeout_s, around)
        self._threads = Threads(settings.concurrency, f"judge-{name}")
        self._caller = Caller(self._endpoint, around, self._threads)
        self._sends_format = settings.response_format != "none"
        self._name = name

    def submit(self, items: Sequence[Item], sizes: Sequence[int]) -> Sequence[PendingResults]:
        """Start to ask; see `Judge`."""
        groups = split_groups(items, sizes)
        if self._settings.compare == "single":
            return [self._caller.submit(self._scorer(item), [item]) for item in items]
        if self._settings.compare == "group":
            return [self._caller.submit(self._group_scorer(group), group) for group in groups]
        return [self._pairs(group) for group in groups]

    def close(self) -> None:
        """End every wait; a request that was sent ends by its time limit, and nobody waits for it."""
        self._endpoint.close()
        self._threads.cancel()
        self._cache.close()

    def _scorer(self, item: Item) -> Call:
        def score() -> list[CallResult]:
            text, row = item
            question = ask_score(self._settings, self._rubric, row, shown_text(self._settings, text, row))
            return [self._scaled(self._ask(question)["score"])]

        return score

    def _group_scorer(self, group: Sequence[Item]) -> Call:
        def score() -> list[CallResult]:
            texts = [shown_text(self._settings, text, row) for text, row in group]
            question = ask_scores(self._settings, self._rubric, group[0][1], texts)
            return [self._scaled(value) for value in self._ask(question)["scores"]]

        return score

    def _pairs(self, group: Sequence[Item]) -> PendingResults:
        if len(group) == 1:
            done: Future[list[CallResult]] = Future()
            done.set_result([CallResult()])  # nobody to be compared with
            return done
        pairs = ring_pairs(len(group), self._settings.opponents)
        orders = [order for pair in pairs for order in ((pair, pair[::-1]) if self._settings.both_orders else (pair,))]
        return _PendingPairs(
            len(group),
            [(pair, self._caller.submit(self._comparer(group, pair), [group[i] for i in pair])) for pair in orders],
        )

    def _comparer(self, group: Sequence[Item], pair: tuple[int, int]) -> Call:
        def compare() -> list[CallResult]:
            first, second = (shown_text(self._settings, *group[index]) for index in pair)
            if first == second:
                return [CallResult(0.5), CallResult(0.5)]
            winner = self._ask(ask_winner(self._settings, self._rubric, group[pair[0]][1], first, second))["winner"]
            value = {"A": 1.0, "B": 0.0, "tie": 0.5}[winner]
            return [CallResult(value), CallResult(1.0 - value)]

        return compare

    def _scaled(self, score: float) -> CallResult:
        low, high = self._settings.scale
        return CallResult((float(score) - low) / (high - low))

    def _ask(self, question: Question) -> Mapping[str, Any]:
        """The judge's valid answer.

        Raises:
            OutageError: the server does not answer.
            RefusedError: it refuses the question.
            InvalidAnswerError: the answer was not valid, also after repairs.
        """
        body = {
            "model": self._settings.model,
            "messages": list(question.messages),
            "temperature": self._settings.temperature,
            "max_tokens": self._settings.max_tokens,
            **self._settings.extra_body,
        }
        key = content_key(body | {"schema": question.schema})
        answer, was_known = self._cache.answer(key, lambda: self._valid_answer(body, question))
        self._around.costs.add(cache_hits=int(was_known))
        return answer

    def _valid_answer(self, body: Mapping[str, Any], question: Question) -> tuple[dict[str, Any], Mapping[str, int]]:
        messages = list(body["messages"])
        for num_left in range(self._settings.num_repairs, -1, -1):
            reply = self._chat({**body, "messages": messages}, question.schema)
            self._around.costs.add(**reply.usage)
            try:
                return read_answer(reply.text, question.schema), reply.usage
            except InvalidAnswerError as error:
                self._cache.note_spent(reply.usage)
                cut = " (it was cut off at `max_tokens`)" if reply.was_cut else ""
                if not num_left:
                    raise InvalidAnswerError(f"the judge's answer{cut} {error}") from None
                messages += [
                    {"role": "assistant", "content": reply.text},
                    {
                        "role": "user",
                        "content": f"Your answer is not valid: {error}\nAnswer with the JSON object only.",
                    },
                ]
        raise AssertionError("the last round returns or raises")

    def _chat(self, body: Mapping[str, Any], schema: Mapping[str, Any]) -> _Reply:
        """Ask with the form of the answer where the server knows it."""
        if self._sends_format:
            form = {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": schema}}
            try:
                return _read_reply(self._endpoint.post({**body, "response_format": form}))
            except RefusedError as error:
                if self._settings.response_format != "auto" or error.status not in FORMAT_REFUSED:
                    raise
                reply = _read_reply(self._endpoint.post(body))  # raises again where the form was not the reason
                if self._sends_format:
                    self._sends_format = False
                    self._around.say(f"reward {self._name}: the server knows no response_format; answers are parsed")
                return reply
        return _read_reply(self._endpoint.post(body))


@final
@dataclass(frozen=True)
class _Reply:
    text: str
    was_cut: bool
    usage: Mapping[str, int]


def _read_reply(reply: Any) -> _Reply:
    """The text of a chat completion.

    Raises:
        RefusedError: it has another form.
    """
    try:
        choice = reply["choices"][0]
        text = choice["message"]["content"] or ""
        usage = reply.get("usage") or {}
        counts = {name: int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")}
        return _Reply(str(text), choice.get("finish_reason") == "length", counts)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise RefusedError(f"the server did not answer with a chat completion: {str(reply)[:200]}") from None


@final
@dataclass(frozen=True)
class _PendingPairs:
    """Comparisons within a group."""

    size: int
    pairs: Sequence[tuple[tuple[int, int], Future[list[CallResult]]]]

    def result(self) -> list[CallResult]:
        """For each completion the share of its comparisons that it wins, a tie counting half.

        It abstains where all of its comparisons did, and fails where one of them failed.
        """
        of_item: list[list[CallResult]] = [[] for _ in range(self.size)]
        for pair, future in self.pairs:
            for index, result in zip(pair, future.result(), strict=True):
                of_item[index].append(result)
        return [_win_rate(results) for results in of_item]


def _win_rate(results: Sequence[CallResult]) -> CallResult:
    failed = next((result for result in results if result.failure is not None), None)
    if failed is not None:
        return failed
    values = [result.value for result in results if result.value is not None]
    return CallResult(sum(values) / len(values) if values else None)


def ring_pairs(size: int, opponents: int) -> list[tuple[int, int]]:
    """Each of `size` items against the next `opponents` ones in a ring, every pair once.

    >>> ring_pairs(4, 1), len(ring_pairs(8, 4)), ring_pairs(2, 9)
    ([(0, 1), (1, 2), (2, 3), (3, 0)], 28, [(0, 1)])
    """
    pairs: dict[frozenset[int], tuple[int, int]] = {}
    for distance in range(1, min(opponents, size - 1) + 1):
        for index in range(size):
            other = (index + distance) % size
            pairs.setdefault(frozenset((index, other)), (index, other))
    return list(pairs.values())
