"""One family's measurements: what the project computes beside what plain transformers and PEFT compute, in float32.

All numbers are the largest differences over tokens: of logprobs absolute, of gradients relative to the largest entry.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, Final

import matrix_configs
import peft
import torch
import transformers
from tiny import tiny_tokenizer
from torch import nn

from trainer.config.recipe import LoraSettings, ModelSettings
from trainer.data.tokens import TokenSequence
from trainer.model.batch import Batch
from trainer.model.packing_check import verify_packing
from trainer.model.policy import Policy, load_policy
from trainer.sampling.local import LocalSampler
from trainer.sampling.sampler import SampleRequest, SamplingParams
from trainer.worker import main as run_worker

CPU: Final = torch.device("cpu")
LENGTHS: Final = (12, 21, 9)
"""Longer than the windows of the tiny models, on both sides of the lengths at which rotary embeddings change."""
MAX_SEQ_TOKENS: Final = 128
UNTOUCHED: Final = ("A_log", "dt_bias", "inv_freq", "rotary")
METHODS: Final[Mapping[str, Mapping[str, Any]]] = {
    "sft": {"method": "sft", "data": {"train": "rows.jsonl", "max_seq_tokens": MAX_SEQ_TOKENS}},
    "full": {"method": "sft", "lora": None, "data": {"train": "rows.jsonl", "max_seq_tokens": MAX_SEQ_TOKENS}},
    "rft": {
        "method": "rft",
        "data": {"train": "prompts.jsonl", "max_seq_tokens": MAX_SEQ_TOKENS},
        "rollout": {"group_size": 4, "max_completion_tokens": 8},
        "rewards": [{"use": "soft_overlong", "args": {"max_characters": 16, "ramp_characters": 16}}],
    },
}
COMMON: Final[Mapping[str, Any]] = {
    "model": {"path": "model", "compute_dtype": "float32"},
    "lora": {"rank": 4},
    "rows_per_step": 4,
    "steps": 2,
    "optimizer": {"learning_rate": 1e-3},
    "shape": "cpu",
}


def build(directory: Path, family: str, changes: Mapping[str, Any]) -> None:
    """Save a random model of a family with tokenizer and rows.

    Args:
        directory: where `model/`, `rows.jsonl` and `prompts.jsonl` go.
        family: a model type.
        changes: fields of the configuration, for a variant.
    """
    config = matrix_configs.tiny_config(family, changes)
    torch.manual_seed(0)
    model = getattr(transformers, matrix_configs.families()[family])(config).float()
    _randomize(model)
    model.save_pretrained(directory / "model")
    tiny_tokenizer().save_pretrained(directory / "model")
    turns = [(f"what is {n} and {3 * n}?" + " please" * (n % 3), f"it is {4 * n}." + " cats" * n) for n in range(8)]
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in turns]
    for name, rows in (("rows", chats), ("prompts", [chat[:1] for chat in chats])):
        text = "".join(json.dumps({"messages": messages}) + "\n" for messages in rows)
        (directory / f"{name}.jsonl").write_text(text)


@torch.no_grad()
def read_text(directory: Path, family: str) -> None:
    """Let the saved model read text, as its authors wrote it; raises whatever its code raises."""
    kind = getattr(transformers, matrix_configs.families()[family])
    model = kind.from_pretrained(str(directory / "model"), dtype=torch.float32).eval()
    logits = model(input_ids=torch.arange(3, 25)[None], use_cache=False).logits
    if tuple(logits.shape) != (1, 22, matrix_configs.VOCAB) or not bool(logits.isfinite().all()):
        raise ValueError(f"not finite logits of each token, but {tuple(logits.shape)}")


@torch.no_grad()
def _randomize(model: nn.Module) -> None:
    """Make distributions far from uniform, and everything that is stored differ from its initial value."""
    generator = torch.Generator().manual_seed(1)
    parameters = dict(model.named_parameters())
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or any(part in name for part in UNTOUCHED):
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name in parameters and tensor.ndim >= 2:
            tensor.copy_(noise * 1.5 * tensor.shape[-1] ** -0.5)
        elif name in parameters or not tensor.any():
            tensor.add_(0.1 * noise)
        else:  # a stored buffer
            tensor.mul_(1.0 + 0.3 * noise.clamp(-2.0, 2.0))


def train(directory: Path, method: str) -> tuple[str, str]:
    """Run two steps of a method as `trainer train` does; returns finished, REFUSED or CRASH, and the message."""
    recipe = {"name": method, **COMMON, **METHODS[method]}
    (directory / f"{method}.json").write_text(json.dumps(recipe))  # JSON is YAML
    stderr = directory / f"{method}.stderr"
    with stderr.open("w") as written, redirect_stderr(written):  # a real file: faulthandler wants its descriptor
        code = run_worker([f"{method}.json"])
    said = stderr.read_text()
    sys.stderr.write(said)
    outcome = directory / "runs" / method / "outcome.json"
    # without an outcome it was refused from the configuration: `recipe: field: why`
    message = json.loads(outcome.read_text())["message"] if outcome.is_file() else said.strip().split(": ", 2)[-1]
    if code == 0:
        return "finished", ""
    known = code == 2 or any(text in message for text in ("own forward pass", "no causal language model", "sampler_kl"))
    return ("REFUSED" if known else "CRASH"), message.split("; the checkpoint")[0].split(". Mend it")[0]


class Measures:
    """The measurements of one model directory; each is a method that returns named numbers."""

    def __init__(self, directory: Path, family: str) -> None:
        """Load the plain model.

        Args:
            directory: as `build` left it.
            family: a model type.
        """
        self.directory, self.kind = directory, getattr(transformers, matrix_configs.families()[family])
        generator = torch.Generator().manual_seed(2)
        ids = [torch.randint(3, matrix_configs.VOCAB - 2, (length,), generator=generator) for length in LENGTHS]
        self.sequences = [tuple(each.tolist()) for each in ids]
        self.plain_logprobs = torch.cat([_plain(self.plain(), each) for each in self.sequences]).detach()

    def plain(self, path: str | None = None) -> Any:
        """The model as its authors wrote it."""
        path = path or str(self.directory / "model")
        return self.kind.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()

    def policy(self, lora: LoraSettings | None) -> Policy:
        """The project's policy, its trained parameters moved away from their initial values."""
        settings = ModelSettings(path=str(self.directory / "model"), compute_dtype="float32")
        policy = load_policy(settings, lora, 0, CPU).eval()
        verify_packing(policy, CPU, MAX_SEQ_TOKENS)
        if lora is not None:
            generator = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for parameter in policy.trained_parameters().values():
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        return policy

    def adapted(self) -> Policy:
        """With an adapter on all linear layers."""
        return self.policy(LoraSettings(rank=4))

    def logprobs(self) -> dict[str, Any]:
        """Base model: alone against plain, packed against alone, and what leaks; or why sequences are not packed."""
        policy = self.adapted()
        with policy.adapter_off(), torch.no_grad():
            alone = torch.cat([_ours(policy, [each]) for each in self.sequences])
        numbers: dict[str, Any] = {"alone": _largest(alone - self.plain_logprobs)}
        if policy.separate_reason is not None:
            return numbers | {"separate": policy.separate_reason}
        with policy.adapter_off(), torch.no_grad():
            packed = _ours(policy, self.sequences)
        numbers["packed"] = _largest(packed - alone)
        with policy.adapter_off(), _embeddings(policy) as embedded:
            _ours(policy, self.sequences)[LENGTHS[0] - 1 :].sum().backward()
        numbers["leak"] = _largest(embedded[0].grad[0, : LENGTHS[0]])
        return numbers

    def adapter(self) -> dict[str, Any]:
        """The adapter as plain PEFT loads it: logprobs, gradient, and what it adapts."""
        policy = self.adapted()
        trained = policy.trained_parameters()
        saved = self.directory / "adapter"
        saved.mkdir()
        policy.save(saved, trained)
        plain = peft.PeftModel.from_pretrained(self.plain(), str(saved), is_trainable=True).eval()
        theirs = {name: value for name, value in plain.named_parameters() if value.requires_grad}
        expected = torch.cat([_plain(plain, each) for each in self.sequences])
        gradients = _by_key(plain, theirs, _gradients(expected.sum(), theirs))
        found: dict[str, Any] = {"adapts": _kinds_of_layers(trained)}
        policy.train()
        ours = self.as_trained(policy)
        found["adapter"] = _largest(ours - expected)
        own = _gradients(ours.sum(), trained)
        found["adapter_gradient"] = _relative(_by_key(policy.adapters.model, trained, own), gradients)
        found["dead"] = _kinds_of_layers([name for name, value in own.items() if not value.any()])
        return found

    def full(self) -> dict[str, float]:
        """Full-parameter training: gradient against plain, and what was saved against the base."""
        policy = self.policy(None)
        trained = policy.trained_parameters()
        saved = self.directory / "saved"
        saved.mkdir()
        policy.save(saved, trained)
        again = torch.cat([_plain(self.plain(str(saved)), each) for each in self.sequences])
        numbers = {"saved": _largest(again - self.plain_logprobs)}
        plain = self.plain()
        theirs = {name: value.requires_grad_() for name, value in plain.named_parameters() if value.is_floating_point()}
        expected = torch.cat([_plain(plain, each) for each in self.sequences])
        gradients = _gradients(expected.sum(), theirs)
        policy.train()
        ours = self.as_trained(policy)
        numbers["full_gradient"] = _relative(_gradients(ours.sum(), trained), gradients)
        return numbers

    @torch.no_grad()
    def sampler(self) -> dict[str, float]:
        """The local sampler's logprobs against the trainer's own of what was drawn."""
        policy = self.adapted()
        sampler = LocalSampler(policy, tiny_tokenizer())
        sampler.publish(policy, 0)
        params = SamplingParams(max_completion_tokens=12, stop_ids=frozenset(), seed=0, step=0)
        prompts = [self.sequences[0], self.sequences[2][:5]]
        requests = [SampleRequest(prompt, number, 3) for number, prompt in enumerate(prompts)]
        worst = 0.0
        for prompt, group in zip(prompts, sampler.sample(requests, params), strict=True):
            for completion in group:
                ours = _ours(policy, [prompt + completion.token_ids])[len(prompt) - 1 :]
                worst = max(worst, _largest(ours - torch.tensor(completion.logprobs)))
        return {"sampler": worst}

    def as_trained(self, policy: Policy) -> torch.Tensor:
        """Logprobs of all sequences, in one pack or one by one."""
        packs = [self.sequences] if policy.separate_reason is None else [[each] for each in self.sequences]
        return torch.cat([_ours(policy, pack) for pack in packs])


