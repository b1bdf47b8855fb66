"""The protobuf messages of the training protocol: requests to read, results to write. No torch.

The messages are declared here by their field numbers, which is all that the wire has. Unknown fields are skipped, as
protobuf does; everything else that is not what the protocol says is refused with its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, final

import numpy as np

from trainer.api.datum import Array, Datum
from trainer.errors import DataError, UserError

STRING, BYTES, INT32, INT64, BOOL, DOUBLE, UINT32, ENUM = 9, 12, 5, 3, 8, 1, 13, 14
"""Types of fields, as protobuf numbers them. Enumerations are read as int32: the same on the wire."""
FLOAT32, INTEGER64, INTEGER32, BFLOAT16 = 1, 2, 3, 4
"""Types of tensors on the wire."""
MESSAGES: Final[Mapping[str, Sequence[tuple[int, str, int | str, bool]]]] = {
    # number, name, type or message, repeated
    "Sparse": ((1, "values", BYTES, False), (2, "crow", BYTES, False), (3, "col", BYTES, False)),
    "Tensor": (
        (1, "dense", BYTES, False),
        (2, "sparse", "Sparse", False),
        (3, "dtype", INT32, False),
        (4, "shape", INT64, True),
    ),
    "TensorEntry": ((1, "key", STRING, False), (2, "value", "Tensor", False)),
    "Text": ((1, "tokens", BYTES, False),),
    "Other": (),
    "Chunk": ((1, "text", "Text", False), (2, "image", "Other", False), (3, "audio", "Other", False)),
    "Datum": ((1, "input", "Chunk", True), (2, "inputs", "TensorEntry", True)),
    "NumberEntry": ((1, "key", STRING, False), (2, "value", DOUBLE, False)),
    "Setting": ((1, "number", DOUBLE, False), (2, "text", STRING, False)),
    "SettingEntry": ((1, "key", STRING, False), (2, "value", "Setting", False)),
    "PassHead": ((1, "model_id", STRING, False), (2, "seq_id", INT32, False)),
    "PassRequest": (
        (1, "model_id", STRING, False),
        (2, "seq_id", INT32, False),
        (3, "data", "Datum", True),
        (4, "loss_fn", STRING, False),
        (5, "numbers", "NumberEntry", True),
        (6, "forward_only", BOOL, False),
        (7, "settings", "SettingEntry", True),
    ),
    "Batched": (
        (1, "data", BYTES, False),
        (2, "offsets", BYTES, False),
        (3, "dtype", INT32, False),
        (4, "trailing_shape", INT64, True),
    ),
    "BatchedEntry": ((1, "key", STRING, False), (2, "value", "Batched", False)),
    "Record": ((1, "type", STRING, False), (2, "fields", "BatchedEntry", True), (3, "num_datums", INT64, False)),
    "PassResult": ((1, "type", STRING, False), (2, "outputs", "Record", True), (3, "metrics", "NumberEntry", True)),
    "Top": (
        (1, "token_ids", BYTES, False),
        (2, "logprobs", BYTES, False),
        (3, "k", UINT32, False),
        (4, "length", UINT32, False),
    ),
    "Sequence": (
        (1, "stop_reason", INT32, False),
        (2, "tokens", BYTES, False),
        (3, "logprobs", BYTES, False),
        (4, "top", "Top", False),
    ),
    "SampleResult": (
        (1, "sequences", "Sequence", True),
        (2, "prompt_logprobs", BYTES, False),
        (3, "top_prompt", "Top", False),
        (4, "cached_tokens", INT32, False),
    ),
}
OUTPUT_TYPE: Final = "ArrayRecord"


@final
@dataclass(frozen=True)
class PassRequest:
    """A request for `forward` or `forward_backward`."""

    model_id: str
    seq_id: int
    data: tuple[Datum, ...]
    loss: str
    config: Mapping[str, float | str]
    backward: bool


def read_pass(body: bytes) -> PassRequest:
    """Decode a request.

    Raises:
        DataError: it is malformed, or has what is not supported; the message names the datum.
        UserError: the extra `training` is not installed.
    """
    message = _parsed("PassRequest", body)
    if not message.model_id or message.seq_id < 1:
        raise DataError("the request has no model_id, or no seq_id above 0")
    config: dict[str, float | str] = {entry.key: entry.value for entry in message.numbers}
    for entry in message.settings:
        config[entry.key] = entry.value.text if entry.value.HasField("text") else entry.value.number
    data = tuple(_datum(index, each) for index, each in enumerate(message.data))
    return PassRequest(message.model_id, message.seq_id, data, message.loss_fn, config, not message.forward_only)


def read_pass_head(body: bytes) -> tuple[str, int]:
    """Model and number of a request; its data are not looked at.

    Raises:
        DataError: it is malformed.
    """
    message = _parsed("PassHead", body)
    if not message.model_id or message.seq_id < 1:
        raise DataError("the request has no model_id, or no seq_id above 0")
    return message.model_id, message.seq_id


def count_tokens(body: bytes) -> int:
    """Tokens that the model reads in a request's data; 0 where the request is malformed, which its result will say."""
    try:
        message = _parsed("PassRequest", body)
    except DataError:
        return 0
    return sum(len(chunk.text.tokens) for datum in message.data for chunk in datum.input) // 4


