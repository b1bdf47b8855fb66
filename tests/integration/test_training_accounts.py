"""The training API of a server with accounts: limits on training, and what is counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from project import Project
from raw_training import ADAM, OPEN, RawClient, pass_body, step_data
from serving import serving
from test_accounts import Served

DATA = sum(datum.num_tokens for datum in step_data(0))
"""Tokens of one pass: 31."""


@pytest.fixture(scope="module")
def served(shared: Project) -> Iterator[Served]:
    options = ("--training", "--training-dir", "counted", "--training-dtype", "float32", "--with-accounts")
    where = ("--store", "sqlite:///training-store/store.sqlite")
    with serving(shared, "model", "--served-name", "model", *options, *where, "--kv-cache-tokens", "4096") as server:
        yield Served(server, shared, server.running.out.read_text().strip())


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().close()


def client_of(served: Served, account: str, **limits: int) -> RawClient:
    """A client with a key of a new account."""
    assert served.call("POST", "/v1/accounts", {"name": account}).status_code == 200
    assert served.call("PUT", f"/v1/quotas/{account}", {"limits": limits}).status_code == 200
    body = {"account": account, "scopes": ["training", "inference"]}
    key = str(served.call("POST", "/v1/keys", body).json()["key"])
    return RawClient(served.server.url, f"tml-{key}").open()


def usage(served: Served, account: str) -> dict[str, int]:
    rows = served.call("GET", f"/v1/usage?by=account&account={account}").json()["data"]
    return rows[0] if rows else {}


def trainer(served: Served, *arguments: str) -> str:
    """A command on the store of the server."""
    command = [sys.executable, "-m", "trainer", *arguments, "--store", "sqlite:///training-store/store.sqlite"]
    done = subprocess.run(command, cwd=served.project.root, capture_output=True, text=True, check=True, env=os.environ)
    return done.stdout


def test_training_tokens_of_a_day_are_a_429_with_the_limit_s_name(served: Served) -> None:
    client = client_of(served, "day", training_tokens_per_day=2 * DATA + 1)
    model = client.create()
    first = model.train(0)
    model.forward_backward(step_data(0))
    refused = client.send("forward_backward", pass_body(model.name, model.seq + 1, step_data(1), "cross_entropy"))
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "training_tokens_per_day")
    today = datetime.now(UTC).strftime("%Y-%m-%d")
    says = f"{2 * DATA} of {2 * DATA + 1} training tokens of {today} (UTC) are used; this request has {DATA}"
    assert refused.json()["error"]["message"] == says
    assert 1 <= int(refused.headers["retry-after"]) <= 86400
    for route, body in model.sent:  # repeated requests are not counted again, so they are let through below the limit
        if not isinstance(body, bytes):
            client.post(route, body)
    big = client.send("forward_backward", pass_body(model.name, 99, [*step_data(0)] * 3, "cross_entropy"))
    assert (big.status_code, big.json()["error"]["code"]) == (400, "training_tokens_per_day"), "it can never succeed"
    client.result(model.optim_step())  # what was accepted goes on
    assert served.call("PUT", "/v1/quotas/day", {"limits": {"training_tokens_per_day": None}}).status_code == 200
    assert model.train(0) < first
    used = usage(served, "day")
    assert (used["requests"], used["training_tokens"]) == (3, 3 * DATA)


def test_a_repeated_request_is_counted_once(served: Served) -> None:
    client = client_of(served, "twice", training_tokens_per_day=100 * DATA)
    model = client.create()
    model.train(0)
    for route, body in model.sent:
        client.post(route, body)
    malformed = client.send("forward_backward", b"\x0a\x03abc\x10\x05\xff")
    assert malformed.status_code == 400
    other = client_of(served, "other")
    assert other.send("forward_backward", pass_body(model.name, 9, step_data(0), "cross_entropy")).status_code == 404
    assert usage(served, "twice")["training_tokens"] == DATA
    assert usage(served, "other").get("training_tokens", 0) == 0


def test_models_in_training_are_limited_until_a_session_ends(served: Served) -> None:
    client = client_of(served, "few", training_models=2)
    models = [client.create(), client.create()]
    third = {"session_id": client.session, "model_seq_id": 2, "base_model": "model", "lora_config": {"rank": 4}}
    refused = client.send("create_model", third)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "training_models")
    says = "2 models in training at once is the limit, and 2 are open: finish a session, or wait"
    assert (refused.json()["error"]["message"], refused.headers["retry-after"]) == (says, "10")
    again = {**third, "model_seq_id": 0}
    assert client.post("create_model", again)["request_id"] == f"{models[0].name}/0", "the same again is no new one"
    path = client.result(models[0].post("save_weights", path="one"))["path"]
    body = {"session_id": client.session, "model_seq_id": 2, "path": path, "optimizer": True}
    assert client.send("load_weights", body).status_code == 429
    assert models[1].train(0) > 0, "those that there are go on"
    client.post(f"sessions/{client.session}/finish", {})
    later = RawClient(served.server.url, client.key).open()
    assert later.create().train(0) > 0


def test_samples_of_the_training_api_count_as_inference(served: Served) -> None:
    client = client_of(served, "sampler", tokens_per_minute=40)
    model = client.create()
    sampler = client.result(model.post("save_weights_for_sampler", sampling_session_seq_id=0))["sampling_session_id"]
    tokens = list(step_data(0)[0].tokens)
    body = {
        "sampling_session_id": sampler, "seq_id": 0, "num_samples": 2, "sampling_params": {"max_tokens": 4, "stop": []},
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": tokens}]},
    }  # fmt: skip
    assert client.fetch(client.post("asample", body)["request_id"]).status_code == 200
    client.post("asample", body)  # the same again
    used = usage(served, "sampler")
    assert (used["requests"], used["prompt_tokens"], used["completion_tokens"]) == (1, len(tokens), 8)
    refused = client.send("asample", {**body, "seq_id": 1, "num_samples": 8})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "tokens_per_minute"), "41 alone"
    refused = client.send("asample", {**body, "seq_id": 1, "num_samples": 4})
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "tokens_per_minute")


def test_commands_show_and_set_limits_on_training(served: Served) -> None:
    client = client_of(served, "shown")
    model = client.create()
    model.train(0)
    trainer(served, "quota", "set", "shown", f"training_tokens_per_day={DATA}", "training_models=3")
    usage(served, "shown")  # the server stores what it counted
    limits = {each["limit"]: each for each in json.loads(trainer(served, "quota", "get", "shown", "--json"))}
    assert limits["training_tokens_per_day"]["value"] == limits["training_tokens_per_day"]["used"] == str(DATA)
    assert limits["training_models"]["value"] == "3"
    table = trainer(served, "usage", "shown", "--by", "account")
    assert table.splitlines()[0].split() == [
        "account", "requests", "tokens", "in", "tokens", "out", "trained", "device", "s", "replica", "s", "cost",
    ]  # fmt: skip
    assert table.splitlines()[-1].split()[:5] == ["shown", "1", "0", "0", str(DATA)]
    served.call("PUT", "/v1/quotas/shown", {"limits": {"training_models": 3}})  # this server reads limits again
    over = client.send("forward_backward", pass_body(model.name, model.seq + 1, step_data(1), "cross_entropy"))
    assert over.json()["error"]["code"] == "training_tokens_per_day"
    assert client.post("optim_step", {"model_id": model.name, "seq_id": model.next(), "adam_params": ADAM})
