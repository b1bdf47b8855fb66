"""The sections of a recipe that only rft has: algorithm, rollout and rewards."""

from __future__ import annotations

import shlex
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from trainer.config.presets import (
    AdvantageEstimator,
    AlgorithmName,
    KLEstimator,
    Normalizer,
    OverlongHandling,
    ReferencePolicy,
)
from trainer.config.section import Fraction, OpenFraction, Section

ToolErrorWay: TypeAlias = Literal["tell", "end", "answer"]
ENVIRONMENT_REWARD: Final = "environment"
"""`use` of the reward that the environment itself gives."""


class AlgorithmSettings(Section):
    """The policy-gradient algorithm of rft. Omitted fields take the defaults of the named algorithm."""

    name: AlgorithmName = "grpo"
    """The algorithm. `dapo` and `dr_grpo` use the loss of `grpo` with other defaults (docs/algorithms.md)."""
    clip_low: NonNegativeFloat | None = None
    """The probability ratio is clipped below at 1 - clip_low."""
    clip_high: NonNegativeFloat | None = None
    """The probability ratio is clipped above at 1 + clip_high."""
    kl_coef: NonNegativeFloat | None = None
    """Weight of the penalty on KL(policy || reference). With 0, `train/ref_kld` is still measured and logged."""
    kl_estimator: KLEstimator | None = None
    """Estimator used for the KL penalty. The estimators have different gradients (docs/algorithms.md)."""
    advantage: AdvantageEstimator | None = None
    """How the rewards of a group are turned into advantages."""
    normalizer: Normalizer | None = None
    """What the summed token losses are divided by."""
    reference: ReferencePolicy = "initial"
    """The reference policy: the policy at the start of the run, or the base model without the adapter."""
    minibatches_per_step: PositiveInt = 1
    """Optimizer updates per pass over the rollouts of a step. With 1, and one epoch, `ppo_kl` is always 0."""
    epochs_per_batch: PositiveInt = 1
    """Passes over the rollouts of a step."""
    mismatch_cap: Annotated[float, Field(ge=1.0)] | None = None
    """Upper bound of the importance weight that corrects for differences between sampler and trainer (truncated as in
    arXiv:1802.01561); null disables the correction."""
    overlong: OverlongHandling | None = None
    """Completions truncated at `max_completion_tokens`: `keep` trains on them, `mask` excludes them from the loss,
    `punish` sets their reward to `overlong_reward`."""
    overlong_reward: float = 0.0
    """Reward of a truncated completion with `overlong: punish`."""


class SuccessRule(Section):
    """When a held-out answer passes, for pass@k."""

    reward: str | None = None
    """Name of one reward; the weighted sum if omitted."""
    at_least: float
    """The answer passes if the reward is at least this much."""


class ToolErrors(Section):
    """What a faulty tool call leads to.

    `tell` gives the policy the problem as the tool's result, `end` ends the rollout there, `answer` takes the text as
    an answer without calls.
    """

    invalid_json: ToolErrorWay = "tell"
    """The call is no JSON object with `name` and `arguments`."""
    unclosed: ToolErrorWay = "tell"
    """The call does not end."""
    unknown_tool: ToolErrorWay = "tell"
    """No tool has this name."""
    bad_arguments: ToolErrorWay = "tell"
    """The arguments do not fit the tool's signature."""


class EnvironmentLimits(Section):
    """Resource limits of environments and tools; a rollout that exceeds one counts as failed."""

    timeout_s: PositiveFloat = 10.0
    """Wall-clock time limit of one `reset` or `step`, tools included."""
    memory_limit_gib: PositiveFloat = 2.0
    """Address space that an environment may use in addition to what its imports use."""
    num_workers: PositiveInt = 8
    """Environments that compute at the same time, per rank."""


class McpTools(Section):
    """An MCP server whose tools the policy may call. It speaks over stdio, and is started for each rollout."""

    mcp: str | list[str]
    """Its command, in the recipe's directory, for example `python server.py`."""
    only: list[str] = Field(default_factory=list)
    """Names of the tools that are offered; all if empty."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables, in addition to HOME, LOGNAME, PATH, SHELL, TERM and USER."""

    @property
    def command(self) -> tuple[str, ...]:
        """The command as a list.

        Raises:
            ValueError: its quotes are not closed.
        """
        return tuple(shlex.split(self.mcp) if isinstance(self.mcp, str) else self.mcp)


