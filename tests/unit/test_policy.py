"""The policy: what is trained, what is refused, and that what is saved is what was trained."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import VOCAB_SIZE, ComputeDtype, tiny_model_dir, tiny_tokenizer
from transformers import AutoModelForCausalLM

from trainer.config.recipe import LoraSettings, ModelSettings
from trainer.data.tokens import TokenSequence
from trainer.distributed.world import World
from trainer.errors import ModelError
from trainer.model.batch import Batch
from trainer.model.policy import Policy, load_policy, warm_start
from trainer.training.learner import Learner

CPU = torch.device("cpu")
WORLD = World(rank=0, size=1, device=CPU)
LENGTHS = (12, 5, 9)
pytestmark = pytest.mark.filterwarnings(
    # PEFT writes patterns for fused experts that it then reports as unmatched.
    "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_model_dir(tmp_path_factory.mktemp("model"), "llama")


def load(path, lora: LoraSettings | None, *, compute_dtype: ComputeDtype = "float32", **model) -> Policy:
    return load_policy(ModelSettings(path=str(path), compute_dtype=compute_dtype, **model), lora, 0, CPU)


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens = [tuple(torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist()) for length in LENGTHS]
    return Batch.pack([TokenSequence(ids, (True,) * len(ids)) for ids in tokens], CPU)


def shake(policy: Policy) -> dict[str, torch.Tensor]:
    """Masters away from where they began, in the model too."""
    learner = Learner(policy, WORLD)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for master in learner.masters.values():
            master.add_(0.05 * torch.randn(master.shape, generator=generator))
    learner.refresh()
    return learner.masters


def logprobs(policy: Policy) -> torch.Tensor:
    with torch.no_grad():
        return policy(make_batch()).logprobs


def own_logprobs(model) -> torch.Tensor:
    """Under transformers' own attention, each sequence alone."""
    batch, found = make_batch(), []
    with torch.no_grad():
        for ids in batch.token_ids.split(LENGTHS):
            scores = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
            found.append(scores.gather(1, ids[1:, None]).squeeze(1))
    return torch.cat(found)


def saved(policy: Policy, masters, directory):
    directory.mkdir()
    policy.save(directory, masters)
    return directory


def test_an_adapter_trains_two_matrices_in_every_linear_layer_but_the_head(model_dir):
    policy = load(model_dir, LoraSettings(rank=4))
    projections = [f"self_attn.{name}_proj" for name in "qkvo"] + [
        f"mlp.{name}_proj" for name in ("gate", "up", "down")
    ]
    assert list(policy.trained_parameters()) == sorted(
        f"base_model.model.model.layers.{layer}.{projection}.lora_{side}.default.weight"
        for layer in range(2)
        for projection in projections
        for side in "AB"
    )
    assert {min(parameter.shape) for parameter in policy.trained_parameters().values()} == {4}


def test_full_parameter_training_trains_everything(model_dir):
    policy = load(model_dir, None)
    everything = dict(policy.causal_lm.named_parameters())
    assert policy.trained_parameters() == everything
    assert "model.embed_tokens.weight" in everything


def test_target_modules_choose(model_dir):
    policy = load(model_dir, LoraSettings(rank=2, target_modules=["q_proj", "v_proj"]))
    assert {name.split(".")[-4] for name in policy.trained_parameters()} == {"q_proj", "v_proj"}


def test_a_fresh_adapter_changes_nothing_and_is_a_function_of_the_seed(model_dir):
    policy = load(model_dir, LoraSettings(rank=4))
    with policy.adapter_off():
        base = logprobs(policy)
    assert torch.equal(logprobs(policy), base)
    again = load(model_dir, LoraSettings(rank=4)).trained_parameters()
    other = load_policy(ModelSettings(path=str(model_dir)), LoraSettings(rank=4), 1, CPU).trained_parameters()
    for name, parameter in policy.trained_parameters().items():
        assert torch.equal(parameter, again[name])
        assert "lora_B" in name or not torch.equal(parameter.bfloat16(), other[name])


