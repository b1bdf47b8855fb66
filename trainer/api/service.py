"""The training API in process: synchronous verbs on one base model.

service = open_service("models/SmolLM2-135M-Instruct")
model = service.create(rank=16)
model.forward_backward(data, "cross_entropy")
model.optim_step(learning_rate=1e-4)
model.save_state("states/step-1")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, final

import torch
from transformers import PreTrainedTokenizerBase

from trainer.api.datum import Datum
from trainer.api.slots import Base, CustomLoss, Passed, Slot
from trainer.api.states import load_state, save_state, slot_from
from trainer.config.recipe import LoraSettings, ModelSettings
from trainer.data.chat import load_tokenizer
from trainer.data.stop_tokens import stop_token_ids
from trainer.model.quiet import quiet_transformers
from trainer.sampling.local import LocalSampler
from trainer.sampling.sampler import SampleRequest, SamplingParams
from trainer.training.schedule import AdamParams
from trainer.types import Completion


@final
class TrainingModel:
    """An adapter in training, and the verbs of its loop."""

    def __init__(self, service: Service, slot: Slot) -> None:
        """Begin with a slot; see `Service.create`."""
        self.service, self._slot = service, slot

    @property
    def updates(self) -> int:
        """Updates made so far."""
        return self._slot.learner.updates

    def forward(
        self, data: Sequence[Datum], loss: str = "cross_entropy", config: Mapping[str, float | str] | None = None
    ) -> Passed:
        """Score data without a gradient.

        Args:
            data: the examples.
            loss: `cross_entropy`, `importance_sampling`, `ppo`, `cispo` or `gspo`.
            config: numbers of the loss, over their defaults.

        Raises:
            UserError: there is no such loss, or the data are not what it takes.
        """
        return self._slot.forward(data, loss, config)

    def forward_backward(
        self, data: Sequence[Datum], loss: str | CustomLoss, config: Mapping[str, float | str] | None = None
    ) -> Passed:
        """Add the gradient of a loss, summed over the tokens of the data, to that of the next update.

        Args:
            data: the examples.
            loss: a name as of `forward`, or a function from data and logprobs to a scalar and metrics.
            config: numbers of a named loss.

        Raises:
            UserError: there is no such loss, or the data are not what it takes.
            NumericalError: the gradient of the function is not finite; nothing was added.
        """
        if callable(loss):
            return self._slot.custom(data, loss)
        return self._slot.forward(data, loss, config, backward=True)

    def optim_step(
        self,
        learning_rate: float,
        *,
        beta1: float = 0.9,
        beta2: float = 0.95,
        epsilon: float = 1e-12,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
    ) -> dict[str, float]:
        """One AdamW update from the gradient so far, which is then cleared; returns its metrics.

        Args:
            learning_rate: of this update.
            beta1: of AdamW.
            beta2: of AdamW.
            epsilon: of AdamW.
            weight_decay: decoupled.
            max_grad_norm: the gradient is scaled down to it.

        Raises:
            NumericalError: loss or gradient is not finite; nothing was updated.
        """
        return self._slot.optim_step(AdamParams(learning_rate, beta1, beta2, epsilon, weight_decay, max_grad_norm))

    def sample(
        self,
        prompt_ids: Sequence[int],
        num_samples: int = 1,
        *,
        max_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        stop: Sequence[str] | Sequence[int] | None = None,
    ) -> list[Completion]:
        """Draw completions with the present weights.

        Args:
            prompt_ids: token ids.
            num_samples: how many.
            max_tokens: of each.
            temperature: of sampling, and of the logprobs that are recorded; 0 takes the likeliest token.
            top_p: nucleus.
            top_k: 0 is off.
            seed: of the noise.
            stop: strings or tokens that end a completion; None: the model's own tokens.
        """
        tokens = self.service.stop_ids if stop is None else frozenset(each for each in stop if isinstance(each, int))
        params = SamplingParams(
            max_tokens,
            tokens,
            seed,
            0,
            temperature=temperature or 1.0,
            top_p=top_p,
            top_k=top_k,
            stop=tuple(each for each in stop or () if isinstance(each, str)),
            is_greedy=temperature == 0,
        )
        sampler = self.service.sampler_of(self._slot)
        return sampler.sample([SampleRequest(tuple(prompt_ids), 0, num_samples)], params)[0]

    def save_state(self, target: str | Path) -> Path:
        """Write weights and optimizer, as a whole; returns the directory.

        Raises:
            CheckpointError: it could not be written; what was there is intact.
        """
        save_state(self._slot, Path(target))
        return Path(target)

    def load_state(self, directory: str | Path, *, optimizer: bool = True) -> None:
        """Continue from a state of the same base and adapter settings.

        Raises:
            CheckpointError: it is damaged, or belongs to something else; the model is as it was.
        """
        load_state(self._slot, Path(directory), optimizer=optimizer)

    def close(self) -> None:
        """Free the slot; what was not saved is gone."""
        self.service.base.close(self._slot)


@final
class Service:
    """One base model in this process."""

    def __init__(self, base: Base, tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int]) -> None:
        """See `open_service`."""
        self.base, self.tokenizer, self.stop_ids = base, tokenizer, stop_ids
        self._sampler: LocalSampler | None = None
        self._version = 0

    def create(
        self,
        rank: int = 16,
        *,
        alpha: float = 32.0,
        target_modules: Literal["all-linear"] | list[str] = "all-linear",
        seed: int = 0,
    ) -> TrainingModel:
        """A new adapter, which computes zero until it is trained.

        Args:
            rank: of LoRA.
            alpha: the adapter's output is multiplied by alpha / rank.
            target_modules: names of the layers, or all linear ones but the LM head.
            seed: of the initial values.

        Raises:
            ModelError: it cannot be trained on this model.
        """
        lora = LoraSettings(rank=rank, alpha=alpha, target_modules=target_modules)
        return TrainingModel(self, self.base.open(lora, seed))

    def create_from(self, directory: str | Path, *, optimizer: bool = True) -> TrainingModel:
        """An adapter with the settings and weights of a saved state.

        Raises:
            CheckpointError: it is damaged, or belongs to another base.
        """
        return TrainingModel(self, slot_from(self.base, Path(directory), optimizer=optimizer)[0])

    def chat_ids(self, messages: Sequence[Mapping[str, str]], *, generate: bool = False) -> list[int]:
        """Token ids of a conversation by the model's template.

        Args:
            messages: with `role` and `content`.
            generate: whether to end where an answer begins.
        """
        rendered: Any = self.tokenizer.apply_chat_template(
            [dict(each) for each in messages], tokenize=False, add_generation_prompt=generate
        )
        ids: list[int] = self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        return ids

    def sampler_of(self, slot: Slot) -> LocalSampler:
        """The sampler, with the present weights of a slot."""
        policy = self.base.policy
        assert policy.adapters is not None
        policy.adapters.activate(slot.name)
        if self._sampler is None:
            self._sampler = LocalSampler(policy, self.tokenizer)
        self._version += 1
        self._sampler.publish(policy, self._version)
        return self._sampler


def open_service(
    model: str | Path,
    *,
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16",
    gradient_checkpointing: bool = False,
    micro_batch_tokens: int = 4096,
    device: str | None = None,
) -> Service:
    """Load a base model.

    Args:
        model: its directory.
        compute_dtype: of its weights; adapters and optimizers are float32.
        gradient_checkpointing: recompute activations in the backward pass.
        micro_batch_tokens: most tokens that go through the model together.
        device: None: a GPU where there is one.

    Raises:
        ModelError: it cannot be loaded, or adapters on it cannot be trained.
    """
    quiet_transformers()
    settings = ModelSettings(
        path=str(model), compute_dtype=compute_dtype, gradient_checkpointing=gradient_checkpointing
    )
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    base = Base(settings, where, micro_batch_tokens=micro_batch_tokens)
    tokenizer = load_tokenizer(settings)
    return Service(base, tokenizer, stop_token_ids(tokenizer, settings.path))
