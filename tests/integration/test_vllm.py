"""A real vLLM server: what it draws with is the adapter that was published last, and nothing else.

Needs a Python that has vLLM: named by TUNESMITH_VLLM_PYTHON, or .venv-vllm/bin/python (docs/vllm.md).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from vllm_python import MARKS, MODEL, PYTHON, ROOT

from trainer.config.recipe import LoraSettings, ModelSettings
from trainer.data.chat import load_tokenizer
from trainer.data.tokens import TokenSequence
from trainer.distributed.world import World
from trainer.errors import NumericalError
from trainer.model.batch import Batch
from trainer.model.policy import Policy, load_policy
from trainer.sampling.sampler import SampleRequest, SamplingParams
from trainer.sampling.served import ServedSampler
from trainer.sampling.server_client import SamplerError, ServerClient
from trainer.types import Completion

CPU = torch.device("cpu")
WORLD = World(rank=0, size=1, device=CPU)
START_S = 400
END = 2
"""<|im_end|>"""
NOISE = 0.06
"""Mean distance of logprobs by rounding in bf16: ours and vLLM's are 0.03 from float32 and 0.04 from each other."""
pytestmark = MARKS


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address of a server of the embedded model, for adapters up to rank 16."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    options = f"--host 127.0.0.1 --port {port} --dtype bfloat16 --max-model-len 1024 --max-num-seqs 32 --enforce-eager"
    options += " --enable-lora --max-lora-rank 16 --generation-config vllm --logprobs-mode processed_logprobs"
    command = ["nice", "-n", "10", str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL)]
    settings = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",  # two waiting threads on two shared cores are ten times slower than one
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            command + options.split(),
            env={**os.environ, **settings},
            stdout=output,
            stderr=output,
            start_new_session=True,
            cwd=log.parent,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(url, process, log)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with opener.open(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)
    pytest.fail(f"vLLM did not start:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ModelSettings(path=str(MODEL)))


@pytest.fixture(scope="module")
def prompt(tokenizer):
    messages = [{"role": "user", "content": "What is 12 + 30? Explain shortly."}]
    return tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


@pytest.fixture(scope="module")
def sampler(server, tokenizer):
    return ServedSampler([ServerClient(server, model=str(MODEL))], tokenizer, WORLD)


@pytest.fixture(scope="module")
def policy():
    return load(LoraSettings(rank=16))


def load(lora: LoraSettings | None) -> Policy:
    return load_policy(ModelSettings(path=str(MODEL)), lora, 0, CPU)


def put_adapter(policy: Policy, seed: int) -> None:
    """A random adapter that moves logprobs by 0.2 to 0.3, far above the noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.trained_parameters().items():
            scale = 0.02 if "lora_B" in name else 0.04
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def params(*, stop_ids=frozenset({END}), **changes) -> SamplingParams:
    return SamplingParams(**{"max_completion_tokens": 24, "stop_ids": stop_ids, "seed": 0, "step": 0} | changes)


def drawn(sampler: ServedSampler, prompt, number: int, settings: SamplingParams, **request) -> list[Completion]:
    (completions,) = sampler.sample([SampleRequest(prompt, 7, number, **request)], settings)
    return completions


def own_logprobs(policy: Policy, prompt, completions, temperature: float = 1.0) -> torch.Tensor:
    sequences = [
        TokenSequence(prompt + each.token_ids, (False,) * len(prompt) + (True,) * len(each.token_ids))
        for each in completions
    ]
    with torch.no_grad():
        return policy(Batch.pack(sequences, CPU), temperature=temperature).logprobs


def server_logprobs(completions) -> torch.Tensor:
    return torch.tensor([value for each in completions for value in each.logprobs])


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().mean())


def test_completions_are_drawn_with_the_adapter_published_last(sampler, policy, prompt):
    for version, other in ((3, 4), (4, 3)):
        put_adapter(policy, version)
        sampler.publish(policy, version)
        completions = drawn(sampler, prompt, 8, params(step=version))
        assert {each.policy_version for each in completions} == {version}

        theirs, ours = server_logprobs(completions), own_logprobs(policy, prompt, completions)
        apart = ours - theirs
        assert distance(ours, theirs) < NOISE
        assert float((apart.exp() - 1 - apart).mean()) < 0.01  # train/sampler_kl; its budget is 0.1
        put_adapter(policy, other)
        assert distance(own_logprobs(policy, prompt, completions), theirs) > 2 * NOISE
        with policy.adapter_off():
            assert distance(own_logprobs(policy, prompt, completions), theirs) > 2 * NOISE


def test_the_server_lists_the_newest_adapter_only(sampler, policy):
    sampler.publish(policy, 5)
    first = sampler.name
    assert first.endswith(f"v{5:06d}-n{sampler.num_published}")
    sampler.publish(policy, 5)  # again, for an evaluation: other weights could stand behind the same number
    assert sampler.name != first
    assert [card["id"] for card in sampler.client.models()] == [str(MODEL), sampler.name]
    assert [path.name for path in sampler.directory.iterdir()] == [sampler.name]


@pytest.fixture
def published(sampler, policy):
    put_adapter(policy, 1)
    sampler.publish(policy, 1)
    return sampler


def test_logprobs_are_at_the_sampling_temperature(published, policy, prompt):
    assert published.served.logprobs_mode == "processed_logprobs"
    completions = drawn(published, prompt, 8, params(temperature=0.7))
    theirs = server_logprobs(completions)
    assert distance(own_logprobs(policy, prompt, completions, temperature=0.7), theirs) < NOISE
    assert distance(own_logprobs(policy, prompt, completions), theirs) > 2 * NOISE


def test_a_stop_token_ends_a_completion_and_belongs_to_it(published, prompt):
    (whole,) = drawn(published, prompt, 1, params(max_completion_tokens=8, is_greedy=True, stop_ids=frozenset({0})))
    assert (whole.finish_reason, len(whole.token_ids)) == ("length", 8)
    end = whole.token_ids[3]
    stopping = params(max_completion_tokens=8, is_greedy=True, stop_ids=frozenset({end}))
    (cut,) = drawn(published, prompt, 1, stopping)
    assert cut.finish_reason == "stop"
    assert cut.token_ids == whole.token_ids[: whole.token_ids.index(end) + 1]
    assert len(cut.logprobs) == len(cut.token_ids)


def test_a_stop_string_ends_a_completion_with_the_token_that_completes_it(published, prompt):
    (whole,) = drawn(published, prompt, 1, params(max_completion_tokens=8, is_greedy=True, stop_ids=frozenset({0})))
    text = whole.text
    string = text[len(text) // 2 : len(text) // 2 + 3]
    (cut,) = drawn(published, prompt, 1, params(max_completion_tokens=8, is_greedy=True, stop=(string,)))
    assert cut.finish_reason == "stop"
    assert string in cut.text
    assert string not in published.tokenizer.decode(list(cut.token_ids[:-1]), skip_special_tokens=False)


def test_the_seed_decides_and_samples_have_numbers(published, prompt):
    group = drawn(published, prompt, 4, params())
    assert drawn(published, prompt, 4, params()) == group
    assert drawn(published, prompt, 4, params(step=1)) != group
    assert len({each.token_ids for each in group}) == 4
    # A draw of the third alone begins alike; bf16 products change with the batch, so later tokens need not agree.
    (alone,) = drawn(published, prompt, 1, params(), first_sample=2)
    assert alone.token_ids[0] == group[2].token_ids[0]


def test_order_of_answers_is_that_of_the_requests(published, tokenizer):
    prompts = [tuple(tokenizer.encode(text)) for text in ("a b c d e f", "1 2 3 4 5 6", "one two three four five")]
    requests = [SampleRequest(each, row, 2) for row, each in enumerate(prompts)]
    together = published.sample(requests, params(max_completion_tokens=1))
    apart = [published.sample([request], params(max_completion_tokens=1))[0] for request in requests]
    assert [[each.token_ids for each in group] for group in together] == [
        [each.token_ids for each in group] for group in apart
    ]


def test_an_adapter_of_higher_rank_is_refused_and_the_old_one_stays(published):
    name = published.name
    with pytest.raises(SamplerError, match="Start it with --max-lora-rank 32, or lower"):
        published.publish(load(LoraSettings(rank=32)), 2)
    assert (published.version, published.name) == (1, name)
    assert published.client.has_model(name)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (None, "full-parameter training publishes only to vLLM servers that the run starts"),
        (LoraSettings(dora=True), "vLLM serves no DoRA"),
    ],
)
def test_what_vllm_cannot_serve_is_refused(sampler, lora, message):
    with pytest.raises(SamplerError, match=message):
        sampler.publish(load(lora), 0)


def test_a_server_of_other_weights_is_refused(published):
    other = load(LoraSettings(rank=4))
    with torch.no_grad():
        for layer in other.causal_lm.base_model.layers[10:14]:
            layer.mlp.down_proj.weight.zero_()
    with pytest.raises(NumericalError, match=r"its logprobs of a fixed sentence are .* away from those of"):
        published.publish(other, 2)


def test_an_adapter_that_the_server_lost_is_missed(published, prompt):
    published.client.unload_adapter(published.name)
    with pytest.raises(SamplerError, match="It no longer has tunesmith"):
        drawn(published, prompt, 1, params())


def test_a_prompt_that_does_not_fit_is_refused_and_not_cut(published, prompt):
    with pytest.raises(SamplerError, match="Start it with --max-model-len"):
        drawn(published, prompt, 1, params(max_completion_tokens=1024))


RECIPE = """\
name: through-vllm
method: rft
model: {{path: {model}}}
lora: {{rank: 8}}
data: {{train: train.jsonl, max_seq_tokens: 128}}
rows_per_step: 2
steps: 2
optimizer: {{learning_rate: 5e-3}}
rollout: {{group_size: 4, max_completion_tokens: 16, sampler: vllm, vllm_url: "{url}"}}
rewards: [{{use: short.py:shortness}}]
shape: cpu
"""


def test_a_run_trains_through_the_server(server, tmp_path):
    rows = [{"prompt": f"What is {number} + 4?", "answer": str(number + 4)} for number in range(6)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "short.py").write_text("def shortness(completion, row):\n    return -0.01 * len(completion)\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=MODEL, url=server))
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "trainer.worker", "recipe.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **settings}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "runs" / "through-vllm" / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line) for line in lines)
    assert first["train/ref_kld"] == 0.0
    assert second["train/ref_kld"] > 0.1  # the adapter of step 2 is far from that of step 1,
    assert second["train/sampler_kl"] < 0.02  # and it is the one that the server drew with


def test_two_ranks_with_a_sharded_base_learn_from_its_rollouts(server, tmp_path):
    """The whole way: FSDP2 over two gloo ranks, rollouts from the server, the adapter published each step."""
    limit = {"max_params_b": 1, "max_seq_tokens": 4096, "basis": "estimated"}
    shape = {
        "name": "sharded", "device": "cpu", "device_name": "CPU", "gpus": 2, "gpu_memory_gib": 16, "sharding": "full",
        "micro_batch_tokens": 512, "accelerate": "cpu", "limits": {"lora": limit},
    }  # fmt: skip
    (tmp_path / "sharded.yaml").write_text(json.dumps(shape))
    recipe = {
        "name": "sharded", "method": "rft", "model": {"path": str(MODEL)}, "lora": {"rank": 16},
        "data": {"train": str(ROOT / "datasets" / "sums_train.jsonl"), "max_seq_tokens": 512},
        "rows_per_step": 2, "steps": 2, "dcp_save_interval": 1, "algorithm": {"kl_coef": 0.02},
        "rollout": {"sampler": "vllm", "vllm_url": server, "group_size": 4, "max_completion_tokens": 12},
        "rewards": [{"use": "last_number"}], "shape": "sharded.yaml",
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*argv, "-m", "trainer.worker", "recipe.yaml"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "runs/sharded/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]
    assert all(record["train/sampler_kl"] < 0.05 for record in records), "the server has the adapter of each step"
    assert records[0]["train/ref_kld"] == 0.0
    assert (tmp_path / "runs/sharded/adapter/adapter_model.safetensors").is_file()