def write_pass(outputs: Mapping[str, Sequence[Array]], metrics: Mapping[str, float]) -> bytes:
    """Encode a result.

    Args:
        outputs: [T] float32 of each datum, by name.
        metrics: of the request.
    """
    result = _classes()["PassResult"](type=OUTPUT_TYPE)
    record = result.outputs.add(type=OUTPUT_TYPE, num_datums=len(next(iter(outputs.values()))))
    for name, arrays in outputs.items():
        sizes = np.cumsum([0, *(4 * len(array) for array in arrays)], dtype=np.int64)
        data = np.concatenate(arrays).astype(np.float32, copy=False).tobytes()
        record.fields.add(key=name).value.MergeFrom(
            _classes()["Batched"](data=data, offsets=sizes.tobytes(), dtype=FLOAT32)
        )
    for name, value in metrics.items():
        result.metrics.add(key=name, value=value)
    encoded: bytes = result.SerializeToString()
    return encoded


@final
@dataclass(frozen=True)
class Drawn:
    """A sequence that was sampled."""

    tokens: Sequence[int]
    logprobs: Sequence[float]
    is_stopped: bool
    """By a stop token or string, not by its length."""
    top: Sequence[Sequence[tuple[int, float]]] = ()
    """Likeliest alternatives of each token, where they were asked for."""


def write_samples(
    drawn: Iterable[Drawn],
    *,
    prompt_logprobs: Sequence[float | None] | None = None,
    top_prompt: Sequence[Sequence[tuple[int, float]]] | None = None,
    cached_tokens: int = 0,
) -> bytes:
    """Encode the result of a sample request.

    Args:
        drawn: its sequences.
        prompt_logprobs: of each token of the prompt; None of the first one.
        top_prompt: likeliest tokens at each position of the prompt.
        cached_tokens: of the prompt that were not computed again.
    """
    result = _classes()["SampleResult"](cached_tokens=cached_tokens)
    for each in drawn:
        added = result.sequences.add(stop_reason=0 if each.is_stopped else 1)
        added.tokens = np.asarray(each.tokens, dtype=np.int32).tobytes()
        added.logprobs = np.asarray(each.logprobs, dtype=np.float32).tobytes()
        if each.top:
            added.top.MergeFrom(_top(each.top))
    if prompt_logprobs is not None:
        values = [float("nan") if value is None else value for value in prompt_logprobs]
        result.prompt_logprobs = np.asarray(values, dtype=np.float32).tobytes()
    if top_prompt is not None:
        result.top_prompt.MergeFrom(_top(top_prompt))
    encoded: bytes = result.SerializeToString()
    return encoded


