"""Rollouts of a run on `trainer serve`, which serves others at the same time: real processes, a tiny model."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from adapter_files import adapter_dir
from project import Project
from rft_project import NO_EVALUATION, prepare, rollouts, run_here
from serving import Server, serving

from trainer.config.recipe import LoraSettings, ModelSettings
from trainer.config.rft_sections import RewardSpec
from trainer.data.chat import load_tokenizer
from trainer.distributed.world import World
from trainer.errors import NumericalError
from trainer.model.policy import Policy, load_policy
from trainer.rewards.judges.open import Judging
from trainer.rewards.judges.protocol import Surroundings
from trainer.rewards.runner import RewardRunner, Scored
from trainer.sampling.sampler import SampleRequest, SamplingParams
from trainer.sampling.served import ServedSampler
from trainer.sampling.server_client import SamplerError, ServerClient
from trainer.types import Row

WORLD = World(rank=0, size=1, device=torch.device("cpu"))
REQUESTS = [SampleRequest((40, 41, 42, 43), row, 3) for row in range(4)]


@pytest.fixture(scope="module")
def project(shared: Project) -> Project:
    prepare(shared)
    config = shared.root / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 2048}))  # for the judge
    adapter_dir(shared.root / "theirs", shared.root / "model", rank=4, seed=1)
    return shared


@pytest.fixture(scope="module")
def server(project: Project) -> Iterator[Server]:
    with serving(
        project, "model", "--adapter", "theirs=theirs", "--max-queue", "8", "--kv-cache-tokens", "4096"
    ) as made:
        yield made


@pytest.fixture(scope="module")
def policy(project: Project) -> Policy:
    settings = ModelSettings(path=str(project.root / "model"), compute_dtype="float32")
    return load_policy(settings, LoraSettings(rank=4), 0, WORLD.device)


@pytest.fixture
def sampler(server: Server, project: Project, tmp_path: Path) -> ServedSampler:
    path = str(project.root / "model")
    tokenizer = load_tokenizer(ModelSettings(path=path))
    return ServedSampler([ServerClient(server.url, model=path)], tokenizer, WORLD, name="mine", exchange_dir=tmp_path)


def put_adapter(policy: Policy, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trained_parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def params(**changes: Any) -> SamplingParams:
    settings: dict[str, Any] = {"max_completion_tokens": 8, "stop_ids": frozenset({2}), "seed": 0, "step": 0}
    return SamplingParams(**settings | changes)


def models(server: Server) -> list[str]:
    return [card["id"] for card in httpx.get(f"{server.url}/v1/models").json()["data"]]


def tokens(groups: Any) -> list[list[tuple[int, ...]]]:
    return [[each.token_ids for each in group] for group in groups]


def theirs(server: Server) -> Any:
    body = {"model": "theirs", "prompt": [40, 41, 42], "max_tokens": 8, "temperature": 1, "seed": 5}
    while (reply := httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)).status_code == 429:
        time.sleep(0.1)
    return reply.json()["choices"]


def test_completions_have_the_logprobs_of_the_policy_that_was_published_last(server, sampler, policy):
    before = theirs(server)
    for version in (3, 4):
        put_adapter(policy, version)
        sampler.publish(policy, version)
        groups = sampler.sample(REQUESTS, params())
        assert [len(group) for group in groups] == [3, 3, 3, 3]
        assert {each.policy_version for group in groups for each in group} == {version}
        expected = teacher_forced(policy, groups)
        served = torch.tensor([value for group in groups for each in group for value in each.logprobs])
        assert float((served - expected).abs().max()) < 1e-4
    again = sampler.sample(REQUESTS, params())
    assert tokens(again) == tokens(groups), "the seed decides"
    assert models(server) == ["model", "theirs", "mine-rollouts"], "one name, its adapter replaced"
    assert theirs(server) == before
    sampler.finalizer()
    assert models(server) == ["model", "theirs"]


def teacher_forced(policy: Policy, groups: Any) -> torch.Tensor:
    from trainer.data.tokens import TokenSequence
    from trainer.model.batch import Batch

    prompt = REQUESTS[0].prompt_ids
    sequences = [
        TokenSequence(prompt + each.token_ids, (False,) * len(prompt) + (True,) * len(each.token_ids))
        for group in groups
        for each in group
    ]
    with torch.no_grad():
        return policy(Batch.pack(sequences, WORLD.device)).logprobs


def test_a_stop_string_ends_a_completion_with_the_token_that_completes_it(sampler, policy):
    put_adapter(policy, 1)
    sampler.publish(policy, 1)
    ((whole, *_),) = sampler.sample(REQUESTS[:1], params(is_greedy=True, stop_ids=frozenset({0})))
    string = whole.text[len(whole.text) // 2 :][:2]
    ((cut, *_),) = sampler.sample(REQUESTS[:1], params(is_greedy=True, stop_ids=frozenset({0}), stop=(string,)))
    assert cut.finish_reason == "stop"
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    decode = sampler.tokenizer.decode
    assert string in decode(list(cut.token_ids), skip_special_tokens=False)
    assert string not in decode(list(cut.token_ids[:-1]), skip_special_tokens=False)


def test_an_adapter_that_somebody_else_put_under_the_name_is_missed(server, sampler, policy, project):
    sampler.publish(policy, 1)
    body = {"lora_name": sampler.name, "lora_path": str(project.root / "theirs")}
    assert httpx.post(f"{server.url}/v1/load_lora_adapter", json=body, timeout=60).status_code == 200
    with pytest.raises(NumericalError, match=r"answered with mine-rollouts@\w+ instead of mine-rollouts@"):
        sampler.sample(REQUESTS, params())


def test_an_adapter_of_other_weights_is_refused_at_the_publish(server, sampler, project):
    other = load_policy(
        ModelSettings(path=str(project.root / "model"), compute_dtype="float32"), LoraSettings(rank=4), 0, WORLD.device
    )
    with torch.no_grad():
        other.causal_lm.base_model.layers[0].mlp.down_proj.weight.mul_(30)
    with pytest.raises(NumericalError, match=r"its logprobs of a fixed sentence are .* away from those of"):
        sampler.publish(other, 0)


def test_what_the_server_cannot_give_is_refused(sampler, policy):
    sampler.publish(policy, 0)
    with pytest.raises(SamplerError, match="returns logprobs at temperature 1"):
        sampler.sample(REQUESTS, params(temperature=0.7))


def test_a_run_trains_through_a_server_that_serves_others_too(server, project):
    """Its 24 sequences of a step exceed the server's queue of 8, and another client asks all the time."""
    answers, is_over = [], threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            answers.append(theirs(server))

    other = threading.Thread(target=ask)
    other.start()
    rollout = {"rollout__sampler": "served", "rollout__server_url": server.url, "rollout__chunk_prompts": 6}
    try:
        run = run_here(project, "served", **NO_EVALUATION, **rollout)
    finally:
        is_over.set()
        other.join()
    metrics = run.metrics()
    assert [each["step"] for each in metrics] == [1, 2, 3, 4, 5]
    assert all(each["train/sampler_kl"] < 1e-6 for each in metrics), "float32 on both sides"
    assert metrics[-1]["train/ref_kld"] > 0
    assert all(len(rollouts(run, step)) == 24 for step in range(5))
    assert len({str(each) for each in answers}) == 1