def test_loading_leaves_the_global_generator_alone(model_dir):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load(model_dir, LoraSettings(rank=4))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 2.0), (True, 4.0)])  # 8 / 4, 8 / sqrt(4)
def test_the_adapter_is_scaled_by_alpha_over_rank_or_its_root(model_dir, rslora, scaling):
    policy = load(model_dir, LoraSettings(rank=4, alpha=8.0, rslora=rslora))
    layers = [module for module in policy.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert len(layers) == 14
    assert {layer.scaling["default"] for layer in layers} == {scaling}


def test_dora_trains_magnitudes_too(model_dir):
    names = list(load(model_dir, LoraSettings(rank=4, dora=True)).trained_parameters())
    assert sum("lora_magnitude_vector" in name for name in names) == 14
    assert len(names) == 42


def test_switching_the_adapter_off_needs_one(model_dir):
    policy = load(model_dir, None)
    with pytest.raises(ModelError, match="a policy without adapter has no base to compare with"), policy.adapter_off():
        pass


def test_temperature_and_entropy_are_of_the_scored_distribution(model_dir):
    policy, batch = load(model_dir, LoraSettings(rank=2)), make_batch()
    with torch.no_grad():
        scores = policy(batch, temperature=2.0, with_entropy=True)
        policy.causal_lm.set_attn_implementation("eager")
        pieces = [policy.causal_lm(ids[None], use_cache=False).logits for ids in batch.token_ids.split(LENGTHS)]
    log_softmax = torch.cat([(logits[0, :-1] / 2.0).log_softmax(-1) for logits in pieces])
    torch.testing.assert_close(scores.logprobs, log_softmax.gather(1, batch.targets[:, None]).squeeze(1))
    torch.testing.assert_close(scores.entropy, -(log_softmax.exp() * log_softmax).sum(-1))


@pytest.mark.parametrize(
    ("arch", "form"),
    [
        *((arch, form) for arch in ("llama", "gemma2") for form in ({}, {"rslora": True}, {"dora": True})),
        ("mixtral", {}),
        ("mixtral", {"rslora": True}),  # PEFT has no DoRA for fused experts
    ],
    ids=str,
)
def test_a_saved_adapter_is_the_policy_in_plain_peft(tmp_path, arch, form):
    path = tiny_model_dir(tmp_path / "model", arch)
    policy = load(path, LoraSettings(rank=4, **form))
    before = logprobs(policy)
    masters = shake(policy)
    directory = saved(policy, masters, tmp_path / "adapter")
    ours = logprobs(policy)
    assert (ours - before).abs().max() > 0.01

    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    theirs = own_logprobs(PeftModel.from_pretrained(base, str(directory)).eval())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert abs(ours.mean() - theirs.mean()) < 1e-5


def test_a_saved_adapter_of_a_bfloat16_model_is_float32_and_gives_the_loss_to_rounding(tmp_path):
    path = tiny_model_dir(tmp_path / "model", "llama", scale=4.0)
    policy = load(path, LoraSettings(rank=4), compute_dtype="bfloat16")
    masters = shake(policy)
    directory = saved(policy, masters, tmp_path / "adapter")
    tensors = load_file(directory / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert json.loads((directory / "adapter_config.json").read_text())["base_model_name_or_path"] == str(path)

    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="sdpa")
    plain = PeftModel.from_pretrained(base, str(directory), autocast_adapter_dtype=False).eval()
    # Other kernels round each logprob by about 1e-2 here, so the mean of 23 by about 2e-3.
    assert abs(logprobs(policy).mean() - own_logprobs(plain).mean()) < 5e-3


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_saved_full_model_is_the_policy_in_plain_transformers(tmp_path, tied):
    path = tiny_model_dir(tmp_path / "model", "qwen2", tie_word_embeddings=tied)
    policy = load(path, None)
    masters = shake(policy)
    directory = saved(policy, masters, tmp_path / "trained")
    plain = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    torch.testing.assert_close(logprobs(policy), own_logprobs(plain.float()), rtol=1e-4, atol=1e-4)
    assert list(directory.glob("*.bin")) == []


def start_from(path, directory, *, compute_dtype: ComputeDtype = "float32", **lora) -> Policy:
    settings = LoraSettings(warm_start=str(directory), **{"rank": 4, **lora})
    policy = load(path, settings, compute_dtype=compute_dtype)
    learner = Learner(policy, WORLD)
    warm_start(settings, policy, learner.masters)
    learner.refresh()
    return policy


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [{}, {"dora": True}, {"target_modules": ["q_proj", "down_proj"]}], ids=str)
def test_a_warm_start_begins_exactly_where_the_adapter_ended(tmp_path, model_dir, lora, compute_dtype):
    policy = load(model_dir, LoraSettings(rank=4, **lora), compute_dtype=compute_dtype)
    masters = shake(policy)
    directory = saved(policy, masters, tmp_path / "adapter")
    assert torch.equal(
        logprobs(start_from(model_dir, directory, compute_dtype=compute_dtype, **lora)), logprobs(policy)
    )


def test_a_warm_start_of_experts_begins_exactly_where_the_adapter_ended(tmp_path):
    path = tiny_model_dir(tmp_path / "model", "mixtral")
    policy = load(path, LoraSettings(rank=4))
    directory = saved(policy, shake(policy), tmp_path / "adapter")
    assert torch.equal(logprobs(start_from(path, directory)), logprobs(policy))


@pytest.fixture
def adapter_dir(tmp_path, model_dir):
    policy = load(model_dir, LoraSettings(rank=4))
    return saved(policy, shake(policy), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 8}, r"was trained with rank 4; the recipe has 8. Make them equal."),
        ({"alpha": 8.0}, r"was trained with alpha 32.0; the recipe has 8.0. Make them equal."),
        ({"rslora": True}, r"was trained with rslora False; the recipe has True"),
        ({"dora": True}, r"was trained with dora False; the recipe has True"),
        ({"target_modules": ["q_proj"]}, r"its weights are not those of this model and adapter"),  # a part of it
    ],
    ids=str,
)
def test_an_adapter_of_another_recipe_is_refused(model_dir, adapter_dir, lora, message):
    with pytest.raises(ModelError, match=message):
        start_from(model_dir, adapter_dir, **lora)