def _top(rows: Sequence[Sequence[tuple[int, float]]]) -> Any:
    """[N, K] ids and log-probabilities; cells without one have id 0 and -99999."""
    width = max((len(row) for row in rows), default=0)
    ids, logprobs = np.zeros((len(rows), width), np.int32), np.full((len(rows), width), -99999.0, np.float32)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = [token for token, _ in row]
        logprobs[index, : len(row)] = [logprob for _, logprob in row]
    return _classes()["Top"](token_ids=ids.tobytes(), logprobs=logprobs.tobytes(), k=width, length=len(rows))


def _datum(index: int, message: Any) -> Datum:
    where, tokens = f"datum {index}", []
    for chunk in message.input:
        if chunk.HasField("image") or chunk.HasField("audio"):
            raise DataError(f"{where}: model_input has images or audio; this server trains on text")
        tokens += _numbers(f"{where}: model_input", chunk.text.tokens, np.dtype("<i4")).tolist()
    inputs = {entry.key: _tensor(f"{where}: {entry.key}", entry.value) for entry in message.inputs}
    return Datum(tuple(tokens), inputs)


def _tensor(where: str, message: Any) -> Array:
    if message.HasField("sparse"):
        raise DataError(f"{where} is sparse (several targets at a position); this server takes one target for each")
    if message.dtype == FLOAT32:
        values = _numbers(where, message.dense, np.dtype("<f4"))
    elif message.dtype == INTEGER64:
        values = _numbers(where, message.dense, np.dtype("<i8"))
    elif message.dtype == INTEGER32:
        values = _numbers(where, message.dense, np.dtype("<i4")).astype(np.int64)
    elif message.dtype == BFLOAT16:
        values = (_numbers(where, message.dense, np.dtype("<u2")).astype(np.uint32) << 16).view(np.float32)
    else:
        raise DataError(f"{where} has the unknown type {message.dtype}")
    if where.endswith(": target_tokens") != (values.dtype == np.int64):
        raise DataError(f"{where} has type {values.dtype}; target_tokens are int64, other inputs float32")
    shape = list(message.shape) or [len(values)]
    if any(size < 0 for size in shape) or _product(shape) != len(values):
        raise DataError(f"{where} has shape {shape} and {len(values)} values")
    return values.reshape(shape)


def _product(shape: Sequence[int]) -> int:
    """In Python's integers: a shape from the wire may overflow others."""
    product = 1
    for size in shape:
        product *= size
    return product


def _numbers(where: str, data: bytes, dtype: np.dtype[Any]) -> Array:
    if len(data) % dtype.itemsize:
        raise DataError(f"{where} has {len(data)} bytes, not a multiple of {dtype.itemsize}")
    return np.frombuffer(data, dtype=dtype).astype(dtype.newbyteorder("="))


def message_class(name: str) -> Any:
    """Protobuf's class of a message.

    Args:
        name: a key of `MESSAGES`.
    """
    return _classes()[name]


def _parsed(name: str, body: bytes) -> Any:
    classes = _classes()
    from google.protobuf.message import DecodeError

    message = classes[name]()
    try:
        message.ParseFromString(body)
    except (DecodeError, UnicodeDecodeError, RuntimeError, ValueError) as error:
        raise DataError(f"the body is no {name} in protobuf: {str(error).splitlines()[0]}") from None
    return message


@cache
def _classes() -> dict[str, Any]:
    """A class for each message."""
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    except ImportError:
        raise UserError("the training API needs protobuf: pip install 'tunesmith[training]'") from None
    file = descriptor_pb2.FileDescriptorProto(
        name="trainer_training.proto", package="trainer.training", syntax="proto3"
    )
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, label, kind, repeated in fields:
            field = message.field.add(name=label, number=number, label=3 if repeated else 1)
            if isinstance(kind, str):
                field.type, field.type_name = 11, f".trainer.training.{kind}"
            else:
                field.type = kind
            if label == "text" and kind == STRING:  # one of two: whether it is there matters
                message.oneof_decl.add(name="_text")
                field.proto3_optional, field.oneof_index = True, 0
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    names = {name: pool.FindMessageTypeByName(f"trainer.training.{name}") for name in MESSAGES}
    return {name: message_factory.GetMessageClass(each) for name, each in names.items()}
