"""What the user writes: the recipe, as typed data.

Nothing here knows about devices (that is the shape's business) and nothing here imports torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from trainer.config.presets import AdvantageEstimator, KLEstimator, Normalizer, OverlongHandling
from trainer.config.section import Section

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
OpenFraction = Annotated[float, Field(ge=0.0, lt=1.0)]
BUILTIN_TEMPLATES: Final = ("chatml", "llama3", "gemma", "zephyr")
"""Names that `model.chat_template` takes beside files."""
Role = Literal["system", "developer", "user", "assistant", "tool"]
RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class ModelSettings(Section):
    """The base model."""

    path: str
    """A directory with config.json and safetensors weights, or a hub name where a hub is reachable."""
    revision: str | None = None
    """Commit of a hub name; hub names need one. A branch is taken with a warning, because it moves."""
    chat_template: str | None = None
    """A Jinja file, or `chatml`, `llama3`, `gemma` or `zephyr`, that replaces the tokenizer's template."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off: such a model is refused."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of weights and activations in forward and backward; trained parameters and optimizer are float32 always."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third more time for much less memory."""
    quantization: Literal["nf4"] | None = None
    """`nf4` keeps the base's linear layers in 4 bits (QLoRA, arXiv:2305.14314; extra `qlora`); needs `lora`."""


class LoraSettings(Section):
    """Low-rank adapters (arXiv:2106.09685), made by PEFT."""

    rank: PositiveInt = 16
    """Inner dimension of each adapter."""
    alpha: PositiveFloat = 32.0
    """The adapter's output is scaled by alpha / rank (alpha / sqrt(rank) with `rslora`)."""
    dropout: OpenFraction = 0.0
    """On the adapter's input while learning; rft refuses more than 0."""
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Module names that get an adapter; `all-linear` is every linear layer but the head."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (arXiv:2312.03732)."""
    dora: bool = False
    """Learn magnitude and direction apart (arXiv:2402.09353); slower."""
    warm_start: str | None = None
    """An adapter directory to begin from; a new run, not a resume."""


class DataSource(Section):
    """Where rows come from: files, a hub data set where no file of the path exists, or several sources."""

    path: str | None = None
    """A file (.jsonl, .json, .jsonl.gz, .jsonl.zst, .csv, .parquet), a directory or a glob; used where it exists."""
    hub: str | None = None
    """A Hugging Face data set name (or a local directory that `datasets.load_dataset` reads)."""
    config: str | None = None
    """The data set's configuration."""
    split: str = "train"
    """The data set's split."""
    revision: str | None = None
    """Commit of the data set."""
    repeat: PositiveFloat = 1.0
    """In a list of sources: how often each row counts in an epoch; 0.5 takes every second row."""
    sources: list[DataSource] = Field(default_factory=list)
    """Several sources as one; `train: [a.jsonl, {path: b.parquet, repeat: 2}]` is short for it."""
    eval_frac: OpenFraction | None = None
    """Set by `data.eval_frac`."""
    part: Literal["train", "eval"] = "train"
    """Set by `data.eval_frac`: which part of the rows."""


def _path_to_source(value: object) -> object:
    """Let a plain string stand for a file, and a list for several sources."""
    if isinstance(value, list):
        return {"sources": [_path_to_source(each) for each in value]}
    return {"path": value} if isinstance(value, str) else value


RowSource = Annotated[
    DataSource,
    BeforeValidator(_path_to_source, json_schema_input_type=str | DataSource | list[str | DataSource]),
]


class DataSettings(Section):
    """Training and held-out rows, and how a row becomes tokens."""

    train: RowSource
    """Rows to train on: a path, `{path, hub, config, split, revision}`, or a list of them."""
    eval: RowSource | None = None
    """Held-out rows; never trained on."""
    eval_frac: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Instead of `eval`: hold out about this share of `train`, chosen by the content of each row."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Field names of this project -> names in the file, for example `{prompt: question, completion: answer}`."""
    ignore: list[str] = Field(default_factory=list)
    """Fields of rows and of messages to leave out, for example `[history]`; text that is not used is refused else."""
    system: str | None = None
    """A system message put before rows that have none."""
    format: Literal["chat", "text"] = "chat"
    """`chat` renders through the chat template; `text` trains prompt + completion + stop token as they are."""
    train_on: Literal["all", "last"] | Annotated[list[Role], Field(min_length=1)] = "all"
    """sft: which turns are trained: `all` assistant turns, the `last` one, or the turns of a list of roles."""
    allow_special_tokens: bool = False
    """Let control tokens written in the text of a row, such as `<|im_end|>`, become control tokens."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further variables of the chat template, such as `{enable_thinking: false}`; serve the model with the same."""
    template_date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")] = "2026-01-01"
    """The date (YYYY-MM-DD) that a chat template which reads the clock sees, so that a recipe always gives the same
    tokens."""
    max_seq_tokens: PositiveInt = 2048
    """Longest row in tokens, prompt and completion together."""
    overlong: Literal["error", "drop", "truncate"] = "error"
    """What happens to a longer row; the count is reported always."""
    eval_rows: PositiveInt | None = None
    """Use only the first so many held-out rows."""

    @model_validator(mode="before")
    @classmethod
    def _split_by_content(cls, data: Any) -> Any:
        """Make of `eval_frac` two parts of the same rows."""
        if not isinstance(data, dict) or data.get("eval_frac") is None or data.get("eval") is not None:
            return data
        train = _path_to_source(data.get("train"))
        train = train.model_dump() if isinstance(train, DataSource) else train
        if not isinstance(train, dict):
            return data
        given = {**train, "eval_frac": data["eval_frac"]}
        return {**data, "train": {**given, "part": "train"}, "eval": {**given, "part": "eval"}}


