"""Token ids and loss masks of the shipped rows, as they were before text was rendered by the model's own template."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from trainer.config.recipe import DataSettings, DataSource, ModelSettings
from trainer.data.chat import ChatEncoder, load_tokenizer
from trainer.data.sources import read_rows

MODEL = ModelSettings(path="models/SmolLM2-135M-Instruct")
pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(not Path(MODEL.path).is_dir(), reason=f"{MODEL.path} is not there; scripts/quickstart makes it"),
]


def digest(items: list[object]) -> str:
    return hashlib.sha256(repr(items).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("file", "expected"), [("extract_train", "f515550a470c9669"), ("extract_heldout", "ac5040f8711392be")]
)
def test_ids_mask_and_weights_of_the_sft_quickstart_stay_as_they_were(file, expected):
    data = DataSettings(train=DataSource(path=f"datasets/{file}.jsonl"))
    encoded = ChatEncoder(load_tokenizer(MODEL), MODEL, data).encode(read_rows(data.train, data))
    assert encoded.num_split == 0
    assert (
        digest([(each.token_ids, each.loss_mask, {"weights": each.inputs.weights}) for each in encoded.sequences])
        == expected
    )


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("sums_train", "972c090f12e30d15"),
        ("sums_heldout", "3fc2192865648e67"),
        ("code_rft_train", "9f2a2d75919425ad"),
        ("json_rft_train", "972a518a33ba015c"),
    ],
)
def test_prompts_of_the_shipped_rft_rows_stay_as_they_were(file, expected):
    data = DataSettings(train=DataSource(path=f"datasets/{file}.jsonl"))
    encoder = ChatEncoder(load_tokenizer(MODEL), MODEL, data, for_prompts=True)
    assert digest([encoder.encode_prompt(row) for row in read_rows(data.train, data)]) == expected