def test_an_adapter_of_a_part_of_the_layers_is_refused(tmp_path, model_dir):
    policy = load(model_dir, LoraSettings(rank=4, target_modules=["q_proj"]))
    directory = saved(policy, shake(policy), tmp_path / "part")
    with pytest.raises(ModelError, match="its weights are not those of this model and adapter"):
        start_from(model_dir, directory)


def test_an_adapter_of_another_model_is_refused(tmp_path, adapter_dir):
    other = tiny_model_dir(tmp_path / "wide", "llama", hidden_size=64)
    with pytest.raises(ModelError, match="its weights are not those of this model and adapter"):
        start_from(other, adapter_dir)


def test_an_adapter_with_scales_of_its_own_is_refused(model_dir, adapter_dir):
    config = json.loads((adapter_dir / "adapter_config.json").read_text())
    config["alpha_pattern"] = {"q_proj": 64.0}
    (adapter_dir / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"was trained with alpha_pattern \{'q_proj': 64.0\}; the recipe has \{\}"):
        start_from(model_dir, adapter_dir)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: shutil.rmtree(path), r"holds no adapter \(no adapter_config.json\)"),
        (lambda path: (path / "adapter_model.safetensors").unlink(), "no adapter can be read"),
        (lambda path: (path / "adapter_model.safetensors").write_bytes(b"half"), "no adapter can be read"),
        (lambda path: (path / "adapter_config.json").write_text("{"), "adapter_config.json cannot be read"),
    ],
    ids=["no-directory", "no-weights", "broken-weights", "broken-config"],
)
def test_a_directory_without_an_adapter_is_refused(model_dir, adapter_dir, spoil, message):
    spoil(adapter_dir)
    with pytest.raises(ModelError, match=message):
        start_from(model_dir, adapter_dir)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (["query"], r"lora.target_modules: no module is called `query`; the model has down_proj, .*q_proj"),
        (["q_proj", "k_porj"], r"lora.target_modules: no module is called `k_porj`; did you mean `k_proj`\?"),
        (["q_proj", "self_attn"], r"lora.target_modules: no module is called `self_attn`; the model has down_proj,"),
        (["q_proj", "embed_tokens"], r"lora.target_modules: `embed_tokens` is an embedding"),
        (["q_proj", "lm_head"], r"lora.target_modules: the head cannot have an adapter; leave it out"),
    ],
)
def test_target_modules_that_cannot_be_trained_are_refused(model_dir, modules, message):
    with pytest.raises(ModelError, match=message):
        load(model_dir, LoraSettings(rank=2, target_modules=modules))


@pytest.mark.parametrize("arch", ["mixtral", "gpt_oss", "qwen2_moe"])
def test_full_parameter_training_of_experts_is_refused(tmp_path, arch):
    with pytest.raises(ModelError, match="mixture-of-experts models needs a router loss; use LoRA"):
        load(tiny_model_dir(tmp_path, arch), None)


def test_weights_in_pickles_are_refused(tmp_path, model_dir):
    directory = shutil.copytree(model_dir, tmp_path / "pickled")
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"pickled: cannot be loaded: .*model\.safetensors"):
        load(directory, LoraSettings())


def test_a_directory_without_a_model_is_refused(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(tmp_path, LoraSettings())
    with pytest.raises(ModelError, match=r"gone: cannot be loaded"):
        load(tmp_path / "gone", LoraSettings())


def test_broken_weights_are_refused(tmp_path, model_dir):
    directory = shutil.copytree(model_dir, tmp_path / "broken")
    whole = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"broken: cannot be loaded: "):
        load(directory, LoraSettings())


def test_missing_weights_are_refused(tmp_path, model_dir):
    directory = shutil.copytree(model_dir, tmp_path / "partial")
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"partial: the weights lack model.layers.1.mlp.up_proj.weight and 0 more"):
        load(directory, LoraSettings())


def test_weights_of_another_kind_of_model_are_refused(tmp_path, model_dir):
    directory = shutil.copytree(model_dir, tmp_path / "renamed")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "qwen3"}))  # which has norms of its own
    with pytest.raises(
        ModelError, match=r"renamed: the weights lack model.layers.0.self_attn.k_norm.weight and 3 more"
    ):
        load(directory, LoraSettings())


def test_checkpointing_changes_no_gradient(model_dir):
    gradients = []
    for gradient_checkpointing in (False, True):
        policy = load(model_dir, LoraSettings(rank=4), gradient_checkpointing=gradient_checkpointing)
        shake(policy)
        policy.train()
        parameters = list(policy.trained_parameters().values())
        gradients.append(torch.autograd.grad(policy(make_batch()).logprobs.sum(), parameters))
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)
