"""What a run refuses from recipe, shape and config.json alone, `trainer check` refuses too, in the same words."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import yaml
from small_recipe import RFT, SFT, SIZES, write_small
from tiny import tiny_model, tiny_model_dir, tiny_tokenizer
from torch import distributed
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from trainer.commands.cli import main
from trainer.config import unsupported
from trainer.config.load import find_shape, load_recipe
from trainer.config.recipe import LoraSettings, ModelSettings
from trainer.data.template import ChatTemplate, apply_override
from trainer.distributed.context import ContextGroup
from trainer.distributed.preemption import SIGNALS, StopFlag
from trainer.distributed.world import World
from trainer.errors import ModelError, TrainerError
from trainer.model import attention
from trainer.model.base_model import logit_transform
from trainer.model.layout import PackedLayout
from trainer.model.packing_check import verify_packing
from trainer.model.policy import Policy, load_policy, make_policy
from trainer.planning.batching import rotary_problem
from trainer.planning.plan import make_plan
from trainer.sampling.choose_decoder import choose_decoder
from trainer.sampling.sampler import SamplingParams
from trainer.sampling.served import _refuse_truncation, _refuse_unservable
from trainer.sampling.server_client import ServerClient
from trainer.training.open_learner import open_learner
from trainer.training.optimizers import make_optimizer
from trainer.training.tool_template import refuse_template_without_tools

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def policy_of(lora: LoraSettings | None = None, arch: str = "llama") -> Policy:
    return load_policy(ModelSettings(path=str(tiny_model_dir(Path("tiny"), arch))), lora, 0, CPU)


def serve_all_parameters() -> None:
    _refuse_unservable(policy_of(None), is_supervised=False)


def serve_dora() -> None:
    _refuse_unservable(policy_of(LoraSettings(rank=2, dora=True)), is_supervised=True)


def truncate_at_another_temperature() -> None:
    params = SamplingParams(max_completion_tokens=4, stop_ids=frozenset(), seed=0, step=0, temperature=0.5, top_p=0.9)
    _refuse_truncation(params)


def connect_to_an_odd_address() -> None:
    ServerClient("127.0.0.1:8000", model="m")


def train_experts_in_full() -> None:
    make_policy(tiny_model("mixtral"), ModelSettings(path="tiny"), None, 0)


def attend_with_dropout() -> None:
    states = torch.zeros(1, 2, 3, 16)
    layout = PackedLayout.of_lengths([3], CPU)
    attention.packed_attention(torch.nn.Module(), states, states, states, None, dropout=0.1, packed=layout)


def shard_four_bits() -> None:
    policy = policy_of(LoraSettings(rank=2))
    policy.causal_lm.is_quantized = True  # what transformers sets after loading with bitsandbytes
    policy.shard(DeviceMesh("cpu", [0], _init_backend=False, _rank=0), CPU)


def shard_eight_bit_moments() -> None:
    make_optimizer([], "adamw_8bit", is_sharded=True)


def adapt_the_head() -> None:
    policy_of(LoraSettings(rank=2, target_modules=["q_proj", "lm_head"]))


def start_from_another_rank() -> None:
    policy_of(LoraSettings(rank=4, warm_start="adapter"))


def sample_from_shards() -> None:
    policy = policy_of(LoraSettings(rank=2))
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        policy.shard(init_device_mesh("cpu", (1,)), CPU)
        choose_decoder(policy)
    finally:
        distributed.destroy_process_group()


def train_past_a_change_of_rotary_factors() -> None:
    config = json.loads(Path("model/config.json").read_text())
    problem = rotary_problem(config, 300)
    assert problem is not None
    raise ModelError(problem)  # as open_learner raises it, which reads the same function with the loaded config


def split_the_packs_of_rft() -> None:
    plan = make_plan(load_recipe(write_small(Path(), RFT), ["shape=cpu"]))
    world = World(0, 2, CPU, context=ContextGroup(0, 2, cast(Any, None)))
    with suppress_handlers():
        open_learner(plan, world, StopFlag())


@contextmanager
def suppress_handlers() -> Iterator[None]:
    """Restore the signal handlers that a StopFlag replaces."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def split_convolutions() -> None:
    policy = policy_of(LoraSettings(rank=2), "lfm2")
    verify_packing(policy, CPU)
    policy.run_on_slices()


def adapt_a_layer_that_is_not_there() -> None:
    policy_of(LoraSettings(rank=2, target_modules=["q_prj"]))


def leave_out_the_logit_scale() -> None:
    logit_transform(SimpleNamespace(config=CohereVision()))


class CohereVision:
    """As transformers reads the config.json of the case."""

    model_type = "aya_vision"

    def get_text_config(self) -> Any:
        return SimpleNamespace(logit_scale=0.25)


def show_tools_by_a_template_without_any() -> None:
    tokenizer = tiny_tokenizer()
    apply_override(tokenizer, "chatml")
    refuse_template_without_tools(ChatTemplate(tokenizer, "2026-11-26"), {})