def test_rollouts_of_several_turns_are_played_on_a_server(server, project):
    """Each by itself: the server batches them. What was drawn is what the policy's own logprobs say."""
    shutil.copy(Path(__file__).with_name("guessing.py"), project.root / "guessing.py")
    rows = [{"ask": f"what is {number}?"} for number in range(8)]
    (project.root / "asks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rollout = {
        "sampler": "served",
        "server_url": server.url,
        "group_size": 3,
        "max_completion_tokens": 12,
        "stop": ["a", "e", "i", "o", "n", "s", " "],
        "environment": "guessing.py:Echo",
    }
    run = run_here(
        project,
        "turns",
        data={"train": "asks.jsonl", "max_seq_tokens": 128},
        rows_per_step=4,
        steps=2,
        rewards=[],
        rollout=rollout,
        algorithm={"normalizer": "sequence"},
        eval_interval=0,
    )
    records = [record for step in range(2) for record in rollouts(run, step)]
    assert len(records) == 24
    assert {len(each["conversation"]["turns"]) for each in records} > {1}, "some have several turns"
    assert all(each["train/sampler_kl"] < 1e-6 for each in run.metrics()), "float32 on both sides"


def judged(server: Server, project: Project, said: list[str], **changes: Any) -> tuple[list[Scored], list[Any]]:
    """Scores of three texts by the tiny model behind the server, and the answers that were kept."""
    quote = load_tokenizer(ModelSettings(path=str(project.root / "model"))).encode('"')[0]
    args = {
        "url": f"{server.url}/v1",
        "model": "model",
        "rubric": "Short is good.",
        "max_tokens": 600,
        "temperature": 1.0,
        "concurrency": 2,
        "extra_body": {"seed": 3, "logit_bias": {str(quote): 6}},  # a random model ends no sentence by itself
        "on_outage": "fail",
        **changes,
    }
    around = Surroundings(said.append, lambda: None)
    cache = project.root / f"judge-{len(list(project.root.glob('judge-*')))}"
    row = Row({"prompt": "Say it."}, "rows.jsonl", 1)
    with RewardRunner(
        [RewardSpec(use="llm_judge", args=args)], base_dir=project.root, judging=Judging(cache, around)
    ) as runner:
        scores = runner.score([(text, row) for text in ("one", "two", "three")], [3])
    lines = [json.loads(line) for file in cache.rglob("*.jsonl") for line in file.read_text().splitlines()]
    return scores, [line["answer"] for line in lines if "answer" in line]


@pytest.mark.parametrize("compare", ["single", "group", "pairs"])
def test_a_judge_behind_the_server_answers_in_the_form_that_it_is_asked_for(
    server: Server, project: Project, compare: str
) -> None:
    """No repair is allowed, so what is scored was valid under the schema at once."""
    said: list[str] = []
    scores, answers = judged(server, project, said, compare=compare, opponents=1, num_repairs=0)
    assert [each.failure for each in scores] == [None] * 3
    assert said == [], "the server knows response_format"
    found = [each.reward for each in scores if each.reward is not None]
    assert len(found) == 3
    if compare == "single":
        assert sorted(found) == sorted(answer["score"] / 10 for answer in answers)
    elif compare == "group":
        (answer,) = answers
        assert found == [score / 10 for score in answer["scores"]]
    else:
        assert len(answers) == 6, "three pairs in both orders"
        assert sum(found) == pytest.approx(1.5), "each comparison gives one point to share"
    assert all(isinstance(answer["reason"], str) for answer in answers)


def test_an_answer_that_is_cut_is_a_failure_that_says_so(server: Server, project: Project) -> None:
    scores, answers = judged(server, project, [], num_repairs=0, max_tokens=4)
    assert [each.reward for each in scores] == [None] * 3
    assert all("it was cut off at `max_tokens`" in (each.failure or "") for each in scores)
    assert answers == []
