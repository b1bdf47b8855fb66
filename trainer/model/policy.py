"""The policy: base model and adapter as one module from packed batch to logprobs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, final

import peft
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM, PreTrainedModel

from trainer.config.recipe import LoraSettings, ModelSettings
from trainer.distributed.sharding import exchange, local_of, register_output, shard_module
from trainer.errors import ModelError
from trainer.model import attention
from trainer.model.batch import Batch
from trainer.model.lm_head import HeadForm, tiled_logprobs
from trainer.model.lora_linear import use_fused_linear
from trainer.model.quantization import keep_differentiable, quantized_loading
from trainer.model.rms_norm import use_fused_norms


@final
@dataclass(frozen=True)
class Scores:
    """What a forward pass gives for the trained tokens."""

    logprobs: torch.Tensor
    """[N] float32, with gradient where it is enabled."""
    entropy: torch.Tensor
    """[N] float32; zeros where it was not asked for."""


@final
class Policy(nn.Module):
    """Backbone and tiled head behind one forward; nobody calls a submodule from outside."""

    def __init__(self, causal_lm: PreTrainedModel, adapted: peft.PeftModel | None, model_path: str) -> None:
        """Wrap a loaded model; see `load_policy`."""
        super().__init__()
        self.causal_lm = causal_lm
        self.adapted = adapted
        self.model_path = model_path
        self.form = _head_form(causal_lm)

    def forward(self, batch: Batch, *, temperature: float = 1.0, with_entropy: bool = False) -> Scores:
        """Score the trained tokens of a pack.

        Args:
            batch: the pack.
            temperature: of the distribution that logprobs and entropy are of.
            with_entropy: whether to compute the entropy.
        """
        output = self.causal_lm.base_model(
            input_ids=batch.token_ids[None],
            position_ids=batch.positions[None],
            use_cache=False,
            packed=batch.layout,
        )
        hidden = output.last_hidden_state[0].index_select(0, batch.scored)
        head = self.causal_lm.get_output_embeddings()
        form = replace(self.form, temperature=temperature)
        logprobs, entropy = tiled_logprobs(
            hidden, head.weight, head.bias, batch.targets, form, with_entropy=with_entropy
        )
        return Scores(logprobs, entropy)

    def shard(self, mesh: DeviceMesh, device: torch.device) -> None:
        """Split the base over the ranks, or with full parameters everything that is trained; adapters stay whole."""
        register_output(Scores, ["logprobs", "entropy"])
        dtype = self.causal_lm.dtype
        adapters = set(self.trained_parameters().values()) if self.adapted is not None else set()
        names = set(self.causal_lm._no_split_modules or ())
        shard_module(self, names, mesh, ignored=adapters, compute_dtype=dtype)
        for parameter in adapters:
            parameter.data = parameter.data.to(device)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by their name in the model, sorted."""
        inner = self.adapted if self.adapted is not None else self.causal_lm
        return {name: value for name, value in sorted(inner.named_parameters()) if value.requires_grad}

    def save(self, directory: Path, masters: Mapping[str, torch.Tensor]) -> None:
        """Write the trained weights as PEFT (adapter) or transformers (full-parameter) reads them.

        Args:
            directory: an existing, empty directory.
            masters: float32 values of the trained parameters by name.
        """
        detached = {name: master.detach().cpu() for name, master in masters.items()}
        if self.adapted is not None:
            self.adapted.peft_config["default"].base_model_name_or_path = self.model_path
            self.adapted.save_pretrained(str(directory), state_dict=detached)
        else:
            dtype = self.causal_lm.dtype
            weights = {name: tensor.to(dtype) for name, tensor in detached.items()}
            self.causal_lm.save_pretrained(str(directory), state_dict=weights)

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """The base model, within the block."""
        if self.adapted is None:
            raise ModelError("a policy without adapter has no base to compare with")
        with self.adapted.disable_adapter():
            yield