def measure(directory: Path, family: str, found: dict[str, Any]) -> None:
    """Add every number that can be had; what fails is noted under `errors`."""
    numbers: dict[str, Any] = found.setdefault("numbers", {})
    errors: dict[str, str] = found.setdefault("errors", {})
    measures = _noted(errors, "plain", lambda: Measures(directory, family))
    if measures is None:
        return
    for name in ("logprobs", "adapter", "full", "sampler"):
        numbers.update(_noted(errors, name, getattr(measures, name)) or {})


def _noted(errors: dict[str, str], name: str, what: Callable[[], Any]) -> Any:
    try:
        return what()
    except Exception as error:  # a model's code may fail in any way
        errors[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]
        return None


def _ours(policy: Policy, sequences: Sequence[tuple[int, ...]]) -> torch.Tensor:
    pack = Batch.pack([TokenSequence(each, (True,) * len(each)) for each in sequences], CPU)
    return policy(pack).logprobs


def _plain(model: Any, sequence: tuple[int, ...]) -> torch.Tensor:
    ids = torch.tensor(sequence)
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)


def _largest(difference: torch.Tensor) -> float:
    return float(difference.detach().abs().max())


@contextmanager
def _embeddings(policy: Policy) -> Iterator[list[torch.Tensor]]:
    """The embedded pack, as a leaf whose gradient shows what each logprob depends on."""
    kept: list[torch.Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[-1].clone()  # some models write into it

    handle = policy.causal_lm.get_input_embeddings().register_forward_hook(keep)
    yield kept
    handle.remove()


def _gradients(total: torch.Tensor, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    values = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if value is None else value
        for (name, parameter), value in zip(parameters.items(), values, strict=True)
    }


def _by_key(
    model: Any, parameters: Mapping[str, torch.Tensor], gradients: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Gradients by the names that PEFT's files have."""
    keys = peft.get_peft_model_state_dict(model, state_dict={name: name for name in parameters})
    return {key: gradients[own] for key, own in keys.items()}


def _relative(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> float:
    scale = max(_largest(value) for value in theirs.values())
    missing = [value for name, value in theirs.items() if name not in ours]
    different = [ours[name] - theirs[name] for name in ours]
    return max(_largest(value) for value in [*different, *missing]) / scale


def _kinds_of_layers(names: Iterable[str]) -> list[str]:
    """The layers that adapter tensors belong to, those of a kind together: `q_proj`, `experts`, `vision: fc1`."""
    found = set()
    for name in names:
        path = re.sub(r"\.(lora_|base_layer).*", "", name)
        part = "vision: " if re.search(r"vision|visual|audio|projector|connector", path) else ""
        found.add(part + path.rpartition(".")[2])
    return sorted(found)