class OptimizerSettings(Section):
    """AdamW (arXiv:1711.05101) and its schedule."""

    learning_rate: PositiveFloat = 2e-4
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear increase from 0."""
    min_learning_rate_frac: Fraction = 0.0
    """Where `linear` and `cosine` end, as a fraction of the peak."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    beta1: OpenFraction = 0.9
    """Decay of the first moment."""
    beta2: OpenFraction = 0.999
    """Decay of the second moment."""
    epsilon: PositiveFloat = 1e-8
    """Added to the denominator."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Clip the gradient to this norm; null: never."""


class AlgorithmSettings(Section):
    """The policy-gradient algorithm of rft. A field left out has the algorithm's own default."""

    name: Literal["grpo", "gspo", "cispo", "dapo", "dr_grpo"] = "grpo"
    """`dapo` and `dr_grpo` are presets of grpo."""
    clip_low: NonNegativeFloat | None = None
    """The ratio is bounded below by 1 - clip_low."""
    clip_high: NonNegativeFloat | None = None
    """The ratio is bounded above by 1 + clip_high."""
    kl_coef: NonNegativeFloat | None = None
    """Weight of the penalty KL(policy || reference); 0 logs `train/ref_kld` all the same."""
    kl_estimator: KLEstimator | None = None
    """Which estimate the penalty is; they differ in their gradients (docs/algorithms.md)."""
    advantage: AdvantageEstimator | None = None
    """How rewards of a group become advantages."""
    normalizer: Normalizer | None = None
    """What the sum over tokens is divided by."""
    reference: Literal["initial", "base"] = "initial"
    """What `ref_kld` is measured against: the policy as the run began, or the base model without adapter."""
    minibatches_per_step: PositiveInt = 1
    """Optimizer updates per pass over a step's rollouts; with 1 (and one epoch) `ppo_kl` is 0 by construction."""
    epochs_per_batch: PositiveInt = 1
    """Passes over a step's rollouts."""
    mismatch_cap: Annotated[float, Field(ge=1.0)] | None = None
    """Cap of the truncated importance weight from sampler to trainer (truncation as in arXiv:1802.01561); null: off."""
    overlong: OverlongHandling | None = None
    """Completions cut at `max_completion_tokens`: train on them, leave them out, or score them `overlong_reward`."""
    overlong_reward: float = 0.0
    """The reward of a cut completion when `overlong: punish`."""


class RolloutSettings(Section):
    """How the policy answers while it learns."""

    group_size: Annotated[int, Field(ge=2)] = 8
    """Completions of each prompt, G; a group of one has nothing to be compared with."""
    max_completion_tokens: PositiveInt = 256
    """Where a completion is cut."""
    temperature: PositiveFloat = 1.0
    """Of sampling, and of every logprob that is logged or trained on."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus; 1 is off. Other values need `algorithm.mismatch_cap`."""
    top_k: NonNegativeInt = 0
    """Only the k likeliest tokens; 0 is off. Other values need `algorithm.mismatch_cap`."""
    min_p: OpenFraction = 0.0
    """Only tokens at least so likely relative to the likeliest; 0 is off. Needs `algorithm.mismatch_cap`."""
    stop: list[str] = Field(default_factory=list)
    """Strings after which a completion ends, besides the model's stop tokens."""
    sampler: Literal["local", "vllm"] = "local"
    """In process, or a vLLM server."""
    vllm_url: str = "http://127.0.0.1:8000"
    """Where the vLLM server listens when `sampler: vllm`."""
    chunk_prompts: PositiveInt = 8
    """Prompts sampled together: the unit of sampling, of the journal and of replay."""
    refill: bool = False
    """Draw further prompts in place of flat groups, until the batch is full."""
    max_refill_rounds: PositiveInt = 4
    """Bound on the extra draws of `refill`."""
    eval_samples: PositiveInt = 4
    """Completions of each held-out prompt, k of pass@k, at the sampling temperature."""
    max_sampler_kl: PositiveFloat = 0.1
    """Budget of `train/sampler_kl`; beyond it the run stops, since the sampler has other weights."""


class RewardSpec(Section):
    """One reward function and its weight."""

    use: str
    """A built-in name, `module:function` or `file.py:function`."""
    weight: float = 1.0
    """Factor in the weighted sum."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the function."""
    label: str | None = None
    """Name in the metrics; the function's name when left out."""

    @property
    def name(self) -> str:
        """What the metrics call it."""
        return self.label or self.use.rsplit(":", 1)[-1]