SPLIT = find_shape("cpu").model_dump() | {"name": "split", "gpus": 2, "context_parallel": 2}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 256,
    "rope_theta": 10000.0,
}
VLLM = ["rollout.sampler=vllm"]
AT_A_URL = "rollout.vllm_url=http://127.0.0.1:8000"
CASES: list[tuple[str, list[str], dict[str, Any], Callable[[], None], str]] = [
    (RFT, [*VLLM, AT_A_URL, "lora=null"], {}, serve_all_parameters, unsupported.VLLM_FULL),
    (RFT, [*VLLM, "lora.dora=true"], {}, serve_dora, unsupported.VLLM_DORA),
    (
        RFT,
        [*VLLM, "rollout.temperature=0.5", "rollout.top_p=0.9", "algorithm.mismatch_cap=2"],
        {},
        truncate_at_another_temperature,
        unsupported.VLLM_TRUNCATED,
    ),
    (
        RFT,
        [*VLLM, "rollout.vllm_url=127.0.0.1:8000"],
        {},
        connect_to_an_odd_address,
        "must begin with http:// or https://, got '127.0.0.1:8000'",
    ),
    (SFT, ["lora=null"], {"num_local_experts": 4}, train_experts_in_full, unsupported.FULL_EXPERTS),
    (SFT, [], {"attention_dropout": 0.1}, attend_with_dropout, unsupported.ATTENTION_DROPOUT),
    (
        SFT,
        ["model.quantization=nf4", "shape=h100x8"],
        {},
        shard_four_bits,
        unsupported.SHARDED_QUANTIZATION,
    ),
    (
        SFT,
        ["lora=null", "optimizer.name=adamw_8bit", "shape=h100x8"],
        {},
        shard_eight_bit_moments,
        unsupported.EIGHT_BIT_SHARDED,
    ),
    (SFT, ["lora.target_modules=[q_proj, lm_head]"], {}, adapt_the_head, unsupported.HEAD_ADAPTER),
    (
        SFT,
        ["lora.warm_start=adapter"],
        {},
        start_from_another_rank,
        "adapter was trained with rank 8; the recipe has 4. Make them equal.",
    ),
    (RFT, ["shape=h100x8"], {}, sample_from_shards, unsupported.SHARDED_SAMPLING),
    (
        RFT,
        ["data.max_seq_tokens=300"],
        {
            "model_type": "phi3",
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 256,
            "rope_parameters": LONGROPE,
        },
        train_past_a_change_of_rotary_factors,
        "rft of 300 tokens is not supported: the model's rotary factors change above 256 tokens, in the middle of a "
        "completion; set it to 256",
    ),
    (RFT, ["shape=split.yaml"], {}, split_the_packs_of_rft, unsupported.CONTEXT_RFT),
    (
        SFT,
        ["shape=split.yaml"],
        {"model_type": "lfm2"},
        split_convolutions,
        unsupported.CONTEXT_SEPARATE.format("lfm2 keeps state between packed sequences"),
    ),
    (
        SFT,
        ["lora.target_modules=[q_prj]"],
        {},
        adapt_a_layer_that_is_not_there,
        "lora.target_modules: no module is called `q_prj`; did you mean `q_proj`?",
    ),
    (
        SFT,
        [],
        {"model_type": "aya_vision", "text_config": {**SIZES, "model_type": "cohere2", "logit_scale": 0.25}},
        leave_out_the_logit_scale,
        unsupported.LOGIT_SCALE.format(0.25),
    ),
    (
        RFT,
        ["rollout.tools=[tools.py:multiply]", "rollout.max_turns=2", "model.chat_template=chatml"],
        {},
        show_tools_by_a_template_without_any,
        unsupported.NO_TOOLS,
    ),
]


@pytest.mark.parametrize(("recipe", "overrides", "config", "run", "words"), CASES, ids=[case[4][:40] for case in CASES])
def test_check_and_run_refuse_in_the_same_words(recipe, overrides, config, run, words, capsys):
    path = write_small(Path(), recipe)
    Path("model/config.json").write_text(json.dumps(SIZES | config))
    if "target_modules=[q_prj]" in " ".join(overrides):  # names of layers are read from the weights
        tiny_model_dir(Path("model"))
    Path("split.yaml").write_text(yaml.safe_dump(SPLIT))
    Path("adapter").mkdir()
    Path("tools.py").write_text('def multiply(a: int, b: int) -> int:\n    """Multiply."""\n    return a * b\n')
    Path("adapter/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 32}))
    capsys.readouterr()  # what transformers says while it writes the model
    assert main(["check", str(path), *(part for override in overrides for part in ("--set", override))]) == 2
    said = capsys.readouterr().err
    assert words in said
    place = ("--set ", "recipe.yaml:", "lora.target_modules: ", "model.chat_template: ")
    assert said.startswith(place), "the place comes first"
    with pytest.raises(TrainerError) as caught:
        run()
    assert words in str(caught.value)
    assert caught.value.exit_code == 2


def test_what_the_words_are_about_is_all_that_is_refused():
    for recipe, overrides in [
        (RFT, VLLM),
        (RFT, ["lora.dora=true"]),
        (RFT, [*VLLM, "rollout.temperature=0.5"]),
        (RFT, [*VLLM, "lora=null"]),
        (RFT, ["rollout.vllm_url=127.0.0.1:8000"]),
        (SFT, ["model.quantization=nf4", "shape=h100x8_dp"]),
        (SFT, ["lora.target_modules=[q_proj]"]),
    ]:
        make_plan(load_recipe(write_small(Path(), recipe), overrides))


def test_sinks_are_supported_on_a_cpu():
    write_small(Path())
    Path("model/config.json").write_text(json.dumps(SIZES | {"model_type": "gpt_oss"}))
    assert make_plan(load_recipe(Path("recipe.yaml"), ["shape=auto"])).shape.name == "cpu"


def test_full_parameters_on_shards_are_not_sent_to_vllm(capsys):
    write_small(Path(), RFT)
    assert main(["check", "recipe.yaml", "--shape", "a100x8", "--set", "lora=null"]) == 2
    advised = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  ")]
    assert advised
    assert all("sampler" not in line or "lora" in line for line in advised)
