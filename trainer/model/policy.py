"""The policy: base model and adapters as one module from packed batch to logprobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from trainer.config.recipe import LoraSettings, ModelSettings
from trainer.config.unsupported import CONTEXT_SEPARATE, SELECTIVE_UNCOMPILED, SHARDED_QUANTIZATION
from trainer.distributed.sharding import exchange, is_sharded, local_of, outside_layers, register_output, shard_module
from trainer.errors import ModelError
from trainer.model.adapted_layers import without_adapter
from trainer.model.adapters import RUN_ADAPTER, Adapters
from trainer.model.attention import PACKED_ATTENTION
from trainer.model.base_model import has_experts, load_base, logit_transform, train_everything
from trainer.model.batch import Batch
from trainer.model.compiled_layers import CompiledLayers, is_compilable
from trainer.model.lm_head import tile_rows, tiled_logprobs
from trainer.model.lora_linear import Routing
from trainer.model.offload import Offload
from trainer.model.own_forward import reset_rotary, use_own_attention
from trainer.model.rms_norm import use_fused_norms
from trainer.model.saved_model import save_model


@final
@dataclass(frozen=True)
class Scores:
    """Result of a forward pass for the trained tokens."""

    logprobs: torch.Tensor
    """[N] float32, with gradient where it is enabled."""
    entropy: torch.Tensor
    """[N] float32; zeros where it was not asked for."""


@final
class Policy(nn.Module):
    """Backbone and tiled LM head behind one forward."""

    def __init__(self, causal_lm: PreTrainedModel, adapters: Adapters | None, model_path: str) -> None:
        """Wrap a loaded model; see `load_policy`.

        Args:
            causal_lm: with packed attention, and with the adapters' layers in it.
            adapters: None: every parameter is trained.
            model_path: of the base model.
        """
        super().__init__()
        self.causal_lm = causal_lm
        self.adapters = adapters
        self.model_path = model_path
        self.separate_reason: str | None = None
        """Why each pass has one sequence, by the model's own attention; None: sequences are packed."""
        self.compiled: CompiledLayers | None = None
        """On a GPU; None: layers run uncompiled."""
        self.offload: Offload | None = None
        """Keeps inputs of layers in host memory; None: they stay where they are."""
        self.logit_transform = logit_transform(causal_lm)

    def forward(self, batch: Batch, *, temperature: float = 1.0, with_entropy: bool = False) -> Scores:
        """Score the trained tokens of a pack.

        Args:
            batch: the pack.
            temperature: of the distribution that logprobs and entropy are of.
            with_entropy: whether to compute the entropy.
        """
        hidden = self._hidden(batch)
        head = self.causal_lm.get_output_embeddings()
        transform = replace(self.logit_transform, temperature=temperature)
        logprobs, entropy = tiled_logprobs(
            hidden, head.weight, head.bias, batch.targets, transform, with_entropy=with_entropy
        )
        return Scores(logprobs, entropy)

    def _hidden(self, batch: Batch) -> torch.Tensor:
        """[N, H] last hidden states at the positions that predict the trained tokens.

        Args:
            batch: the pack.
        """
        with nullcontext() if self.adapters is None else self.adapters.routed(batch.owners):
            if self.separate_reason is None:
                plain = batch.token_ids, batch.positions, batch.part or batch.layout
                ids, positions, layout = plain if self.compiled is None else self.compiled.input_of(batch)
                with self._offloading():
                    output = self.causal_lm.base_model(
                        input_ids=ids[None], position_ids=positions[None], use_cache=False, packed=layout
                    )
            else:
                _refuse_split(batch, self.separate_reason)
                reset_rotary(self.causal_lm)
                own = batch.token_ids[: batch.num_tokens - batch.layout.padding]
                with self._offloading():
                    output = self.causal_lm.base_model(input_ids=own[None], use_cache=False)
        return output.last_hidden_state[0].index_select(0, batch.scored)

    def _offloading(self) -> AbstractContextManager[Any]:
        is_used = self.offload is not None and self.training and torch.is_grad_enabled()
        return self.offload.of_pass() if self.offload is not None and is_used else nullcontext()

    @torch.no_grad()
    def score_targets(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """[N] logprobs of the trained tokens, and [N] whether each is the most likely token.

        Args:
            batch: the pack.
        """
        hidden, head = self._hidden(batch), self.causal_lm.get_output_embeddings()
        logprobs, _ = tiled_logprobs(
            hidden, head.weight, head.bias, batch.targets, self.logit_transform, with_entropy=False
        )
        # Scale and soft cap do not change the order of logits.
        tiles = hidden.split(tile_rows(head.weight.shape[0], head.weight.device.type))
        best = torch.cat([head(rows).argmax(-1) for rows in tiles])
        return logprobs, best == batch.targets

    def run_separately(self, reason: str) -> None:
        """From now on, each pass has one sequence and uses the model's own attention.

        Args:
            reason: why its sequences are not packed, such as "lfm2 keeps state between packed sequences".
        """
        use_own_attention(self.causal_lm)
        self.separate_reason = reason
        self._run_uncompiled()

    def compile_layers(self, backend: str | Callable[..., Any] = "inductor", **options: bool) -> None:
        """Compile the decoder layers, which a GPU needs: uncompiled, a third of its step is elementwise kernels.

        Args:
            backend: of torch.compile.
            **options: of `CompiledLayers`.
        """
        self.compiled = CompiledLayers(self.causal_lm, backend, **options)

    def run_on_slices(self) -> None:
        """From now on, packs are computed by several ranks together (context parallelism).

        Raises:
            ModelError: the model's own attention is used, which knows only the tokens of this rank.
        """
        if self.separate_reason is not None:
            raise ModelError(f"the shape {CONTEXT_SEPARATE.format(self.separate_reason)}")
        self._run_uncompiled()  # a compiled layer has no exchange between ranks

    def _run_uncompiled(self) -> None:
        if self.compiled is not None:
            if self.compiled.is_selective:
                raise ModelError(f"model.gradient_checkpointing: selective {SELECTIVE_UNCOMPILED}")
            self.compiled.remove()
            self.compiled = None

    @property
    def config(self) -> dict[str, Any]:
        """Content of the base model's config.json."""
        config: dict[str, Any] = self.causal_lm.config.to_dict()
        return config

    @property
    def left_out(self) -> list[str]:
        """Linear layers that `all-linear` does not adapt; empty with full parameters."""
        return [] if self.adapters is None else without_adapter(self.causal_lm)

    def pack_limit(self, budget: int) -> int:
        """Maximum tokens of a pack of several sequences: the budget, or 1 where no sequences are packed."""
        return budget if self.separate_reason is None else 1

    @property
    def vocab_size(self) -> int:
        """Rows of the LM head."""
        return int(self.causal_lm.get_output_embeddings().weight.shape[0])

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.causal_lm.parameters()).device

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the base model."""
        return self.causal_lm.dtype

    @property
    def has_experts(self) -> bool:
        """Whether the base is a mixture of experts."""
        return has_experts(self.causal_lm)

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds only a part of the base."""
        return any(is_sharded(parameter) for parameter in self.causal_lm.parameters())

    def shard(self, mesh: DeviceMesh, device: torch.device) -> None:
        """Split the layers of a frozen base over the ranks, or with full parameters everything that is trained.

        Adapters stay whole, and in full-parameter training what is not trained, such as a vision tower.

        Args:
            mesh: the ranks.
            device: of this rank, where the parts that stay whole go.

        Raises:
            ModelError: the base is quantized.
        """
        assert self.compiled is None or not self.compiled.groups, "parameters are split before the first pass"
        if getattr(self.causal_lm, "is_quantized", False):
            raise ModelError(f"the shape {SHARDED_QUANTIZATION}")
        register_output(Scores, ["logprobs", "entropy"])
        layers = set(self.causal_lm._no_split_modules or ())
        if self.adapters is None:
            whole = {parameter for parameter in self.causal_lm.parameters() if not parameter.requires_grad}
        else:
            whole = outside_layers(self.causal_lm, layers)
            whole |= {value for name in self.adapters.names for value in self.trained_parameters(name).values()}
        shard_module(self, layers, mesh, ignored=whole, compute_dtype=self.compute_dtype)
        for parameter in whole:
            parameter.data = parameter.data.to(device)

    def trained_parameters(self, adapter: str = RUN_ADAPTER) -> dict[str, nn.Parameter]:
        """The parameters of an adapter, or with full parameters all trained ones; by name in the model, sorted."""
        if self.adapters is not None:
            return self.adapters.parameters(adapter)
        return {name: value for name, value in sorted(self.causal_lm.named_parameters()) if value.requires_grad}

    def save(self, directory: Path, masters: Mapping[str, torch.Tensor], adapter: str = RUN_ADAPTER) -> None:
        """Write the trained weights as PEFT (adapter) or transformers (full-parameter) reads them.

        Args:
            directory: an existing, empty directory.
            masters: float32 values of the trained parameters by name.
            adapter: the one to write.
        """
        detached = {name: master.detach().cpu() for name, master in masters.items()}
        if self.adapters is not None:
            self.adapters.save(adapter, directory, detached, base_path=self.model_path)
        else:
            weights = {name: tensor.to(self.compute_dtype) for name, tensor in detached.items()}
            save_model(self.causal_lm, directory, weights, self.model_path)

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """The base model, within the block."""
        if self.adapters is None:
            raise ModelError("a policy without adapter has no base to compare with")
        with self.adapters.off():
            yield


