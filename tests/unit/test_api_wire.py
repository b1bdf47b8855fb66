"""Protobuf of the training API and the journal: what is written is read, and nothing else gets through."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from trainer.api.datum import LOSS_INPUTS, Datum, check_data, config_of, loss_inputs_of
from trainer.api.journal import FRAME, Journal
from trainer.api.protocol import Refused, split_path
from trainer.api.store import ModelStore, Store
from trainer.api.wire import (
    BFLOAT16,
    FLOAT32,
    INTEGER32,
    INTEGER64,
    Drawn,
    message_class,
    read_pass,
    read_pass_head,
    write_pass,
    write_samples,
)
from trainer.errors import TrainerError, UserError

EXAMPLES = int(os.environ.get("TUNESMITH_FUZZ_EXAMPLES", "300"))
FUZZ = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=EXAMPLES == 300
)


def message(**fields: object):
    found = message_class("PassRequest")(model_id="m", seq_id=3, loss_fn="cross_entropy")
    for name, value in fields.items():
        setattr(found, name, value)
    datum = found.data.add()
    datum.input.add().text.tokens = np.asarray([5, 6], np.int32).tobytes()
    datum.input.add().text.tokens = np.asarray([7], np.int32).tobytes()
    for name, kind, values in (
        ("target_tokens", INTEGER64, np.asarray([6, 7, 2])),
        ("weights", FLOAT32, np.asarray([0, 1, 0.5], np.float32)),
    ):
        tensor = datum.inputs.add(key=name).value
        tensor.dtype, tensor.dense, tensor.shape[:] = kind, values.tobytes(), [3]
    return found


GOOD: bytes = message().SerializeToString()


def test_a_request_is_read() -> None:
    found = read_pass(GOOD)
    assert (found.model_id, found.seq_id, found.loss, found.backward) == ("m", 3, "cross_entropy", True)
    assert found.data[0].tokens == (5, 6, 7)
    assert {name: values.tolist() for name, values in found.data[0].inputs.items()} == {
        "target_tokens": [6, 7, 2], "weights": [0.0, 1.0, 0.5],
    }  # fmt: skip
    assert read_pass_head(GOOD) == ("m", 3)


def test_settings_win_over_their_older_form_and_types_are_widened() -> None:
    request = message(forward_only=True)
    request.numbers.add(key="clip", value=1.0)
    request.settings.add(key="clip").value.number = 2.0
    request.settings.add(key="kind").value.text = "x"
    request.data[0].inputs[0].value.dtype = INTEGER32
    request.data[0].inputs[0].value.dense = np.asarray([6, 7, 2], np.int32).tobytes()
    request.data[0].inputs[1].value.dtype = BFLOAT16
    request.data[0].inputs[1].value.dense = (
        (np.asarray([0, 1, 0.5], np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    )
    found = read_pass(request.SerializeToString())
    assert found.config == {"clip": 2.0, "kind": "x"}
    assert not found.backward
    assert found.data[0].inputs["target_tokens"].dtype == np.int64
    assert found.data[0].inputs["weights"].tolist() == [0.0, 1.0, 0.5]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda each: each.input[0].image.SetInParent(), "datum 0: model_input has images or audio"),
        (lambda each: setattr(each.input[0].text, "tokens", b"abc"), "model_input has 3 bytes, not a multiple of 4"),
        (lambda each: each.inputs[0].value.sparse.SetInParent(), "target_tokens is sparse"),
        (lambda each: setattr(each.inputs[1].value, "dtype", 9), "weights has the unknown type 9"),
        (lambda each: setattr(each.inputs[1].value, "dtype", INTEGER64), "weights has 12 bytes, not a multiple of 8"),
        (lambda each: setattr(each.inputs[0].value, "dtype", FLOAT32), "target_tokens has type float32"),
        (lambda each: each.inputs[1].value.shape.append(7), r"weights has shape \[3, 7\] and 3 values"),
        (lambda each: each.inputs[1].value.shape.extend([2**62, 2**62]), r"has shape \[3, 4611686018427387904"),
        (lambda each: each.inputs[1].value.shape.extend([-1, -1]), r"weights has shape \[3, -1, -1\]"),
    ],
)
def test_data_that_the_protocol_does_not_have_are_refused(change, says) -> None:
    request = message()
    change(request.data[0])
    with pytest.raises(TrainerError, match=says):
        read_pass(request.SerializeToString())


def test_results_are_written() -> None:
    arrays = {"logprobs": [np.ones(3, np.float32), np.ones(2, np.float32)]}
    found = message_class("PassResult")()
    found.ParseFromString(write_pass(arrays, {"loss:sum": 2.5}))
    assert found.outputs[0].num_datums == 2
    assert np.frombuffer(found.outputs[0].fields[0].value.offsets, np.int64).tolist() == [0, 12, 20]
    samples = message_class("SampleResult")()
    drawn = [Drawn([1, 2], [-1, -2], is_stopped=True, top=[[(1, -1.0), (3, -2.0)], [(2, -2.0)]])]
    samples.ParseFromString(write_samples(drawn, prompt_logprobs=[None, -1.0], top_prompt=[[], [(1, -1.0)]]))
    assert np.frombuffer(samples.sequences[0].top.token_ids, np.int32).tolist() == [1, 3, 2, 0]
    assert np.isnan(np.frombuffer(samples.prompt_logprobs, np.float32)[0])


@FUZZ
@given(st.binary(max_size=400))
@example(b"")
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    refused_or_read(body)


@FUZZ
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=6), st.integers(0, len(GOOD)))
def test_a_changed_request_is_read_or_refused(changes: list[tuple[int, int]], cut: int) -> None:
    body = bytearray(GOOD)
    for place, value in changes:
        body[place] = value
    refused_or_read(bytes(body[:cut] if cut % 2 else body))


@FUZZ
@given(
    st.lists(st.integers(-(2**40), 2**40), max_size=4),
    st.binary(max_size=40),
    st.integers(-1, 6),
    st.sampled_from([*LOSS_INPUTS, "dro", ""]),
    st.sampled_from(["target_tokens", "weights", "logprobs", "advantages", "sequence_ratio_mask", "x"]),
)
def test_any_tensor_is_read_or_refused(shape, data, kind, loss, name) -> None:
    request = message(loss_fn=loss)
    tensor = request.data[0].inputs.add(key=name).value
    tensor.dtype, tensor.dense, tensor.shape[:] = kind, data, shape
    refused_or_read(request.SerializeToString())


def refused_or_read(body: bytes) -> None:
    """Decode and check as the executor does: a value of the declared types, or an error for people."""
    try:
        read_pass_head(body)
        found = read_pass(body)
        inputs = loss_inputs_of(found.loss)
        config_of(found.loss, found.config)
        check_data(found.data, inputs, found.loss, vocab=10, window=64)
    except TrainerError:
        return
    for datum in found.data:
        assert isinstance(datum, Datum)
        assert all(values.shape == (datum.num_tokens,) for values in datum.inputs.values())
        assert all(np.isfinite(values).all() for values in datum.inputs.values())


# ---- journal


def test_a_journal_keeps_what_was_appended_and_cuts_a_torn_end(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "log")
    for number in range(3):
        journal.append({"seq": number}, bytes([number]) * 10)
    journal.sync()
    whole = (tmp_path / "log").read_bytes()
    journal.close()
    for cut in (1, FRAME.size, 20):
        (tmp_path / "log").write_bytes(whole[:-cut])
        again = Journal(tmp_path / "log")
        assert [record.head["seq"] for record in again.records] == [0, 1]
        again.append({"seq": 7}, b"x")
        assert [again.body(record) for record in again.records] == [b"\0" * 10, b"\1" * 10, b"x"]
        again.close()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    (tmp_path / "log").write_bytes(flipped)
    again = Journal(tmp_path / "log")
    assert len(again.records) == 2
    again.drop(lambda record: record.head["seq"] == 1)
    assert [again.body(record) for record in again.records] == [b"\1" * 10]
    again.close()
    last = Journal(tmp_path / "log")
    assert [record.head["seq"] for record in last.records] == [1]
    last.close()


def test_results_are_kept_once_and_states_are_named(tmp_path: Path) -> None:
    files = Store(tmp_path).create_model("s:train:0", {"owner": "", "session": "s"})
    files.keep_result(1, "json", b"first")
    files.keep_result(1, "json", b"second")
    assert files.result(1) == ("json", b"first")
    assert files.result(2) is None
    again = Store(tmp_path).load_models()["s:train:0"]
    assert again.result(1) == ("json", b"first")
    assert isinstance(again, ModelStore)
    assert again.free_name("weights", None, overwrite=False) == "000001"
    for name in ("../x", "", ".hidden", "a/b", "x" * 200):
        with pytest.raises(Refused, match="is not made of letters"):
            again.free_name("weights", name, overwrite=False)
    for path in ("tinker://a/weights/..", "/etc", "tinker://a/other/b", "tinker://a/weights/b/c"):
        with pytest.raises(Refused, match="not tinker://"):
            split_path(path)
    for store in (files, again):
        store.requests.close()
        store.results.close()


def test_an_unknown_loss_is_named() -> None:
    with pytest.raises(UserError, match="'stable_reinforce' is not one of"):
        loss_inputs_of("stable_reinforce")
