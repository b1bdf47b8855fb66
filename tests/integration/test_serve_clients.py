"""Clients that other people wrote, in an environment of their own: langchain-openai and lm-eval.

python -m venv .venv-clients && .venv-clients/bin/pip install langchain-openai 'lm-eval[api]' transformers
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import yaml
from project import Project
from serving import Server, serving
from test_serve_tools import MODEL, thinker
from transformers import AutoModelForCausalLM, AutoTokenizer

PYTHON: Final = Path(__file__).parents[2] / ".venv-clients" / "bin" / "python"
pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-clients (see the top of this file)"),
]

LANGCHAIN: Final = '''
import sys
from typing import Literal
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

class Weather(BaseModel):
    """Weather of a city."""
    city: Literal["Oslo", "Rome"]

chat = ChatOpenAI(
    base_url=sys.argv[1], api_key="none", model="thinker", max_tokens=400, seed=1, temperature=1,
    reasoning_effort="none",
)
answer = chat.invoke("what is the sum of 8 and 90?")
assert answer.content and answer.usage_metadata["output_tokens"], answer
assert "".join(part.content for part in chat.stream("what is the sum of 8 and 90?")) == answer.content
caller = chat.bind_tools([Weather], tool_choice="Weather", strict=True, parallel_tool_calls=False)
(call,) = caller.invoke("rain?").tool_calls
assert Weather(**call["args"]) and call["name"] == "Weather", call
assert isinstance(chat.with_structured_output(Weather, method="json_schema").invoke("rain?"), Weather)
print("all of it works")
'''
ROWS: Final[list[dict[str, Any]]] = [
    {"question": f"{n} plus 1 is", "choices": [str(n + 1), str(n + 7), "no idea"], "gold": n % 3} for n in range(6)
]
CHOICE: Final[dict[str, Any]] = {
    "task": "choice",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "gold",
    "metric_list": [{"metric": "acc"}],
}


@pytest.fixture(scope="module")
def server(shared: Project) -> Iterator[Server]:
    thinker(shared.root / MODEL)
    with serving(shared, MODEL) as server:
        yield server


def run(*words: str, cwd: Path) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(PYTHON), *words], capture_output=True, text=True, check=False, cwd=cwd, env=clean)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_langchain_chats_streams_calls_and_parses(server: Server, tmp_path: Path) -> None:
    assert "all of it works" in run("-c", LANGCHAIN, f"{server.url}/v1", cwd=tmp_path)


def test_lm_eval_reads_the_log_probabilities_of_the_model(server: Server, shared: Project, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    task = CHOICE | {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}
    (tmp_path / "choice.yaml").write_text(yaml.safe_dump(task))
    model = shared.root / MODEL
    where = f"model={MODEL},base_url={server.url}/v1/completions,tokenizer={model},num_concurrent=2,max_length=512"
    words = (
        "--model",
        "local-completions",
        "--model_args",
        where,
        "--tasks",
        "choice",
        "--include_path",
        str(tmp_path),
    )
    run("-m", "lm_eval", *words, "--output_path", str(tmp_path / "out"), "--log_samples", cwd=tmp_path)
    (file,) = (tmp_path / "out").rglob("samples_choice_*.jsonl")
    samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda each: each["doc_id"])
    tokenizer = AutoTokenizer.from_pretrained(model)
    causal_lm = AutoModelForCausalLM.from_pretrained(model)
    for row, sample in zip(ROWS, samples, strict=True):
        for choice, ((logprob, _),) in zip(row["choices"], sample["resps"], strict=True):
            ids = tokenizer(f"{row['question']} {choice}")["input_ids"]
            count = len(ids) - len(tokenizer(row["question"])["input_ids"])
            with torch.no_grad():
                logits = causal_lm(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = sum(float(logits[-1 - count + k, ids[-count + k]]) for k in range(count))
            assert float(logprob) == pytest.approx(expected, abs=1e-3)