def _refuse_split(batch: Batch, reason: str) -> None:
    """`Policy.pack_limit` makes each pack one sequence, but for a rollout whose template rewrites earlier turns."""
    if [branches for _, branches in batch.layout.trees] not in ([()], [(0,)]):
        raise ModelError(
            f"the pack has several sequences of one rollout, and this model computes each alone ({reason}): use a chat "
            "template that keeps earlier turns, such as model.chat_template: chatml"
        )


@torch.no_grad()
def score(policy: Policy, batch: Batch, temperature: float) -> torch.Tensor:
    """[N] logprobs of a pack under the policy's present weights.

    Args:
        policy: what scores; it is put into evaluation mode.
        batch: the pack.
        temperature: of the distribution.
    """
    policy.eval()
    return policy(batch, temperature=temperature).logprobs


@final
class Reference:
    """The model that `ref_kld` is measured against: the policy as the run began, or its base without adapter.

    A new adapter adds exactly zero, so the policy as the run began is the base. After a warm start, or with full
    parameters, the initial values are kept and swapped in for the reference pass.
    """

    def __init__(self, policy: Policy, kind: Literal["initial", "base"], *, is_fresh: bool) -> None:
        """Keep the reference's values; call it before any update and before a resume.

        Args:
            policy: as the run began.
            kind: the recipe's choice.
            is_fresh: whether the adapter is new, so that initial and base are the same.
        """
        self.policy = policy
        self.values: dict[str, torch.Tensor] | None = None
        if policy.adapters is None or (kind == "initial" and not is_fresh):
            trained = policy.trained_parameters()
            self.values = {name: local_of(value.detach()).clone() for name, value in trained.items()}

    def logprobs(self, batch: Batch, temperature: float) -> torch.Tensor:
        """[N] logprobs of a pack under the reference."""
        with self._in_place():
            return score(self.policy, batch, temperature)

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