@final
class Reference:
    """What `ref_kld` is measured against: the policy as the run began, or its base without adapter.

    A fresh adapter adds exactly nothing, so as the run began is the adapter off. After a warm start, or with full
    parameters, the initial values are kept aside and put in place for the pass.
    """

    def __init__(self, policy: Policy, kind: Literal["initial", "base"], *, is_fresh: bool) -> None:
        """Remember the reference; call it before any update and before a resume.

        Args:
            policy: as the run began.
            kind: the recipe's choice.
            is_fresh: whether the adapter is newly made, so that initial and base are the same.
        """
        self.policy = policy
        self.values: dict[str, torch.Tensor] | None = None
        if policy.adapted is None or (kind == "initial" and not is_fresh):
            trained = policy.trained_parameters()
            self.values = {name: local_of(value.detach()).clone() for name, value in trained.items()}

    @torch.no_grad()
    def logprobs(self, batch: Batch, temperature: float) -> torch.Tensor:
        """[N] logprobs of a pack under the reference."""
        self.policy.eval()
        with self._in_place():
            return self.policy(batch, temperature=temperature).logprobs

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        if self.values is None:
            with self.policy.adapter_off():
                yield
            return
        parameters = self.policy.trained_parameters()
        exchange(parameters, self.values)
        try:
            yield
        finally:
            exchange(parameters, self.values)


def load_policy(model: ModelSettings, lora: LoraSettings | None, seed: int, device: torch.device) -> Policy:
    """Load the base model and put an adapter on it.

    Raises:
        ModelError: the directory holds no model that we can train, with the reason.
    """
    return make_policy(load_base(model, device), model, lora, seed)


def make_policy(causal_lm: PreTrainedModel, model: ModelSettings, lora: LoraSettings | None, seed: int) -> Policy:
    """Put an adapter on a base model in memory, or let all of its parameters learn.

    Args:
        causal_lm: frozen, with packed attention, as `load_base` gives it.
        model: its path, and whether activations are recomputed.
        lora: the adapter; None trains every parameter.
        seed: of the adapter's initial values.

    Raises:
        ModelError: the model or the adapter cannot be trained, with the reason.
    """
    use_fused_norms(causal_lm)
    if model.gradient_checkpointing:
        causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    if lora is None:
        if has_experts(causal_lm):
            raise ModelError("full-parameter training of mixture-of-experts models needs a router loss; use LoRA")
        for parameter in causal_lm.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        return Policy(causal_lm, None, model.path)
    devices = [causal_lm.device] if causal_lm.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        adapted = _adapt(causal_lm, lora)
    return Policy(causal_lm, adapted, model.path)