class RewardLimits(Section):
    """What a reward function may use before it counts as failed."""

    timeout_s: PositiveFloat = 10.0
    """Wall-clock limit of one call."""
    memory_limit_gib: PositiveFloat = 4.0
    """Address space of a reward process on top of what the reward's imports take."""
    num_workers: PositiveInt = 1
    """Reward processes per rank."""
    max_failed_frac: Fraction = 0.1
    """Share of a step's rollouts that may fail before the run stops with the first traceback."""


def _off(value: object) -> object:
    """YAML reads a bare `off` as false."""
    return "off" if value is False else value


def _off_or_on(value: object) -> object:
    """And a bare `on` as true."""
    return "on" if value is True else _off(value)


class LoggingSettings(Section):
    """Where metrics go besides metrics.jsonl."""

    wandb: Annotated[
        Literal["off", "offline", "online"],
        BeforeValidator(_off, json_schema_input_type=Literal["off", "offline", "online"]),
    ] = "off"
    """Mirror of metrics.jsonl in Weights & Biases; losing it never stops a run."""
    wandb_project: str = "tunesmith"
    """Project there."""


class CheckpointSettings(Section):
    """Where checkpoints go besides the run directory."""

    mirror: str | None = None
    """An fsspec address such as `s3://bucket/prefix`; checkpoints are copied there, and fetched where none is local."""


class RecoverySettings(Section):
    """What happens when a machine is taken away, a process dies or hangs, or numbers break."""

    grace_period_s: PositiveFloat = 30.0
    """How long the machine waits between its signal and the kill; when it runs out the worker exits at once."""
    max_restarts: NonNegativeInt = 3
    """Restarts in a row without a new checkpoint before `trainer train` gives up."""
    restart_backoff_s: NonNegativeFloat = 1.0
    """Wait before the first restart; doubled for each further one without progress, up to a minute."""
    hang_timeout_s: PositiveFloat = 1800.0
    """A rank that has not moved for so long is a hang: the stacks of all ranks are logged, then a restart."""
    max_bad_steps: PositiveInt = 3
    """Updates skipped for a loss or gradient that is not finite, before their rows are left out; then the run stops."""
    probe_memory: Annotated[Literal["auto", "on", "off"], BeforeValidator(_off_or_on)] = "auto"
    """Run the longest micro-batch and chunk once before step 1; `auto` does so on GPUs, where it takes seconds."""


class Recipe(Section):
    """One training, from rows to adapter. See docs/recipe.md for every field."""

    name: RunName
    """Names the run directory runs/<name>/ and the W&B run."""
    method: Literal["sft", "rft"]
    """Supervised fine-tuning, or reinforcement fine-tuning from rewards."""
    seed: NonNegativeInt = 0
    """Everything random in step k is a function of (seed, k)."""
    model: ModelSettings
    """The base model: `{path: DIRECTORY_OR_HUB_NAME}`, and how to load it."""
    lora: LoraSettings | None = Field(default_factory=LoraSettings)
    """Adapters; `lora: null` trains every parameter."""
    data: DataSettings
    """The rows: `{train: FILE.jsonl}`, and how they become tokens."""
    rows_per_step: PositiveInt = 16
    """The global batch: rows (sft) or prompts (rft) of one step over all ranks, on any shape."""
    steps: PositiveInt | None = None
    """Length of the run in steps; or give `epochs`."""
    epochs: PositiveFloat | None = None
    """Length of the run in passes over the rows; or give `steps`."""
    optimizer: OptimizerSettings = Field(default_factory=OptimizerSettings)
    """AdamW and its learning rate."""
    algorithm: AlgorithmSettings | None = None
    """rft only: how rewards become updates; grpo when left out."""
    rollout: RolloutSettings | None = None
    """rft only: how completions are drawn."""
    rewards: list[RewardSpec] = Field(default_factory=list)
    """rft only: summed with their weights, each logged."""
    reward_limits: RewardLimits = Field(default_factory=RewardLimits)
    """rft only: when a reward counts as failed, and when the run stops for it."""
    eval_interval: NonNegativeInt = 0
    """Held-out evaluation every so many steps; 0: only before the first and after the last."""
    dcp_save_interval: NonNegativeInt = 0
    """Checkpoint after every so many absolute steps; 0: never, and a kill loses the run."""
    keep_last: PositiveInt = 2
    """Checkpoints kept."""
    keep_every: PositiveInt | None = None
    """Also keep every checkpoint whose step is a multiple of this."""
    checkpoint: CheckpointSettings = Field(default_factory=CheckpointSettings)
    """Copies of checkpoints on other storage."""
    recovery: RecoverySettings = Field(default_factory=RecoverySettings)
    """Preemption, restarts, hangs and numbers that break."""
    shape: str = "auto"
    """A training shape of configs/shapes/, a path to one, or `auto`: the smallest that fits."""
    logging: LoggingSettings = Field(default_factory=LoggingSettings)
    """Mirrors of metrics.jsonl, such as Weights & Biases."""