def load_policy(
    model: ModelSettings,
    lora: LoraSettings | None,
    seed: int,
    device: torch.device,
    run_on: torch.device | None = None,
) -> Policy:
    """Load the base model and add an adapter.

    Args:
        model: path, dtype, quantization.
        lora: the adapter; None trains every parameter.
        seed: of the adapter's initial values.
        device: where the model goes.
        run_on: the device of its passes, where `Policy.shard` moves the parts; None: `device`.

    Raises:
        ModelError: the directory holds no model that can be trained, with the reason.
    """
    return make_policy(load_base(model, device), model, lora, seed, run_on=run_on)


def make_policy(
    causal_lm: PreTrainedModel,
    model: ModelSettings,
    lora: LoraSettings | None,
    seed: int,
    run_on: torch.device | None = None,
) -> Policy:
    """Add an adapter to a base model in memory, or make all parameters of its language part trainable.

    Args:
        causal_lm: frozen, as `load_base` returns it: with packed attention, or with its own if it has no other.
        model: its path, and whether activations are recomputed.
        lora: the adapter; None trains every parameter.
        seed: of the adapter's initial values.
        run_on: the device of its passes; None: that of the model.

    Raises:
        ModelError: the model or the adapter cannot be trained, with the reason.
    """
    use_fused_norms(causal_lm)
    routing, adapters = Routing(), None
    if model.gradient_checkpointing:
        causal_lm.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": routing.checkpoint_contexts})
    if lora is None:
        train_everything(causal_lm)
    else:
        adapters = Adapters(causal_lm, routing)
        adapters.add(RUN_ADAPTER, lora, seed)
    policy = Policy(causal_lm, adapters, model.path)
    if model.activation_offload:
        policy.offload = Offload(causal_lm.config.get_text_config().hidden_size)
    is_selective, device = model.gradient_checkpointing == "selective", run_on or policy.device
    if causal_lm.config._attn_implementation != PACKED_ATTENTION:
        policy.run_separately(f"{causal_lm.config.model_type} chooses its attention by itself")
    elif model.compile_layers and device.type == "cuda" and is_compilable(causal_lm, lora):
        policy.compile_layers(is_selective=is_selective, flash_attention=model.flash_attention)
    if is_selective and policy.compiled is None:
        raise ModelError(f"model.gradient_checkpointing: selective {SELECTIVE_UNCOMPILED}")
    return policy


def warm_start(lora: LoraSettings | None, policy: Policy, masters: Mapping[str, torch.Tensor]) -> None:
    """Start from an adapter directory, if the recipe names one.

    Args:
        lora: says the directory.
        policy: has the adapter.
        masters: its float32 masters, which are overwritten.
    """
    if lora is None or lora.warm_start is None or policy.adapters is None:
        return
    saved = policy.adapters.load_tensors(RUN_ADAPTER, Path(lora.warm_start))
    with torch.no_grad():
        for name, master in masters.items():
            master.copy_(saved[name])
