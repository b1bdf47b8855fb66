"""The executor in this process: order, packs of several models, failures, leases, and what a new one rebuilds."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from raw_training import pass_body, step_data
from tiny import tiny_model_dir

from trainer.api.executor import Executor
from trainer.api.journal import Journal
from trainer.api.limits import Limits
from trainer.api.protocol import Refused
from trainer.api.requests import Request
from trainer.api.slots import Base
from trainer.api.store import Store
from trainer.api.wire import message_class
from trainer.config.recipe import ModelSettings

ADAM = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
STEPS = 5
LOOP = asyncio.new_event_loop()


@pytest.fixture(scope="module", autouse=True)
def _loop() -> Iterator[None]:
    thread = threading.Thread(target=LOOP.run_forever, daemon=True)
    thread.start()
    yield
    LOOP.call_soon_threadsafe(LOOP.stop)
    thread.join()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Base:
    model = tiny_model_dir(tmp_path_factory.mktemp("model"), "llama", scale=5.0)
    settings = ModelSettings(path=str(model), compute_dtype="float32")
    return Base(settings, torch.device("cpu"), micro_batch_tokens=512)


@dataclass
class Client:
    """Requests of one model."""

    executor: Executor
    model: str
    owner: str = ""
    seq: int = 0
    sent: list[Request] = field(default_factory=list)

    def submit(self, kind: str, body: bytes) -> int:
        self.seq += 1
        self.sent.append(Request(self.seq, kind, body))
        self.executor.submit(self.owner, self.model, self.sent[-1])
        return self.seq

    def post(self, kind: str, **parameters: Any) -> int:
        return self.submit(kind, json.dumps(parameters).encode())

    def forward_backward(self, step: int, **changes: Any) -> int:
        body = pass_body(self.model, self.seq + 1, step_data(step), changes.pop("loss", "cross_entropy"), **changes)
        return self.submit("pass", body)

    def optim(self) -> int:
        return self.post("optim", adam_params=ADAM)

    def result(self, seq: int) -> tuple[str, Any]:
        wait = self.executor.wait(self.owner, f"{self.model}/{seq}", 60)
        state, kind, body = asyncio.run_coroutine_threadsafe(wait, LOOP).result(90)
        assert state == "done"
        if kind != "pass":
            return str(kind), json.loads(body)
        message = message_class("PassResult")()
        message.ParseFromString(body)
        return "pass", {entry.key: entry.value for entry in message.metrics}["loss:sum"]

    def train(self, step: int) -> float:
        passed, updated = self.forward_backward(step), self.optim()
        assert self.result(updated)[0] == "json", self.result(updated)
        return self.result(passed)[1]


@contextmanager
def executing(base: Base, root: Path, **limits: Any) -> Iterator[Executor]:
    """An executor; at its end memory is lost, as by a kill: what is on disk stays."""
    executor = Executor(base, Store(root), Limits(**limits))
    executor.start(LOOP)
    try:
        yield executor
    finally:
        executor.stop()
        for tenant in executor.tenants.values():
            tenant.park()
            tenant.files.requests.close()
            tenant.files.results.close()


def create(executor: Executor, session: str | None = None, number: int = 0, **lora: Any) -> Client:
    session = session or executor.sessions.open("", {}).name
    request = executor.create("", session, number, {"rank": 4, "seed": 1, **lora}, None, None)
    client = Client(executor, request.rpartition("/")[0])
    assert client.result(0)[0] == "json", client.result(0)
    return client


def again(client: Client, executor: Executor) -> Client:
    """The same client with a new executor."""
    return Client(executor, client.model, client.owner, client.seq, client.sent)


@pytest.fixture(scope="module")
def undisturbed(base: Base, tmp_path_factory) -> list[float]:
    with executing(base, tmp_path_factory.mktemp("undisturbed")) as executor:
        client = create(executor)
        return [client.train(step) for step in range(STEPS)]


@contextmanager
def paused(executor: Executor) -> Iterator[None]:
    """Requests are accepted, and nothing is done: they are all there when it goes on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "_ready", list)
        yield


