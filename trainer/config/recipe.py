"""The recipe that a user writes, as typed data.

Devices are described by the shape, not here. This module does not import torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, TypeAlias, final

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from trainer.config.rft_sections import ENVIRONMENT_REWARD, AlgorithmSettings, RewardLimits, RewardSpec, RolloutSettings
from trainer.config.section import Fraction, OpenFraction, Section

BUILTIN_TEMPLATES: Final = ("chatml", "llama3", "gemma", "zephyr", "hermes")
"""Names that `model.chat_template` takes beside files."""
Role = Literal["system", "developer", "user", "assistant", "tool"]
RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class ModelSettings(Section):
    """The base model."""

    path: str
    """A directory with config.json and safetensors weights, or the name of a Hugging Face hub model."""
    revision: str | None = None
    """Commit of a hub model, required for one. Of a branch or tag, such as `main`, the plan keeps the commit that it is
    then; where that cannot be found out, it stays, with a warning."""
    chat_template: str | None = None
    """A Jinja file, or `chatml`, `llama3`, `gemma`, `zephyr` or `hermes`, that replaces the tokenizer's template."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model. When false, such a model is refused."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of weights and activations in the forward and backward pass. Trained parameters and optimizer state are
    always float32."""
    gradient_checkpointing: bool | Literal["selective"] = False
    """Recompute activations in the backward pass: about one third slower, much less memory. `selective` keeps the
    results of products and attention and recomputes norms, rotary embeddings and activation functions: about half of
    the memory at little cost. It needs compiled layers (`compile_layers`), so a GPU shape without context_parallel."""
    activation_offload: bool = False
    """With `gradient_checkpointing: true` on a GPU, keep the inputs of layers in host memory until the backward pass,
    for sequences that do not fit otherwise. Every layer's input crosses the bus twice in each pass."""
    compile_layers: bool = True
    """On a GPU, compile the decoder layers with torch.compile; the first steps take about a minute longer. Layers with
    experts, 4-bit weights, DoRA or dropout are never compiled."""
    flash_attention: bool = True
    """In compiled layers, compute attention with FlashAttention-4, if the package extra `flash` is installed and its
    kernels pass a test on the GPU. Otherwise, and with `deterministic`, FlexAttention computes it."""
    quantization: Literal["nf4"] | None = None
    """`nf4` stores the linear layers of the base model in 4 bits (QLoRA, arXiv:2305.14314). Requires `lora` and the
    package extra `qlora`."""


class LoraSettings(Section):
    """Low-rank adapters (arXiv:2106.09685), created by PEFT."""

    rank: PositiveInt = 16
    """Inner dimension of each adapter."""
    alpha: PositiveFloat = 32.0
    """The adapter output is multiplied by alpha / rank, or by alpha / sqrt(rank) with `rslora`."""
    dropout: OpenFraction = 0.0
    """Dropout on the adapter input during training. Must be 0 for rft."""
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Names of the modules that get an adapter; `all-linear` selects every linear layer except the LM head."""
    rslora: bool = False
    """Scale the adapter output by alpha / sqrt(rank) (arXiv:2312.03732)."""
    dora: bool = False
    """Train magnitude and direction of the weights separately (DoRA, arXiv:2402.09353); slower."""
    warm_start: str | None = None
    """A trained adapter to initialize from: a directory, or a run as `NAME`, `NAME@best` or `NAME@STEP` (a checkpoint,
    which must be kept until this run has ended). This starts a new run; it does not resume one."""


class DataSource(Section):
    """Where rows are read from: files, a hub data set if no file of the path exists, or several sources."""

    path: str | None = None
    """A file (.jsonl, .json, .jsonl.gz, .jsonl.zst, .csv, .parquet), a directory or a glob. If it exists, it takes
    precedence over `hub`."""
    hub: str | None = None
    """Name of a Hugging Face data set, or a local directory that `datasets.load_dataset` can read."""
    config: str | None = None
    """Configuration (subset) of the data set."""
    split: str = "train"
    """Split of the data set."""
    revision: str | None = None
    """Commit of the data set; without one its rows may change between attempts."""
    repeat: PositiveFloat = 1.0
    """In a list of sources: how often each row counts in an epoch; 0.5 takes every second row."""
    sources: list[DataSource] = Field(default_factory=list)
    """Several sources as one; `train: [a.jsonl, {path: b.parquet, repeat: 2}]` is short for it."""
    eval_frac: OpenFraction | None = None
    """Set by `data.eval_frac`."""
    part: Literal["train", "eval"] = "train"
    """Set by `data.eval_frac`: which part of the rows."""


def _path_to_source(value: object) -> object:
    """Accept `FILE` as short for `{path: FILE}`, and a list as several sources."""
    if isinstance(value, list):
        return {"sources": [_path_to_source(each) for each in value]}
    return {"path": value} if isinstance(value, str) else value


RowSource = Annotated[
    DataSource,
    BeforeValidator(_path_to_source, json_schema_input_type=str | DataSource | list[str | DataSource]),
]


class DataSettings(Section):
    """Training and held-out rows, and how rows are tokenized."""

    train: RowSource
    """Rows to train on: a path, `{path, hub, config, split, revision}`, or a list of them."""
    eval: RowSource | None = None
    """Held-out rows for evaluation; never trained on."""
    eval_frac: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Instead of `eval`: hold out about this share of `train`, chosen by the content of each row."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Maps expected field names to the names used in the file, for example `{prompt: question, completion: answer}`."""
    ignore: list[str] = Field(default_factory=list)
    """Fields of rows and of messages to ignore, for example `[history]`. Text that is not used is refused otherwise."""
    system: str | None = None
    """A system message for rows that have none."""
    format: Literal["chat", "text"] = "chat"
    """`chat` renders rows with the chat template; `text` concatenates prompt, completion and stop token unchanged."""
    train_on: Literal["all", "last"] | Annotated[list[Role], Field(min_length=1)] = "all"
    """sft: which turns are trained: `all` assistant turns, the `last` one, or the turns of a list of roles."""
    allow_special_tokens: bool = False
    """Encode control tokens written in the text of a row, such as `<|im_end|>`, as control tokens."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further variables of the chat template, such as `{enable_thinking: false}`; serve the model with the same."""
    template_date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")] = "2026-01-01"
    """The date (YYYY-MM-DD) that a chat template which reads the clock sees, so that a recipe always gives the same
    tokens."""
    max_seq_tokens: PositiveInt = 2048
    """Maximum length of a row in tokens, prompt and completion together."""
    overlong: Literal["error", "drop", "truncate"] = "error"
    """What to do with longer rows. Their number is always reported."""
    eval_rows: PositiveInt | None = None
    """Evaluate only on the first `eval_rows` held-out rows."""

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


