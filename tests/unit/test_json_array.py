"""A JSON array is read value by value: the values and the mistakes are those of `json.loads`."""

from __future__ import annotations

import io
import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.json_array import array_values

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=3)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.dictionaries(st.text(max_size=9), VALUES, max_size=3), max_size=4),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.integers(1, 40),
)
def test_values_do_not_depend_on_where_the_file_is_cut(
    values: list[dict[str, Any]], indent: int | None, is_ascii: bool, chunk_bytes: int
) -> None:
    content = json.dumps(values, indent=indent, ensure_ascii=is_ascii).encode("utf-8", "surrogatepass")
    try:
        content.decode()
    except UnicodeDecodeError:
        content = json.dumps(values, indent=indent).encode()
    assert list(array_values(io.BytesIO(content), chunk_bytes)) == values


@pytest.mark.parametrize("chunk_bytes", [1, 7, 1000])
@pytest.mark.parametrize(
    "text",
    ['[{"a": 1},\n {"a": }]', '[{"a": 1}\n {"b": 2}]', '[\n{"a": 1},\n{"b": tru]', '[{"a": 1}', '[{"a": "x\n"}]',
     '[{"a": 1}] more', '[{"a": 1},', '[{"a": "no end', "["],
)  # fmt: skip
def test_mistakes_are_at_the_line_and_column_of_the_file(text: str, chunk_bytes: int) -> None:
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    with pytest.raises(json.JSONDecodeError) as found:
        list(array_values(io.BytesIO(text.encode()), chunk_bytes))
    assert (found.value.lineno, found.value.colno) == (expected.value.lineno, expected.value.colno)


def test_bytes_that_are_no_text_are_named_by_their_place() -> None:
    content = b'[{"a": "' + "é".encode() * 50 + b"\xff" + b'"}]'
    with pytest.raises(UnicodeDecodeError) as found:
        list(array_values(io.BytesIO(content), 3))
    assert found.value.start == content.index(b"\xff")


def test_a_byte_order_mark_is_skipped() -> None:
    assert list(array_values(io.BytesIO(b'\xef\xbb\xbf[{"a": 1}]'), 2)) == [{"a": 1}]


def test_memory_does_not_grow_with_the_file() -> None:
    content = b"[" + b",".join(b'{"text": "%s"}' % (b"x" * 2000) for _ in range(20_000)) + b"]"  # 40 MB
    tracemalloc.start()
    try:
        number = sum(1 for _ in array_values(io.BytesIO(content)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert number == 20_000
    assert peak < 8 << 20, "a chunk as bytes and as text, twice"