def load_base(model: ModelSettings, device: torch.device) -> PreTrainedModel:
    """Load the base model in the compute dtype, from safetensors only, with packed attention.

    Raises:
        ModelError: it cannot be loaded, with the reason.
    """
    attention.register()
    try:
        causal_lm, found = AutoModelForCausalLM.from_pretrained(
            model.path,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            use_safetensors=True,
            dtype=getattr(torch, model.compute_dtype),
            attn_implementation=attention.PACKED_ATTENTION,
            output_loading_info=True,
            **(quantized_loading(model, device) if model.quantization is not None else {}),
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if reason == repr(attention.PACKED_ATTENTION):
            reason = "the model's code chooses attention by itself, so packed training would leak"
        raise ModelError(f"{model.path}: cannot be loaded: {reason}") from None
    if found["missing_keys"]:  # transformers would make them up
        first, *others = sorted(found["missing_keys"])
        raise ModelError(f"{model.path}: the weights lack {first} and {len(others)} more; is the directory whole?")
    if causal_lm.base_model is causal_lm:
        raise ModelError(f"{model.path}: {type(causal_lm).__name__} has no backbone apart from its head")
    if causal_lm.get_output_embeddings() is None:
        raise ModelError(f"{model.path}: {type(causal_lm).__name__} has no language-model head")
    causal_lm.requires_grad_(False)
    if model.quantization is None:
        causal_lm.to(device)
    else:  # it was quantized on the device
        keep_differentiable(causal_lm)
    return causal_lm.eval()


def _adapt(causal_lm: PreTrainedModel, lora: LoraSettings) -> peft.PeftModel:
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        task_type="CAUSAL_LM",
    )
    is_quantized = getattr(causal_lm, "is_quantized", False)
    if not is_quantized:  # PEFT has a layer of its own for weights in 4 bits
        use_fused_linear(config)
    try:
        adapted = peft.get_peft_model(causal_lm, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise ModelError(f"lora.target_modules: {error}") from None
    if is_quantized:  # PEFT follows the dtype of the base's weights, which are bytes
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(causal_lm.dtype)
    head = causal_lm.get_output_embeddings()
    if isinstance(head, peft.tuners.tuners_utils.BaseTunerLayer):
        raise ModelError("lora.target_modules: the head cannot have an adapter; leave it out")
    if lora.warm_start is not None:
        _refuse_other_adapter(adapted.peft_config["default"], Path(lora.warm_start))
    return adapted


def _refuse_other_adapter(ours: peft.PeftConfig, directory: Path) -> None:
    if not (directory / "adapter_config.json").is_file():
        raise ModelError(f"lora.warm_start: {directory} holds no adapter (no adapter_config.json)")
    try:
        theirs = peft.PeftConfig.from_pretrained(str(directory))
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"lora.warm_start: {directory}/adapter_config.json cannot be read: {error}") from None
    if not isinstance(theirs, peft.LoraConfig):
        raise ModelError(f"lora.warm_start: {directory} holds an adapter of type {theirs.peft_type}, not LORA")
    fields = {"r": "rank", "lora_alpha": "alpha", "use_rslora": "rslora", "use_dora": "dora"}
    for name in (*fields, "alpha_pattern"):
        if getattr(theirs, name) != getattr(ours, name):
            raise ModelError(
                f"lora.warm_start: {directory} was trained with {fields.get(name, name)} {getattr(theirs, name)}; "
                f"the recipe has {getattr(ours, name)}. Make them equal."
            )


def adapter_tensors(directory: Path, policy: Policy) -> dict[str, torch.Tensor]:
    """An adapter directory's weights in float32, by the policy's parameter names.

    Raises:
        ModelError: the directory belongs to another model or adapter.
    """
    try:
        saved = load_file(directory / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{directory}: no adapter can be read: {error}") from None
    ours = policy.trained_parameters()
    assert policy.adapted is not None
    keys = peft.get_peft_model_state_dict(policy.adapted, state_dict={name: name for name in ours})
    found = {own: saved[key].float() for key, own in keys.items() if key in saved}
    is_whole = found.keys() == ours.keys() and len(found) == len(saved)
    if not is_whole or any(found[name].shape != ours[name].shape for name in ours):
        raise ModelError(f"{directory}: its weights are not those of this model and adapter")
    return found


def has_experts(causal_lm: PreTrainedModel) -> bool:
    """Whether the model is a mixture of experts."""
    config: dict[str, Any] = causal_lm.config.get_text_config().to_dict()
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return any((config.get(name) or 0) > 1 for name in names)


def _head_form(causal_lm: PreTrainedModel) -> HeadForm:
    config: dict[str, Any] = causal_lm.config.get_text_config().to_dict()
    scale = float(config.get("logit_scale") or 1.0) / float(config.get("logits_scaling") or 1.0)
    return HeadForm(scale=scale, softcap=config.get("final_logit_softcapping"))


def warm_start(lora: LoraSettings | None, policy: Policy, masters: Mapping[str, torch.Tensor]) -> None:
    """Begin from an adapter directory, where the recipe names one; writes into the float32 masters."""
    if lora is None or lora.warm_start is None:
        return
    saved = adapter_tensors(Path(lora.warm_start), policy)
    with torch.no_grad():
        for name, master in masters.items():
            master.copy_(saved[name])