OptimizerName = Literal["adamw", "adamw_8bit"]


class OptimizerSettings(Section):
    """AdamW (arXiv:1711.05101) and its learning-rate schedule."""

    name: OptimizerName = "adamw"
    """`adamw_8bit` keeps both moments in 8 bits (arXiv:2110.02861): 2 bytes a trained parameter instead of 8. Other
    numbers than `adamw`. Requires the package extra `qlora`; not for sharded full-parameter training."""
    learning_rate: PositiveFloat = 2e-4
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate changes after warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Number of steps over which the learning rate rises linearly from 0 to its peak."""
    min_learning_rate_frac: Fraction = 0.0
    """Final learning rate of `linear` and `cosine`, as a fraction of the peak."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    beta1: OpenFraction = 0.9
    """Decay rate of the first moment."""
    beta2: OpenFraction = 0.999
    """Decay rate of the second moment."""
    epsilon: PositiveFloat = 1e-8
    """Added to the denominator of the update for numerical stability."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Clip the gradient to this norm; null disables clipping."""


def _off(value: object) -> object:
    """Accept an unquoted `off`, which YAML reads as false."""
    return "off" if value is False else value


def _off_or_on(value: object) -> object:
    """Accept unquoted `on` and `off`, which YAML reads as true and false."""
    return "on" if value is True else _off(value)


def _null_to_defaults(value: object) -> object:
    """Accept `rollout: null` as a section without fields."""
    return {} if value is None else value


class LoggingSettings(Section):
    """What is recorded beside metrics.jsonl, and where metrics are sent."""

    answers: NonNegativeInt = 4
    """sft only: answer this many held-out rows (training rows where there are none) before the first and after the last
    step, for the report; 0 answers none. Metrics and weights do not depend on it. rft records all held-out answers."""
    wandb: Annotated[
        Literal["off", "offline", "online"],
        BeforeValidator(_off, json_schema_input_type=Literal["off", "offline", "online"]),
    ] = "off"
    """Copy metrics to Weights & Biases. A failure there never stops the run."""
    wandb_project: str = "tunesmith"
    """Project of Weights & Biases and trackio; experiment of MLflow."""
    tensorboard: bool = False
    """Copy metrics to RUN/tensorboard; needs the extra `tensorboard`. A failure there never stops the run."""
    trackio: bool = False
    """Copy metrics to trackio's local database; needs the extra `trackio`. A failure there never stops the run."""
    mlflow: str | None = None
    """Copy metrics to this MLflow tracking URI, such as `http://host:5000` or `sqlite:///mlflow.db`; needs the extra
    `mlflow`. A failure there never stops the run."""


class CheckpointSettings(Section):
    """Where checkpoints are copied in addition to the run directory."""

    mirror: str | None = None
    """An fsspec URL such as `s3://bucket/prefix`. Checkpoints are uploaded there, and downloaded if none is local."""


