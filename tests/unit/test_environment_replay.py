"""Environments whose processes are killed from outside: played again where the recipe calls them deterministic."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from obedient import ENVIRONMENT, ROW, settings, turn

from trainer.environments.pool import EnvironmentDiedError, EnvironmentPool
from trainer.environments.replay import MAX_KILLS
from trainer.environments.zygote_process import ZygoteDiedError

MORE = '''

class Forgetful(Obedient):
    """Answers with its process id, which no seed decides."""

    def step(self, turn):
        return self.say(str(os.getpid()))

class Fatal(Obedient):
    """Its process is killed in every step, as the kernel kills one that uses all memory."""

    def step(self, turn):
        os.kill(os.getpid(), 9)
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("replay")
    (directory / "mine.py").write_text(ENVIRONMENT + MORE)
    return directory


def kill(pid: int, by: signal.Signals = signal.SIGKILL) -> None:
    """End a process and wait for its end, and for that of its children."""
    family = [psutil.Process(pid), *psutil.Process(pid).children()]
    os.kill(pid, by)
    wait_until(lambda: all(not each.is_running() or each.status() == psutil.STATUS_ZOMBIE for each in family))


def wait_until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not what():
        assert time.monotonic() < end
        time.sleep(0.005)


def said(reply: dict[str, Any]) -> str:
    return str(reply["messages"][0]["content"])


def test_a_killed_environment_answers_as_if_it_had_not_been(place):
    sentences: list[str] = []
    with EnvironmentPool(settings(place, deterministic=True), sentences.append) as pool:
        remote = pool.open()
        remote.reset(ROW, (), 5)
        assert said(remote.step(turn("go"))) == "1 5"
        kill(remote._remote._pid)
        assert said(remote.step(turn("go", 1))) == "2 5", "the third call of one process, the second answered"
        kill(remote._remote._pid, signal.SIGTERM)
        assert said(remote.step(turn("go", 2))) == "3 5"
        remote.close()
    assert len(sentences) == 2
    assert "was killed by SIGKILL" in sentences[0]
    assert "was killed by SIGTERM" in sentences[1]


def test_a_killed_zygote_is_started_again_with_all_environments(place):
    sentences: list[str] = []
    with EnvironmentPool(settings(place, deterministic=True), sentences.append) as pool:
        remotes = [pool.open() for _ in range(4)]
        pool.map(lambda pair: pair[1].reset(ROW, (), pair[0]), list(enumerate(remotes)))
        before = pool.zygote_pid
        kill(before)
        replies = pool.map(lambda remote: said(remote.step(turn("go"))), remotes)
        assert replies == ["1 0", "1 1", "1 2", "1 3"]
        assert pool.zygote_pid != before
        for remote in remotes:
            remote.close()
    assert any("the process that starts environments has ended; it is started again" in text for text in sentences)


def test_kills_at_random_calls_change_no_answer(place):
    """Both kinds of process, over 30 calls of three environments."""
    draw = random.Random(3)
    with EnvironmentPool(settings(place, deterministic=True)) as pool:
        remotes = [pool.open() for _ in range(3)]
        for seed, remote in enumerate(remotes):
            remote.reset(ROW, (), seed)
        for number in range(10):
            for seed, remote in enumerate(remotes):
                victim = draw.choice(["nothing", "environment", "zygote"]) if number % 3 == 0 else "nothing"
                if victim != "nothing":
                    kill(remote._remote._pid if victim == "environment" else pool.zygote_pid)
                assert said(remote.step(turn("go", number))) == f"{number + 1} {seed}"
        for remote in remotes:
            remote.close()


def test_one_that_answers_differently_when_played_again_is_refused(place):
    with EnvironmentPool(settings(place, environment="mine.py:Forgetful", deterministic=True)) as pool:
        remote = pool.open()
        remote.reset(ROW, (), 5)
        remote.step(turn("go"))
        kill(remote._remote._pid)
        with pytest.raises(
            EnvironmentDiedError, match=r"call 2 had another answer .* take all randomness from the seed"
        ):
            remote.step(turn("go", 1))
        remote.close()


def test_one_that_is_killed_each_time_is_a_failed_rollout(place):
    sentences: list[str] = []
    with EnvironmentPool(settings(place, environment="mine.py:Fatal", deterministic=True), sentences.append) as pool:
        remote = pool.open()
        remote.reset(ROW, (), 5)
        with pytest.raises(EnvironmentDiedError, match=f"killed {MAX_KILLS} times"):
            remote.step(turn("go"))
        remote.close()
    assert len(sentences) == MAX_KILLS - 1


@pytest.mark.parametrize(("text", "reason"), [("exit", "status 3"), ("raise", "LookupError"), ("segfault", "SIGSEGV")])
def test_one_that_ends_by_itself_is_not_played_again(place, text, reason):
    sentences: list[str] = []
    with EnvironmentPool(settings(place, deterministic=True), sentences.append) as pool:
        remote = pool.open()
        remote.reset(ROW, (), 5)
        with pytest.raises(EnvironmentDiedError, match=reason):
            remote.step(turn(text))
        remote.close()
    assert sentences == []


def test_without_the_promise_a_killed_environment_is_a_failed_rollout_and_a_killed_zygote_ends_the_attempt(place):
    with EnvironmentPool(settings(place)) as pool:
        remote, other = pool.open(), pool.open()
        remote.reset(ROW, (), 5)
        kill(remote._pid)
        with pytest.raises(EnvironmentDiedError, match="killed by SIGKILL"):
            remote.step(turn("go"))
        kill(pool.zygote_pid)
        with pytest.raises(ZygoteDiedError, match="the process that starts environments has ended"):
            other.reset(ROW, (), 5)
        with pytest.raises(ZygoteDiedError, match="the process that starts environments has ended"):
            pool.open()