def test_models_whose_requests_are_there_share_passes_and_nothing_else(base, tmp_path, undisturbed) -> None:
    with executing(base, tmp_path) as executor:
        one, two = create(executor), create(executor, rank=8, seed=2, train_mlp=False)
        before = dict(executor.counters)
        with paused(executor):
            found = [(one.forward_backward(step), one.optim(), two.forward_backward(step), two.optim())
                     for step in range(STEPS)]  # fmt: skip
        assert [one.result(each[0])[1] for each in found] == undisturbed
        theirs = [two.result(each[2])[1] for each in found]
        assert executor.counters["packed_parts"] - before["packed_parts"] == 2 * STEPS
        assert executor.counters["passes"] - before["passes"] == STEPS
        alone = create(executor, rank=8, seed=2, train_mlp=False)
        assert [alone.train(step) for step in range(STEPS)] == theirs
        assert theirs != undisturbed
        files = alone.executor.tenants[alone.model].files
        assert files.settings["lora"]["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]


def test_a_pass_that_fails_half_way_harms_only_the_model_whose_data_it_is(
    base, tmp_path, undisturbed, monkeypatch
) -> None:
    with executing(base, tmp_path) as executor:
        good, bad = create(executor), create(executor, seed=9)
        run = base.run
        poison = step_data(1)[0].tokens

        def failing(parts, *, backward):
            results = run(parts, backward=backward)  # gradients are added before it fails
            if any(part.slot is executor.tenants[bad.model].slot and poison in [each.tokens for each in part.data]
                   for part in parts):  # fmt: skip
                raise RuntimeError("out of memory")
            return results

        monkeypatch.setattr(base, "run", failing)
        with paused(executor):
            found = [(good.forward_backward(step), good.optim(), bad.forward_backward(step), bad.optim())
                     for step in range(3)]  # fmt: skip
        assert [good.result(each[0])[1] for each in found] == undisturbed[:3]
        assert bad.result(found[0][2])[0] == "pass"
        assert bad.result(found[1][2]) == ("error", {"error": "RuntimeError: out of memory", "category": "server"})
        assert "nothing was updated" in bad.result(found[1][3])[1]["error"]
        assert bad.result(found[2][2])[0] == "pass"
        assert executor.counters["recoveries"] == 2
        assert good.train(3) == undisturbed[3]


@pytest.mark.parametrize("checkpoint_s", [0.0, 1e9], ids=["checkpoints", "journal"])
def test_a_new_executor_goes_on_with_the_first_answers(base, tmp_path, undisturbed, checkpoint_s) -> None:
    with executing(base, tmp_path, checkpoint_s=checkpoint_s) as executor:
        client = create(executor)
        losses = [client.train(step) for step in range(2)]
        with paused(executor):  # accepted, and not begun when the kill comes
            client.forward_backward(2)
            client.optim()
    for _ in range(2):  # and once more, without any new request
        with executing(base, tmp_path, checkpoint_s=checkpoint_s) as executor:
            client = again(client, executor)
            for request in list(client.sent):
                executor.submit("", client.model, request)
            assert [client.result(seq)[1] for seq in (1, 3, 5)] == [*losses, undisturbed[2]] == undisturbed[:3]
            assert client.result(6)[1]["metrics"]["updates"] == 3
    with executing(base, tmp_path, checkpoint_s=checkpoint_s) as executor:
        client = again(client, executor)
        assert [client.train(step) for step in range(3, 5)] == undisturbed[3:5]
        changed = Request(6, "optim", json.dumps({"adam_params": {**ADAM, "learning_rate": 3.0}}).encode())
        if client.executor.tenants[client.model].files.request(6) is not None:
            with pytest.raises(Refused, match="was another one"):
                executor.submit("", client.model, changed)


def test_a_damaged_checkpoint_is_moved_aside_and_the_one_before_is_enough(base, tmp_path, undisturbed) -> None:
    with executing(base, tmp_path, checkpoint_s=0.0) as executor:
        client = create(executor)
        assert [client.train(step) for step in range(4)] == undisturbed[:4]
        directory = executor.tenants[client.model].files.checkpoints
    found = sorted(directory.iterdir())
    assert 1 < len(found) <= 3
    (found[-1] / "__0_0.distcp").write_bytes(b"damaged")
    with executing(base, tmp_path) as executor:
        assert again(client, executor).train(4) == undisturbed[4]
    assert (directory / f"{found[-1].name}.broken").is_dir()


def test_a_torn_journal_loses_only_what_was_never_acknowledged(base, tmp_path, undisturbed) -> None:
    with executing(base, tmp_path) as executor:
        client = create(executor)
        client.train(0)
        with paused(executor):
            client.forward_backward(1)
        file = executor.tenants[client.model].files.requests.path
    file.write_bytes(file.read_bytes()[:-3])
    with executing(base, tmp_path) as executor:
        client = again(client, executor)
        executor.submit("", client.model, client.sent[-1])  # the client had no answer and sends it again
        client.optim()
        assert client.result(3)[1] == undisturbed[1]


def test_states_outlive_what_they_came_from(base, tmp_path, undisturbed) -> None:
    """A loaded state may be deleted: the journal does not need it again. Killed between saving and answering: once."""
    with executing(base, tmp_path) as executor:
        client = create(executor)
        assert [client.train(step) for step in range(2)] == undisturbed[:2]
        path = client.result(client.post("save", path="two"))[1]["path"]
        client.train(2)
        assert client.result(client.post("load", path=path, optimizer=True))[0] == "json"
        executor.tenants[client.model].files.delete_state("weights", "two")
        lost = client.post("save", path="again")
        assert client.result(lost)[0] == "json"
        files = executor.tenants[client.model].files
    results = files.results.path
    journal = Journal(results)
    journal.drop(lambda record: record.head["seq"] != lost)
    journal.close()
    with executing(base, tmp_path) as executor:
        client = again(client, executor)
        assert client.result(lost)[1]["path"].endswith("/weights/again")
        assert client.train(2) == undisturbed[2]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_silent_client_gives_up_its_slot_and_may_come_back(base, tmp_path, undisturbed) -> None:
    with executing(base, tmp_path, slots=1, lease_s=0.2) as executor:
        first = create(executor)
        assert [first.train(step) for step in range(2)] == undisturbed[:2]
        second = create(executor)  # waits for the slot
        assert second.train(0) == undisturbed[0]
        states = list(executor.tenants[first.model].files.states())
        assert [each["checkpoint_id"] for each in states] == ["weights/lease-000004"]
        assert first.train(2) == undisturbed[2]
        wait_for(lambda: executor.stats()["slots_used"] == 0)
        request = executor.create("", executor.sessions.open("", {}).name, 0, {}, {"path": states[0]["tinker_path"],
                                  "optimizer": True}, None)  # fmt: skip
        third = Client(executor, request.rpartition("/")[0])
        assert third.train(2) == undisturbed[2]
    with executing(base, tmp_path, slots=1) as executor:
        executor.sessions.finish("", first.model.partition(":")[0])
        executor.sessions.finish("", first.model.partition(":")[0])  # a lost answer is asked for again
        with pytest.raises(Refused, match="has finished"):
            again(first, executor).optim()


def test_a_partial_gradient_is_kept_by_the_journal_not_by_states(base, tmp_path, undisturbed) -> None:
    with executing(base, tmp_path, slots=1, lease_s=0.2) as executor:
        client = create(executor)
        client.train(0)
        passed = client.forward_backward(1)
        assert client.result(passed)[1] == undisturbed[1]
        wait_for(lambda: executor.stats()["slots_used"] == 0)
        assert list(executor.tenants[client.model].files.states()) == []
        client.optim()
        assert client.train(2) == undisturbed[2]


def test_creation_that_cannot_be_is_refused(base, tmp_path) -> None:
    with executing(base, tmp_path, max_rank=8) as executor:
        session = executor.sessions.open("a", {}).name

        def refusal(lora: dict[str, Any], begin: dict[str, Any] | None = None, owner: str = "a") -> str:
            with pytest.raises(Refused) as caught:
                executor.create(owner, session, 0, lora, begin, None)
            return caught.value.message

        assert "this server takes 1 to 8" in refusal({"rank": 9})
        assert "this server takes 1 to 8" in refusal({"rank": True})
        assert "only the LM head" in refusal({"rank": 2, "train_attn": False, "train_mlp": False})
        assert "not tinker://" in refusal({}, {"path": "x", "optimizer": True})
        assert "no state" in refusal({}, {"path": "tinker://m/weights/x", "optimizer": True})
        assert "no session" in refusal({"rank": 2}, owner="b")
        assert not executor.tenants
        good = create(executor)
        path = good.result(good.post("save", path="x"))[1]["path"]
        shutil.copytree(
            executor.sessions.find_state("", path, ("weights",)), tmp_path / "models" / "foreign" / "weights" / "y"
        )
        state = tmp_path / "models" / "foreign" / "weights" / "y" / "state.json"
        state.write_text(state.read_text().replace(base.digest, "sha256:other"))
        (tmp_path / "models" / "foreign" / "model.json").write_text('{"owner": "a", "model": "foreign"}')
        assert "state.json" in refusal({}, {"path": "tinker://foreign/weights/y", "optimizer": True})


def test_logprobs_are_those_of_the_data_in_their_order(base, tmp_path) -> None:
    with executing(base, tmp_path) as executor:
        client = create(executor)
        seq = client.forward_backward(0, forward_only=True)
        client.result(seq)
        found = executor.tenants[client.model].files.result(seq)
        assert found is not None
        _, body = found
        message = message_class("PassResult")()
        message.ParseFromString(body)
        fields = {entry.key: entry.value for entry in message.outputs[0].fields}
        assert sorted(fields) == ["elementwise_loss", "logprobs"]
        sizes = np.diff(np.frombuffer(fields["logprobs"].offsets, np.int64)) // 4
        assert sizes.tolist() == [datum.num_tokens for datum in step_data(0)]
        assert np.array_equal(
            np.frombuffer(fields["logprobs"].data, np.float32),
            -np.frombuffer(fields["elementwise_loss"].data, np.float32),
        )