class VerifiersEnvironment(Section):
    """A taskset of verifiers 0.4, which runs in an interpreter of its own (docs/environments.md)."""

    verifiers: str
    """Id of the taskset: an installed package, or a module beside the recipe."""
    python: str
    """Interpreter in whose environment verifiers is installed, for example `verifiers-venv/bin/python`; relative to the
    current directory."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Fields of the taskset's own configuration."""


class VllmSettings(Section):
    """The vLLM servers that a run starts by itself (`sampler: vllm` without `vllm_url`)."""

    python: str | None = None
    """Interpreter of the environment in which vLLM is installed. By default the shape's `vllm_python`, the environment
    variable TUNESMITH_VLLM_PYTHON, or .venv-vllm/bin/python."""
    replicas: PositiveInt = 1
    """Servers among which prompts are divided; each holds the whole model on an equal part of the shape's
    `vllm_gpus`."""
    max_model_tokens: PositiveInt | None = None
    """Longest prompt with its completion that the servers take; `data.max_seq_tokens` by default."""
    placement: Literal["reserved", "colocated"] = "reserved"
    """`reserved` puts the servers on the shape's `vllm_gpus`; `colocated` on the GPUs that train, where they sleep
    while the policy learns (docs/vllm.md)."""
    gpu_memory_frac: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """With `colocated`: part of a GPU's memory that a server takes while it draws; weights, optimizer and the server's
    own weights and cache share the GPU then."""
    start_timeout_s: PositiveFloat = 900.0
    """How long a server may take to load the model, at the start and when it is started again."""
    arguments: list[str] = Field(default_factory=list)
    """Further arguments of the servers, for example [--gpu-memory-utilization, "0.8"]."""


