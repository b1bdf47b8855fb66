"""The journal of rollouts: one file per chunk, written and replayed as a whole. No torch.

Format 3 has the token ids of each prompt once, and logprobs as decimals of float32 where they are such numbers.
"""

from __future__ import annotations

import gzip
import json
import shutil
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, final

from trainer.files import make_directory, write_atomically
from trainer.run.conversation_record import (
    conversation_record,
    drawn_tokens,
    read_conversation_record,
    read_sequence,
    sequence_record,
    shared_prompts,
    with_shared_ids,
)
from trainer.run.directory import RunDir
from trainer.types import Group, Rollout, Row

FORMAT: Final = 3
READ_FORMATS: Final = (1, 2, FORMAT)
"""Format 1 has no prompts, format 2 the token ids of the prompt in every rollout."""
FIELD_CHARS: Final = 2000
"""A longer field of a row is kept as the first characters of its JSON."""


@final
@dataclass(frozen=True)
class ChunkHeader:
    """What a chunk was drawn for; only an equal header is replayed.

    On disk, for two rows on one rank in a run of 15 steps:

        {"format": 3, "step": 3, "rows": [4, 7], "group_size": 8, "world_size": 1, "length": [15, null]}
    """

    step: int
    """Step that trains on the rollouts, from 0."""
    rows: tuple[int, ...]
    """Row index of each group; a row that comes twice in a step is listed twice."""
    group_size: int
    world_size: int
    """Chunks are dealt to ranks, so another number of ranks may sample with other batches and get other bits."""
    length: tuple[int | None, float | None]
    """`steps` and `epochs`. A resume may change them, and with them the learning rates and so the weights that draw."""
    environment: Mapping[str, str] | None = None
    """Digests of the files of environment and tools; None, and not on disk, without them."""

    def record(self) -> dict[str, Any]:
        """The first line of the file."""
        fields = asdict(self) | {"rows": list(self.rows), "length": list(self.length)}
        if self.environment is None:
            del fields["environment"]
        return {"format": FORMAT, **fields}


@final
@dataclass(frozen=True)
class JournalPrompt:
    """What the policy was asked, for people: a replay does not read it.

    On disk, once per chunk for each row, after the header:

        {"row": 4, "where": "sums.jsonl:5", "prompt": [{"role": "user", "content": "2+2?"}], "fields": {"answer": "4"}}
    """

    row: int
    where: str
    """Source of the row, file:line."""
    messages: tuple[Mapping[str, Any], ...]
    fields: Mapping[str, Any]
    """The other fields of the row, which its rewards read: the gold answer."""

    def record(self) -> dict[str, Any]:
        """The line of the prompt."""
        fields = {name: _shortened(value) for name, value in self.fields.items()}
        return {"row": self.row, "where": self.where, "prompt": list(self.messages), "fields": fields}


@final
@dataclass(frozen=True)
class RecordedGroup:
    """A group as it is on disk, for people."""

    rollouts: list[dict[str, Any]]
    prompt: dict[str, Any] | None
    """`JournalPrompt.record()`; None in chunks of format 1."""


def write_chunk(
    run: RunDir, number: int, header: ChunkHeader, groups: Sequence[Group], prompts: Sequence[JournalPrompt] = ()
) -> None:
    """Write one chunk, atomically.

    Args:
        run: the run directory.
        number: index of the chunk in its step.
        header: what a replay must find equal.
        groups: the chunk's groups, with rewards and advantages.
        prompts: of the groups; of a row that comes twice the first is written.
    """
    records = [prompt.record() for prompt in {each.row: each for each in reversed(prompts)}.values()][::-1]
    shared = shared_prompts(groups)
    records += [{"row": row, "shared_ids": ids} for row, ids in shared.items()]
    records += [
        _record(group.row, rollout, len(shared[group.row.index])) for group in groups for rollout in group.rollouts
    ]
    lines = map(json_line, [header.record(), *records, {"end": len(records)}])
    file = run.journal_chunk(header.step, number)
    make_directory(file.parent)
    write_atomically(file, "".join(lines))


def note_begun(run: RunDir, step: int, number: int) -> None:
    """Record that sampling of a chunk begins; `count_sampled` counts the chunks that began more than once.

    Args:
        run: the run directory.
        step: step that trains on the chunk, from 0.
        number: index of the chunk in its step.
    """
    make_directory(run.rollouts)
    with run.begun_file.open("a") as file:
        file.write(json.dumps({"step": step, "chunk": number}) + "\n")


def count_sampled(run: RunDir) -> tuple[int, int]:
    """Drawn tokens in the journal, and drawn tokens sampled again after an interruption.

    An interrupted chunk counts as if it had been sampled completely, so the second number is an upper bound.
    """
    begun: Counter[tuple[int, int]] = Counter()
    pruned: dict[tuple[int, int], int] = {}
    with suppress(FileNotFoundError):
        for line in run.begun_file.read_text().splitlines():
            with suppress(ValueError, KeyError):  # a line cut off by a kill
                record = json.loads(line)
                place = record["step"], record["chunk"]
                if "pruned_tokens" in record:
                    pruned[place] = record["pruned_tokens"]
                else:
                    begun[place] += 1
    total = repeated = 0
    for (step, number), times in begun.items():
        tokens = _num_drawn(run.journal_chunk(step, number)) or pruned.get((step, number), 0)
        total += tokens
        repeated += tokens * (times - 1)
    return total, repeated