class RecoverySettings(Section):
    """Handling of preemption, crashes, hangs and non-finite values."""

    grace_period_s: PositiveFloat = 30.0
    """Time between the termination signal and the kill. When it is used up, the worker exits immediately."""
    max_restarts: NonNegativeInt = 3
    """Consecutive restarts without a new checkpoint after which `trainer train`, or a Slurm job of several nodes, gives
    up."""
    restart_backoff_s: NonNegativeFloat = 1.0
    """Wait before the first restart. Doubles with each further restart without progress, up to one minute."""
    hang_timeout_s: PositiveFloat = 1800.0
    """A rank without progress for this long is considered hung: all ranks log their stacks and the run restarts."""
    max_bad_steps: PositiveInt = 3
    """Updates with a non-finite loss or gradient are skipped. After this many, the run returns to the last checkpoint
    without the affected rows, once; if it happens again, the run stops."""
    probe_memory: Annotated[Literal["auto", "on", "off"], BeforeValidator(_off_or_on)] = "auto"
    """Run the largest micro-batch and sampling chunk once before step 1, to detect out-of-memory early. `auto` does
    this on GPUs, where it takes seconds."""


class RecipeBase(Section):
    """What the recipes of both methods have in common."""

    name: RunName
    """Name of the run: the run directory is runs/<name>/."""
    method: Literal["sft", "rft"]
    """`sft` is supervised fine-tuning; `rft` is reinforcement fine-tuning from rewards."""
    seed: NonNegativeInt = 0
    """Random seed. All randomness in step k is a function of (seed, k)."""
    deterministic: bool = False
    """On a GPU, use deterministic kernels only, so that a resumed run has equal bits; slower. A CPU needs no switch."""
    model: ModelSettings
    """The base model: `{path: DIRECTORY_OR_HUB_NAME}`, and how to load it."""
    lora: LoraSettings | None = Field(default_factory=LoraSettings)
    """Adapters; `lora: null` trains every parameter."""
    data: DataSettings
    """The rows: `{train: FILE.jsonl}`, and how they are tokenized."""
    rows_per_step: PositiveInt = 16
    """Global batch size: rows (sft) or prompts (rft) per step over all ranks. Independent of the shape."""
    steps: PositiveInt | None = None
    """Length of the run in steps. Give either `steps` or `epochs`."""
    epochs: PositiveFloat | None = None
    """Length of the run in passes over the rows. Give either `steps` or `epochs`."""
    optimizer: OptimizerSettings = Field(default_factory=OptimizerSettings)
    """AdamW and its learning rate."""
    eval_interval: NonNegativeInt = 0
    """Evaluate on held-out rows every `eval_interval` steps; 0 evaluates only before the first and after the last."""
    dcp_save_interval: NonNegativeInt = 0
    """Save a checkpoint every `dcp_save_interval` steps; 0 saves none, and a killed run starts over."""
    keep_last: PositiveInt = 2
    """Number of most recent checkpoints to keep."""
    keep_every: PositiveInt | None = None
    """Also keep every checkpoint whose step is a multiple of this."""
    checkpoint: CheckpointSettings = Field(default_factory=CheckpointSettings)
    """Copies of checkpoints on other storage."""
    recovery: RecoverySettings = Field(default_factory=RecoverySettings)
    """What to do after preemption, crashes, hangs and non-finite values."""
    shape: str = "auto"
    """Name of a training shape (`trainer shapes`), path of a shape file, or `auto`: the smallest that fits, of this
    machine's GPUs if it has any (docs/machine.md)."""
    logging: LoggingSettings = Field(default_factory=LoggingSettings)
    """Copies of the metrics, for example to Weights & Biases."""


@final
class RFTRecipe(RecipeBase):
    """Reinforcement fine-tuning: sample completions, score them with rewards, train by policy gradient."""

    method: Literal["rft"]
    """`rft` is reinforcement fine-tuning from rewards."""
    algorithm: Annotated[AlgorithmSettings, BeforeValidator(_null_to_defaults)] = Field(
        default_factory=AlgorithmSettings
    )
    """rft only: the policy-gradient algorithm; `grpo` by default."""
    rollout: Annotated[RolloutSettings, BeforeValidator(_null_to_defaults)] = Field(default_factory=RolloutSettings)
    """rft only: how completions are sampled."""
    rewards: list[RewardSpec] = Field(default_factory=list)
    """rft only, at least one: reward functions. Their weighted sum is the reward; each is logged."""
    reward_column: str | None = None
    """rft only: field of the rows that names the rewards which judge the row: a name, or a list of names. By default
    every reward judges every row."""
    reward_limits: RewardLimits = Field(default_factory=RewardLimits)
    """rft only: time and memory limits of rewards, and how many may fail."""

    @property
    def reward_functions(self) -> list[RewardSpec]:
        """The rewards without that of the environment."""
        return [reward for reward in self.rewards if reward.use != ENVIRONMENT_REWARD]


RFT_FIELDS: Final = frozenset(RFTRecipe.model_fields) - frozenset(RecipeBase.model_fields)


@final
class SFTRecipe(RecipeBase):
    """Supervised fine-tuning: train on the completions in the rows."""

    method: Literal["sft"]
    """`sft` is supervised fine-tuning."""

    @model_validator(mode="before")
    @classmethod
    def _drop_empty_rft_fields(cls, data: object) -> object:
        """Accept `rollout: null` or `rewards: []`, which ask for nothing; other rft fields are refused."""
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if name not in RFT_FIELDS or value not in (None, [])}


Recipe: TypeAlias = Annotated[SFTRecipe | RFTRecipe, Field(discriminator="method")]
"""A recipe of either method."""
