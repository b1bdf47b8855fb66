"""The reward interface, and loading a reward by its name.

A reward takes the completion's text and the row, and returns a number, a `Score` or None, which abstains:

    def last_number(completion: str, row: Row) -> float: ...

A group reward compares the completions of one prompt, and is recognized by its first parameter `group`:

    def shortest(group: Sequence[str], row: Row) -> list[float]: ...

TRL's batch form `(prompts, completions, **columns) -> list` is accepted unchanged and recognized by its parameter
`completions`. Functions are loaded only in reward workers (`trainer.rewards.worker`): importing them may be slow, or
hang.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Literal, TypeAlias, final

from trainer.config.reward_place import JUDGE_NAMES, Place, importable, locate
from trainer.errors import RewardError
from trainer.types import Row

TIME_LIMIT: Final = "TRAINER_REWARD_TIMEOUT_S"
"""Environment variable of a reward worker: seconds that one call may take before it counts as failed."""

__all__ = ["TIME_LIMIT", "LoadedReward", "Reward", "Score", "UnscoredBatchError", "importable", "load_reward"]


@final
@dataclass(frozen=True)
class Score:
    """A reward and its parts, which are logged as `name/part`.

    >>> Score(0.75, {"right": 1.0, "format": 0.5}).parts["format"]
    0.5
    """

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)


Reward: TypeAlias = Callable[[str, Row], "float | Score | None"]
GroupReward: TypeAlias = Callable[[Sequence[str], Row], "Sequence[float | Score | None]"]
Form: TypeAlias = Literal["single", "batch", "group"]
"""What one call scores: a completion, all that were submitted together, or all of one prompt."""


class UnscoredBatchError(Exception):
    """Raised by a batch reward if no completion caused its failure, so that the batch is not bisected."""


@final
@dataclass(frozen=True)
class LoadedReward:
    """A reward function, its fixed arguments, and the columns it takes."""

    function: Callable[..., Any]
    args: Mapping[str, Any]
    is_batch: bool
    """Whether it has TRL's form `(prompts, completions, **columns)`."""
    is_group: bool = False
    """Whether it has the form `(group, row)` and scores all completions of a prompt at once."""
    takes_all: bool = False
    """Whether a batch function takes every column, as `**kwargs`."""
    names: frozenset[str] = frozenset()
    """Parameters of a batch function."""
    required: tuple[str, ...] = ()
    """Row fields that a batch function requires, in the order of its signature."""

    @property
    def form(self) -> Form:
        """What one call of it scores."""
        return "batch" if self.is_batch else "group" if self.is_group else "single"

    def takes(self, name: str) -> bool:
        """Whether a batch function takes this column."""
        return (self.takes_all or name in self.names) and name not in self.args


def load_reward(use: str, args: Mapping[str, Any], base_dir: Path) -> LoadedReward:
    """Import the function that `use` names and bind `args` to it.

    Args:
        use: a built-in name, `module:function`, or `file.py:function` relative to `base_dir`.
        args: keyword arguments of every call.
        base_dir: the recipe's directory, which is also on the import path.

    Raises:
        RewardError: the name cannot be found or imported, or the signature does not fit.
    """
    if use in JUDGE_NAMES:
        raise RewardError(f"reward {use}: is computed by a server, not in a reward worker")
    function = load_object(use, base_dir, kind="reward")
    if not callable(function):
        name = locate(use, base_dir).function
        raise RewardError(f"reward {use}: `{name}` is a {type(function).__name__}, not a function")
    return _bind(function, args, use)


def load_object(use: str, base_dir: Path, *, kind: str) -> Any:
    """Import what `use` names.

    Args:
        use: a built-in name, `module:name`, or `file.py:name` relative to `base_dir`.
        base_dir: the recipe's directory, which is also on the import path.
        kind: what it is to be, for messages, such as "reward".

    Raises:
        RewardError: it cannot be found or imported.
    """
    place = locate(use, base_dir)
    module = _import(place, f"{kind} {use}", base_dir)
    try:
        return getattr(module, place.function)
    except AttributeError:
        near = difflib.get_close_matches(place.function, dir(module), n=1)
        meant = f"; did you mean `{near[0]}`?" if near else ""
        wanted = "class" if kind == "environment" else "function"
        raise RewardError(f"{kind} {use}: {place} has no {wanted} `{place.function}`{meant}") from None


def _import(place: Place, what: str, base_dir: Path) -> ModuleType:
    """Import the module or the file; an exception becomes one line with file and line."""
    for directory in (base_dir, place.file.parent if place.file else base_dir):
        if str(directory.resolve()) not in sys.path:
            sys.path.append(str(directory.resolve()))  # last, so that nothing there shadows a library
    try:
        if place.file is None:
            return importlib.import_module(place.module)
        spec = importlib.util.spec_from_file_location(place.module, place.file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[place.module] = module  # dataclasses look up their module there
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        remedy = {"math_verify": 'pip install "tunesmith[math]"'}.get(error.name or "", f"pip install {error.name}")
        raise RewardError(f"{what}: {error}{_source(error, place)}\nInstall it: {remedy}") from error
    except Exception as error:
        problem = f"{type(error).__name__}: {error}{_source(error, place)}"
        raise RewardError(f"{what}: importing {place} fails: {problem}") from error
    return module


def _source(error: Exception, place: Place) -> str:
    """File and line of the user's code at which an import failed, or an empty string."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(place.file)]
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def _bind(function: Callable[..., Any], args: Mapping[str, Any], use: str) -> LoadedReward:
    """Recognize the form of the function and check `args` against its signature."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:
        raise RewardError(f"reward {use}: has no signature to check; wrap it in a function of your own") from None
    is_batch = "completions" in parameters
    reserved = ("prompts", "completions") if is_batch else tuple(parameters)[:2]
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    by_name = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [name for name, parameter in parameters.items() if name not in reserved and parameter.kind in by_name]
    for name in args:
        if name not in names and (name in reserved or not takes_all):
            near = difflib.get_close_matches(name, names, n=1)
            meant = f"; did you mean `{near[0]}`?" if near else ""
            takes = ", ".join(f"`{each}`" for each in names) or "none"
            raise RewardError(f"reward {use}: args.{name}: unknown argument{meant} (it takes {takes})")
    required = tuple(n for n in names if parameters[n].default is inspect.Parameter.empty and n not in args)
    if is_batch:
        if "completion_ids" in required:
            raise RewardError(f"reward {use}: wants token ids, but a reward gets text; for lengths use `soft_overlong`")
        accepted = frozenset(parameters)
        return LoadedReward(function, args, True, takes_all=takes_all, names=accepted, required=required)
    try:
        inspect.signature(function).bind("", Row({}), **{**args, **dict.fromkeys(required)})
    except TypeError:
        raise RewardError(
            f"reward {use}: takes ({', '.join(parameters)}), "
            "which is neither `(completion, row)`, `(group, row)` nor `(prompts, completions, **columns)`"
        ) from None
    if required:
        wanted = ", ".join(f"{name}: ..." for name in required)
        raise RewardError(f"reward {use}: arguments are missing; give `args: {{{wanted}}}`")
    return LoadedReward(function, args, False, is_group=next(iter(parameters)) == "group")