class RolloutSettings(Section):
    """How completions are sampled during training."""

    group_size: Annotated[int, Field(ge=2)] = 8
    """Completions sampled per prompt. At least 2, because advantages compare the completions of a group."""
    max_completion_tokens: PositiveInt = 256
    """Maximum length of a completion in tokens; longer ones are truncated."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; also applied to every logprob that is logged or trained on."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus sampling; 1 disables it. Other values are refused: they bias the gradient."""
    top_k: NonNegativeInt = 0
    """Sample only from the k most likely tokens; 0 disables it. Other values are refused: they bias the gradient."""
    min_p: OpenFraction = 0.0
    """Sample only tokens with at least this fraction of the highest probability; 0 disables it. Other values are
    refused: they bias the gradient."""
    stop: list[str] = Field(default_factory=list)
    """Strings that end a completion, in addition to the stop tokens of the model."""
    sampler: Literal["local", "vllm", "served"] = "local"
    """`local` samples in the training process; `vllm` on vLLM servers that the run starts, or on the one at `vllm_url`
    (docs/vllm.md); `served` on the server at `server_url`, which serves others too."""
    vllm_url: str | None = None
    """Address of a vLLM server that you start. Without it the run starts its own."""
    vllm: VllmSettings = Field(default_factory=VllmSettings)
    """The servers that the run starts."""
    server_url: str | None = None
    """Address of `trainer serve`, or of a vLLM server, for `sampler: served`."""
    chunk_prompts: PositiveInt = 8
    """Prompts sampled together. Such a chunk is also the unit of the journal and of replay after a restart."""
    keep_steps: PositiveInt | None = None
    """Number of newest steps whose rollouts stay in the run directory; null keeps all. Rollouts that a resume may need
    stay in any case: those since the oldest of the newest `keep_last` checkpoints. Older ones are compressed."""
    staleness: Annotated[int, Field(ge=0, le=1)] = 0
    """With 1, the rollouts of each step but the first are drawn with the policy before the last step: a server draws
    them, and rewards are computed, while that step learns (docs/vllm.md). Needs `algorithm.mismatch_cap`."""
    refill: bool = False
    """Replace groups whose rewards are all equal by sampling further prompts, until the batch is full. Prompts whose
    rollouts earned different rewards in earlier steps are drawn first (docs/algorithms.md)."""
    max_refill_rounds: PositiveInt = 4
    """Maximum number of extra sampling rounds per step with `refill`."""
    eval_samples: PositiveInt = 4
    """Completions per held-out prompt in evaluations, the k of pass@k; sampled at `temperature`."""
    success: SuccessRule | None = None
    """When a held-out answer passes, for example `{reward: correct, at_least: 1.0}`. By default it passes if the
    weighted sum reaches the highest value that it can take when every reward gives at most 1."""
    max_sampler_kl: PositiveFloat = 0.1
    """Upper limit of `train/sampler_kl`. Above it the run stops: the sampler and the policy have different weights."""
    environment: str | VerifiersEnvironment | None = None
    """A class with `reset` and `step`, as `module:Class` or `file.py:Class`; rollouts then have several turns
    (docs/environments.md). Or a taskset of verifiers, as `{verifiers: ID, python: INTERPRETER}`."""
    tools: list[str | McpTools] = Field(default_factory=list)
    """What the policy may call: typed functions, as `module:function` or `file.py:function`, and MCP servers, as
    `{mcp: COMMAND}`."""
    max_turns: PositiveInt = 8
    """Turns after which a rollout with an environment or tools ends."""
    max_tokens: PositiveInt | None = None
    """Tokens that a rollout with an environment or tools may have, prompts and observations included; at most, and by
    default, `data.max_seq_tokens`. It ends where another turn would not fit."""
    max_time_s: PositiveFloat | None = None
    """Seconds after which a rollout with an environment or tools gets no further turn. Results then depend on time."""
    tool_errors: ToolErrors = Field(default_factory=ToolErrors)
    """What the policy gets back for a faulty tool call."""
    environment_limits: EnvironmentLimits = Field(default_factory=EnvironmentLimits)
    """Time and memory limits of environments and tools."""
    deterministic: bool = False
    """You state that environment and tools answer the same turns in the same way; `trainer verify-resume` needs it.
    Environments whose processes are killed from outside are then played again."""

    @property
    def functions(self) -> tuple[str, ...]:
        """The tools that are functions."""
        return tuple(tool for tool in self.tools if isinstance(tool, str))

    @property
    def servers(self) -> tuple[McpTools, ...]:
        """The tools that are MCP servers."""
        return tuple(tool for tool in self.tools if isinstance(tool, McpTools))

    @property
    def has_turns(self) -> bool:
        """Whether rollouts may have several turns."""
        return self.environment is not None or bool(self.tools)

    @property
    def is_managed(self) -> bool:
        """Whether the run starts the servers on which it samples."""
        return self.sampler == "vllm" and self.vllm_url is None

    @property
    def is_colocated(self) -> bool:
        """Whether the servers share their devices with training."""
        return self.is_managed and self.vllm.placement == "colocated"

    @property
    def drawn_token_limit(self) -> int:
        """Most tokens that the policy draws in a rollout."""
        return self.max_completion_tokens * (self.max_turns if self.has_turns else 1)


class RewardSpec(Section):
    """One reward function and its weight."""

    use: str
    """Name of a built-in reward, `module:function` or `file.py:function`."""
    weight: float = 1.0
    """Weight of this reward in the sum."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the function."""
    label: str | None = None
    """Name of the reward in metrics; defaults to the name of the function."""
    every_row: bool = False
    """With `reward_column`: judge every row, also those that do not name this reward."""

    @property
    def name(self) -> str:
        """Name of the reward in metrics."""
        return self.label or self.use.rsplit(":", 1)[-1]


class RewardLimits(Section):
    """Resource limits of reward functions; a call that exceeds one counts as failed."""

    timeout_s: PositiveFloat = 10.0
    """Wall-clock time limit of one call."""
    memory_limit_gib: PositiveFloat = 4.0
    """Address space that a reward process may use in addition to what it uses after importing the reward."""
    num_workers: PositiveInt = 1
    """Number of reward processes per rank."""
    max_failed_frac: Fraction = 0.1
    """Maximum fraction of failed rollouts in a step. Above it the run stops and shows the first traceback."""
