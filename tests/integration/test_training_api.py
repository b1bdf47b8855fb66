"""`trainer serve --training`: real gateway, engine and executor, a client in plain HTTP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import zstandard
from project import Project
from raw_training import OPEN, PROTOBUF, RawClient, pass_body, step_data
from serving import Server, serving

from trainer.api.datum import Datum
from trainer.api.service import open_service
from trainer.api.wire import message_class
from trainer.serve.training.front import CLIENT_VERSION

ROOT = Path(__file__).parents[2]
TINKER = Path(os.environ.get("TUNESMITH_TINKER_PYTHON") or ROOT / ".venv-tinker" / "bin" / "python")
"""An interpreter with tinker 0.38; with torch, custom losses run too."""
OPTIONS = ("--training-dtype", "float32", "--kv-cache-tokens", "8192", "--served-name", "model")
STEPS = 6


def training(project: Project, directory: str, *options: str):
    return serving(project, "model", "--training", "--training-dir", directory, *OPTIONS, *options)


@pytest.fixture(scope="module")
def server(shared: Project) -> Iterator[Server]:
    (shared.root / "keys").write_text("none\ntsk_one\ntml-two\n")
    with training(shared, "api-dir", "--training-slots", "4", "--api-key-file", "keys") as running:
        yield running


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().close()


@pytest.fixture
def client(server: Server) -> Iterator[RawClient]:
    client = RawClient(server.url).open()
    yield client
    client.post(f"sessions/{client.session}/finish", {})


@pytest.fixture(scope="module")
def undisturbed(shared: Project) -> list[float]:
    """Losses of the same training in process."""
    model = open_service(shared.root / "model", compute_dtype="float32").create(rank=4, seed=1)
    losses = []
    for step in range(STEPS):
        losses.append(model.forward_backward(step_data(step), "cross_entropy").metrics["loss:sum"])
        model.optim_step(1e-2, epsilon=1e-8)
    assert losses[3] < losses[0]
    return losses


def executor(server: Server) -> psutil.Process:
    children = psutil.Process(server.running.process.pid).children()
    return next(child for child in children if "trainer.api" in child.cmdline())


def test_training_over_http_equals_training_in_process(client, undisturbed) -> None:
    model = client.create()
    assert [model.train(step) for step in range(STEPS)] == undisturbed


def test_requests_that_arrive_out_of_order_run_in_order(client, undisturbed) -> None:
    model = client.create()
    bodies = [pass_body(model.name, 1 + 2 * step, step_data(step), "cross_entropy") for step in range(3)]
    for step in (2, 1, 0):
        client.post("optim_step", {"model_id": model.name, "seq_id": 2 + 2 * step, "adam_params": {
            "learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}})  # fmt: skip
    for step in (1, 2):
        client.post("forward_backward", bodies[step])
    assert client.send("retrieve_future", {"request_id": f"{model.name}/77"}).status_code == 410
    client.post("forward_backward", bodies[0])
    assert [client.passed(f"{model.name}/{1 + 2 * step}")["loss:sum"] for step in range(3)] == undisturbed[:3]


def test_a_repeated_request_gets_the_first_answer(client, undisturbed) -> None:
    model = client.create()
    for step in range(3):
        model.train(step)
        for route, body in model.sent:  # all of them once more
            client.post(route, body)
    other = {**model.sent[-1][1], "adam_params": {"learning_rate": 5.0}}
    response = client.send("optim_step", other)
    assert response.status_code == 400
    assert "was another one; numbers are used once" in response.text
    assert model.train(3) == undisturbed[3]
    create = {"session_id": client.session, "model_seq_id": 0, "base_model": "model", "lora_config": {"rank": 4}}
    assert client.post("create_model", create)["request_id"] == f"{model.name}/0"


def test_states_are_listed_loaded_archived_and_deleted(client, undisturbed, server, shared, tmp_path) -> None:
    model = client.create()
    for step in range(3):
        model.train(step)
    path = client.result(model.post("save_weights", path="three", user_metadata={"a": "b"}))["path"]
    assert path == f"tinker://{model.name}/weights/three"
    assert [model.train(step) for step in range(3, 6)] == undisturbed[3:]
    again = client.create_from(path)
    assert [again.train(step) for step in range(3, 6)] == undisturbed[3:]
    client.result(model.post("load_weights", path=path, optimizer=True))
    assert model.train(3) == undisturbed[3]
    assert client.create_from(path, optimizer=False).train(3) == undisturbed[3]  # before the first update
    runs = client.http.get(f"training_runs/{model.name}/checkpoints").json()["checkpoints"]
    assert [(each["checkpoint_id"], each["user_metadata"]) for each in runs] == [("weights/three", {"a": "b"})]
    info = client.post("weights_info", {"tinker_path": path})
    assert (info["lora_rank"], info["train_unembed"], info["base_model"]) == (4, False, "model")
    archive = client.http.get(f"training_runs/{model.name}/checkpoints/weights/three/archive")
    with tarfile.open(fileobj=BytesIO(archive.content)) as files:
        assert {"manifest.json", "adapter_model.safetensors", ".metadata"} <= set(files.getnames())
        files.extractall(tmp_path / "copy", filter="data")
    model_here = open_service(shared.root / "model", compute_dtype="float32").create_from(tmp_path / "copy")
    assert model_here.forward_backward(step_data(3), "cross_entropy").metrics["loss:sum"] == undisturbed[3]
    taken = client.fetch(model.post("save_weights", path="three")).json()
    assert "there is a state 'three' already" in taken["error"]
    assert client.result(model.post("save_weights", path="three", overwrite=True))["path"] == path
    assert client.send(f"training_runs/{model.name}/checkpoints/weights/three", b"", "DELETE").status_code == 204
    assert client.http.get(f"training_runs/{model.name}/checkpoints").json()["checkpoints"] == []
    del server


def test_samples_follow_the_saved_weights(client) -> None:
    model = client.create()
    for step in range(3):
        model.train(step)
    sampler = client.result(model.post("save_weights_for_sampler", sampling_session_seq_id=0))["sampling_session_id"]
    prompt = step_data(0)[1].tokens
    body = {
        "sampling_session_id": sampler, "seq_id": 0, "num_samples": 2, "prompt_logprobs": True,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": list(prompt)}]},
        "sampling_params": {"max_tokens": 4, "stop": []},
    }  # fmt: skip
    found = message_class("SampleResult")()
    found.ParseFromString(client.fetch(client.post("asample", body)["request_id"]).content)
    assert len(found.sequences) == 2
    drawn = [np.frombuffer(each.tokens, np.int32) for each in found.sequences]
    assert all(len(tokens) == 4 for tokens in drawn)
    data = [Datum.shifted([*prompt, *tokens.tolist()]) for tokens in drawn]
    ours = client.logprobs(model.forward_backward(data, forward_only=True))
    for each, logprobs in zip(found.sequences, ours, strict=True):
        assert np.frombuffer(each.logprobs, np.float32) == pytest.approx(
            logprobs[-4:], abs=0.1
        )  # the engine's bfloat16
    assert np.frombuffer(found.prompt_logprobs, np.float32)[1:] == pytest.approx(ours[0][: len(prompt) - 1], abs=0.1)
    refused = client.send("asample", {**body, "seq_id": 1, "prompt_alt_tokens_k": 2})
    assert (refused.status_code, "prompt_alt_tokens_k is not supported" in refused.text) == (400, True)


def test_clients_at_once_train_as_each_alone(server, undisturbed) -> None:
    """Two sessions whose requests are queued together share passes, and change nothing for each other."""
    clients = [RawClient(server.url).open() for _ in range(2)]
    models = [clients[0].create(), clients[1].create(rank=8, seed=2, train_mlp=False)]
    key = {"Authorization": "Bearer none"}
    before = httpx.get(f"{server.url}/metrics", headers=key).text
    requests: list[list[str]] = [[], []]
    for step in range(STEPS):
        for found, model in zip(requests, models, strict=True):
            found.append(model.forward_backward(step_data(step)))
            model.optim_step()
    assert [clients[0].passed(request)["loss:sum"] for request in requests[0]] == undisturbed
    alone = clients[1].create(rank=8, seed=2, train_mlp=False)
    losses = [clients[1].passed(request)["loss:sum"] for request in requests[1]]
    assert [alone.train(step) for step in range(STEPS)] == losses
    assert losses != undisturbed

    def number(text: str, name: str) -> int:
        return int(next(line.split()[1] for line in text.splitlines() if line.startswith(f"trainer_training_{name} ")))

    after = httpx.get(f"{server.url}/metrics", headers=key).text
    parts, passes = (number(after, name) - number(before, name) for name in ("packed_parts", "passes"))
    assert parts == 3 * STEPS
    assert passes < parts
    for client in clients:
        client.post(f"sessions/{client.session}/finish", {})


def test_a_mistake_is_the_result_of_its_request_alone(client, undisturbed) -> None:
    good = client.create()
    assert good.train(0) == undisturbed[0]
    model = client.create()
    nan = [Datum.of(datum.tokens, **{**datum.inputs, "weights": np.full(datum.num_tokens, np.nan)})
           for datum in step_data(0)]  # fmt: skip
    short = [step_data(0)[0], Datum.of([1, 2], target_tokens=[1])]
    for data, loss, says in (
        (nan, "cross_entropy", "datum 0: weights[0] is not finite"),
        (short, "cross_entropy", "datum 1: target_tokens has shape [1], and model_input 2 tokens"),
        (step_data(0), "dro", "loss_fn 'dro' is not one of"),
        (step_data(0), "ppo", "datum 0: ppo needs loss_fn_inputs advantages, logprobs"),
    ):
        failed = client.result(model.forward_backward(data, loss))
        assert (says in failed["error"], failed["category"]) == (True, "user"), failed
    partial = model.forward_backward(step_data(0))
    update = client.result(model.optim_step())
    assert "a forward_backward of this update, failed: nothing was updated" in update["error"]
    assert client.passed(partial)["loss:sum"] == undisturbed[0]
    assert "learning_rate = 'x' is not a finite number" in client.result(model.optim_step(learning_rate="x"))["error"]
    assert "optimizer 'muon'" in client.result(model.post("optim_step", optimizer_params={"type": "muon"}))["error"]
    assert "no state" in client.result(model.post("load_weights", path=f"tinker://{good.name}/weights/x",
                                                  optimizer=True))["error"]  # fmt: skip
    assert "not tinker://" in client.result(model.post("load_weights", path="/etc/passwd", optimizer=True))["error"]
    assert "is not made of letters" in client.result(model.post("save_weights", path="../x"))["error"]
    assert [model.train(step) for step in range(3)] == undisturbed[:3]
    assert good.train(1) == undisturbed[1]


@pytest.mark.parametrize(
    ("route", "body", "status", "says"),
    [
        ("forward_backward", b"\xff\xff\xff", 400, "the body is no PassHead in protobuf"),
        ("forward_backward", b"", 400, "no model_id"),
        ("forward_backward", {"a": 1}, 400, "Content-Type 'application/json'"),
        ("forward_backward", pass_body("nobody:train:0", 1, [], "cross_entropy"), 404, "no model 'nobody:train:0'"),
        ("optim_step", {"seq_id": 1}, 400, "the request has no model_id"),
        ("optim_step", {"model_id": "x", "seq_id": "one"}, 400, "seq_id 'one'"),
        ("create_model", {"session_id": "s", "model_seq_id": 0, "base_model": "llama"}, 404, "this server has 'model'"),
        ("create_model", {"session_id": "s", "model_seq_id": 0, "base_model": "model"}, 400, "no lora_config"),
        ("session_heartbeat", {"session_id": "s"}, 404, "no session 's'"),
        ("retrieve_future", {"request_id": "x"}, 404, "no model"),
        ("retrieve_future", {"request_id": "a:sample:0/0"}, 410, "no sample request"),
        (
            "create_sampling_session",
            {"session_id": "s", "sampling_session_seq_id": 1, "base_model": "x"},
            404,
            "no base",
        ),
        ("asample", {"prompt": 1}, 400, "asample:"),
        ("nothing", {}, 404, "/api/v1/nothing"),
        ("weights_info", {"tinker_path": "tinker://a/weights/b"}, 404, "no state tinker://a/weights/b"),
    ],
)
def test_requests_that_cannot_be_are_refused(server, route, body, status, says) -> None:
    response = RawClient(server.url).send(route, body)
    assert (response.status_code, says in response.text) == (status, True), response.text


def test_bodies_are_limited_and_may_be_compressed(client, undisturbed) -> None:
    model = client.create()
    body = pass_body(model.name, model.next(), step_data(0), "cross_entropy")
    headers = {**PROTOBUF, "Content-Encoding": "zstd"}
    sent = client.http.post("forward_backward", content=zstandard.compress(body), headers=headers)
    assert client.passed(sent.json()["request_id"])["loss:sum"] == undisturbed[0]
    bomb = zstandard.compress(bytes(1 << 27))
    assert len(bomb) < 1 << 15
    for content, status, says in ((bomb, 413, "more than 67,108,864 bytes"), (b"no zstd", 400, "is no zstd")):
        refused = client.http.post("forward_backward", content=content, headers=headers)
        assert (refused.status_code, says in refused.text) == (status, True), refused.text
    large = client.http.post("forward_backward", content=bytes((1 << 26) + 1), headers=PROTOBUF)
    assert large.status_code == 413


def test_killed_executors_and_servers_lose_nothing_and_do_nothing_twice(shared: Project, undisturbed) -> None:
    with training(shared, "killed-dir") as server:
        client = RawClient(server.url).open()
        model = client.create()
        assert model.train(0) == undisturbed[0]
        requests = []
        for step in range(1, 4):
            requests.append(model.forward_backward(step_data(step)))
            model.optim_step()
            if step == 2:
                executor(server).kill()
        assert [client.passed(request)["loss:sum"] for request in requests] == undisturbed[1:4]
        last = model.forward_backward(step_data(4))
        model.optim_step()
        server.running.signal(signal.SIGKILL, group=True)
        server.running.process.wait()
    with training(shared, "killed-dir") as server:
        client.url = server.url
        client.__post_init__()
        for route, body in model.sent:
            client.post(route, body)
        assert client.passed(last)["loss:sum"] == undisturbed[4]
        assert model.train(5) == undisturbed[5]
        assert client.result(model.optim_step(learning_rate=0.0))["metrics"]["updates"] == STEPS + 1


def test_keys_separate_accounts(server) -> None:
    assert RawClient(server.url, "tml-three").send("create_session", {}).status_code == 401
    assert RawClient(server.url, "").send("client/config", {}).status_code == 401
    first, second = RawClient(server.url, "tml-tsk_one").open(), RawClient(server.url, "tml-two").open()
    model = first.create()
    path = first.result(model.post("save_weights", path="mine"))["path"]
    for route, body in (
        ("get_info", {"model_id": model.name}),
        ("optim_step", {"model_id": model.name, "seq_id": 2, "adam_params": {}}),
        ("retrieve_future", {"request_id": f"{model.name}/1"}),
        ("weights_info", {"tinker_path": path}),
        ("session_heartbeat", {"session_id": first.session}),
        ("load_weights", {"session_id": second.session, "model_seq_id": 0, "path": path, "optimizer": True}),
    ):
        assert second.send(route, body).status_code == 404, route
    assert second.http.get("training_runs").json()["training_runs"] == []
    assert len(first.http.get("training_runs").json()["training_runs"]) == 1
    theirs = second.create()
    assert "no state" in second.result(theirs.post("load_weights", path=path, optimizer=True))["error"]
    for each in (first, second):
        each.post(f"sessions/{each.session}/finish", {})


@pytest.mark.skipif(not TINKER.is_file(), reason="no tinker client: set TUNESMITH_TINKER_PYTHON (docs/training_api.md)")
def test_the_tinker_client_uses_every_endpoint(server, undisturbed, tmp_path) -> None:
    steps = [
        [{"tokens": list(datum.tokens), "inputs": {name: values.tolist() for name, values in datum.inputs.items()}}
         for datum in step_data(step)]
        for step in range(STEPS)
    ]  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps(steps))
    command = [str(TINKER), str(Path(__file__).with_name("tinker_smoke.py")), server.url, "model", "data.json"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False, env=clean)
    assert done.returncode == 0, done.stderr
    assert "train_unembed" in done.stderr, "the session says what this server does not train"
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["version"].startswith(CLIENT_VERSION), (
        f"tinker {said['version']} is another protocol version than {CLIENT_VERSION}*: compare its requests with "
        "trainer/api/wire.py and trainer/serve/training, then raise CLIENT_VERSION"
    )
    assert said["models"] == ["model"]
    assert (said["info"]["lora_rank"], said["info"]["model_name"]) == (4, "model")
    assert said["losses"] == undisturbed
    assert said["update"]["updates"] == STEPS
    assert said["forward"] == said["resumed"] == said["fresh"]
    assert sorted(said["policy"]) == ["cispo", "gspo", "importance_sampling", "ppo"]
    assert len({metrics["loss:sum"] for metrics in said["policy"].values()}) > 1
    assert "loss_fn 'dro' is not one of" in said["unknown"]
    assert "nothing was updated" in said["after"]
    assert said["drawn"] == [[4, 4, "length"]] * 2
    assert said["prompt"][0] is None
    assert all(value < 0 for value in said["prompt"][1:])
    assert said["listed"] == ["sampler_weights/named", "sampler_weights/session-0", "weights/smoke"]
    assert said["left"] == ["sampler_weights/session-0", "weights/smoke"]
    assert (said["weights"]["base_model"], said["weights"]["train_unembed"], said["run"]) == ("model", False, 4)
    assert len(said["session"]) == 3
    if said["custom"] is not None:
        assert said["custom"]["mine"] == 1.0
        assert said["custom"]["loss:sum"] == pytest.approx(said["forward"])