def note_pruned(run: RunDir, step: int) -> None:
    """Record how many tokens a step has before its chunks are removed; `count_sampled` still counts them."""
    with run.begun_file.open("a") as file:
        for chunk in run.journal_chunks(step):
            number = int(chunk.name.removeprefix("chunk-").partition(".")[0])
            file.write(json.dumps({"step": step, "chunk": number, "pruned_tokens": _num_drawn(chunk)}) + "\n")


def _num_drawn(chunk: Path) -> int:
    records = _complete(chunk)
    rollouts = [each for group in _by_group(records) for each in group.rollouts] if records else []
    return sum(map(drawn_tokens, rollouts))


def read_chunk(run: RunDir, number: int, header: ChunkHeader, rows: Sequence[Row]) -> list[Group] | None:
    """Read one chunk back; None if it is missing, truncated, or was written with another header.

    Args:
        run: the run directory.
        number: index of the chunk in its step.
        header: as the chunk would be written now.
        rows: the chunk's rows, in the order of `header.rows`.
    """
    records = _complete(run.journal_chunk(header.step, number))
    if records is None or not any(records[0] == header.record() | {"format": known} for known in READ_FORMATS):
        return None
    groups = [group.rollouts for group in _by_group(records)]
    if [of_group[0]["row"] for of_group in groups] != [row.index for row in rows]:
        return None
    return [Group(row, tuple(map(_rollout, of_group))) for row, of_group in zip(rows, groups, strict=True)]


def read_step(run: RunDir, step: int, *, refused: bool = False) -> list[RecordedGroup]:
    """The groups of a step, as on disk; empty if the step has none.

    Args:
        run: the run directory.
        step: step that trains on the rollouts, from 0.
        refused: read those that were set aside, because too many had no reward.
    """
    chunks = [_complete(file) for file in run.journal_chunks(step, refused=refused)]
    return [group for records in chunks if records is not None for group in _by_group(records)]


def set_aside(run: RunDir, step: int) -> Path:
    """Rename a step's chunk directory so that it is not replayed; returns the new path."""
    directory, aside = run.journal(step), run.journal(step, refused=True)
    shutil.rmtree(aside, ignore_errors=True)
    directory.rename(aside)
    return aside


def json_line(record: Mapping[str, Any]) -> str:
    """Readable JSON with a line end; a lone surrogate, which UTF-8 cannot encode, becomes its JSON escape."""
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace").decode() + "\n"


def _complete(file: Path) -> list[dict[str, Any]] | None:
    """The records of a chunk, header first and end marker last; None if it is missing or truncated."""
    try:
        # not splitlines(): texts contain U+2028 and the like, which do not end a line of JSON
        records = [json.loads(line) for line in _text(file).split("\n")[:-1]]
    except (FileNotFoundError, ValueError, EOFError, gzip.BadGzipFile, zlib.error):
        return None
    return records if len(records) > 1 and records[-1] == {"end": len(records) - 2} else None


def _text(file: Path) -> str:
    """The text of a chunk; of a plain one that has been compressed, meanwhile or before, that of the other."""
    plain = file.with_name(file.name.removesuffix(".gz"))
    try:
        return plain.read_text(encoding="utf-8")
    except FileNotFoundError:
        return gzip.decompress(plain.with_name(f"{plain.name}.gz").read_bytes()).decode("utf-8")


def _by_group(records: list[dict[str, Any]]) -> list[RecordedGroup]:
    """Rollout records group by group; a row may have several groups, and all groups of a chunk have one size."""
    header, *lines, _end = records
    prompts = {record["row"]: record for record in lines if "prompt" in record}
    shared = {record["row"]: record["shared_ids"] for record in lines if "shared_ids" in record}
    rollouts = [
        with_shared_ids(record, shared.get(record["row"], ()))
        for record in lines
        if "prompt" not in record and "shared_ids" not in record
    ]
    size = len(rollouts) // len(header["rows"])
    groups = [rollouts[begin : begin + size] for begin in range(0, len(rollouts), size)]
    return [RecordedGroup(of_group, prompts.get(of_group[0]["row"])) for of_group in groups]


def _shortened(value: Any) -> Any:
    text = json.dumps(value, ensure_ascii=False, default=str)
    if len(text) > FIELD_CHARS:
        return text[:FIELD_CHARS] + "..."
    return json.loads(text)


def _record(row: Row, rollout: Rollout, num_shared: int) -> dict[str, Any]:
    """The line of a rollout, without its first `num_shared` token ids."""
    return {
        "row": row.index,
        "where": str(row),
        "advantage": rollout.advantage,
        **sequence_record(rollout.sequences[0], num_shared),
        "finish_reason": rollout.finish_reason,
        "policy_version": rollout.policy_version,
        "text": rollout.text,
        "reward": rollout.reward,
        "rewards": rollout.rewards,
        "failure": rollout.failure,
        **({"conversation": conversation_record(rollout.conversation)} if rollout.conversation is not None else {}),
    }


def _rollout(record: Mapping[str, Any]) -> Rollout:
    first, conversation = read_sequence(record), record.get("conversation")
    return Rollout(
        token_ids=first.token_ids,
        loss_mask=first.loss_mask,
        sampler_logprobs=first.sampler_logprobs,
        finish_reason=record["finish_reason"],
        policy_version=record["policy_version"],
        text=record["text"],
        reward=record["reward"],
        rewards=record["rewards"],
        failure=record["failure"],
        advantage=record["advantage"],
        conversation=read_conversation_record(conversation) if conversation is not None else None,
    )
