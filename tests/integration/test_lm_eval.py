"""`trainer eval --tasks` with the real lm-eval: the numbers of its own Hugging Face model on the same weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from tiny import tiny_model_dir

from trainer.inference import evaluation

with_lm_eval = pytest.mark.heavy  # an environment of its own: docs/using.md

ROWS = [
    {
        "question": f"{n} plus 1 is",
        "choices": [str(n + 1), str(n + 7), "no idea"],
        "gold": 0,
        "text": f"{n} plus 1 is {n + 1}. ",
    }
    for n in range(8)
]
CHOICE = {
    "task": "choice", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
    "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}", "doc_to_target": "gold",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}  # fmt: skip
ROLLING = CHOICE | {
    "task": "rolling", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
}  # fmt: skip
WRITE = CHOICE | {
    "task": "write", "output_type": "generate_until", "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": [".", "z"], "max_gen_toks": 12, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}  # fmt: skip


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tiny_model_dir(tmp_path / "model")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for config in (CHOICE, ROLLING, WRITE):
        for name in ("doc_to_choice",) if config is not CHOICE else ():
            config.pop(name, None)
        (tmp_path / f"tasks/{config['task']}.yaml").write_text(yaml.safe_dump(config))
    return "tasks/choice.yaml,tasks/rolling.yaml,tasks/write.yaml"


@with_lm_eval
@pytest.mark.filterwarnings("default")
def test_the_numbers_are_those_of_lm_evals_own_model(tasks: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluation.main(["model", "--tasks", tasks, "--json"]) == 0
    (ours,) = json.loads(capsys.readouterr().out.splitlines()[-1])
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    files = str(Path("tasks/rows.jsonl").resolve())
    configs = [yaml.safe_load(Path(name).read_text()) for name in tasks.split(",")]
    configs = [{**config, "dataset_kwargs": {"data_files": {"test": files}}} for config in configs]
    model = HFLM(pretrained="model", device="cpu", dtype="float32", batch_size=1)
    theirs = evaluator.simple_evaluate(model=model, tasks=configs, bootstrap_iters=0)["results"]
    assert ours["rows"] == {"choice": 8, "rolling": 8, "write": 8}
    compared = {
        (task, name): (ours["results"][task][name], value)
        for task, values in theirs.items()
        for name, value in values.items()
        if isinstance(value, float)
    }
    assert {name for _, name in compared} >= {"acc,none", "acc_norm,none", "word_perplexity,none", "exact_match,none"}
    for name, (mine, reference) in compared.items():
        assert mine == pytest.approx(reference, rel=1e-4), name


@with_lm_eval
@pytest.mark.filterwarnings("default")
def test_the_single_values_are_those_of_lm_evals_own_model(tasks: str) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from trainer.inference.chat_model import ChatModel
    from trainer.inference.harness_model import HarnessModel
    from trainer.inference.source import find_source

    ours, theirs = (
        HarnessModel(ChatModel(find_source("model"))),
        HFLM(pretrained="model", device="cpu", dtype="float32"),
    )

    def asked(kind: str, *pairs: tuple[object, ...]) -> list[Instance]:
        return [Instance(kind, {}, pair, index) for index, pair in enumerate(pairs)]

    pairs = asked("loglikelihood", ("1 + 1 =", " 2"), ("", "hello"), ("a b ", "c d e f"))
    for mine, reference in zip(ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True):
        assert mine[0] == pytest.approx(reference[0], rel=1e-4)
        assert mine[1] == reference[1]
    long = asked("loglikelihood_rolling", ("one two three " * 40,), ("x y",))
    assert ours.loglikelihood_rolling(long) == pytest.approx(theirs.loglikelihood_rolling(long), rel=1e-4)
    settings = {"until": ["7", "e"], "max_gen_toks": 16, "do_sample": False}
    written = asked("generate_until", ("1 + 1 =", settings), ("tell me", settings))
    assert ours.generate_until(written) == theirs.generate_until(written)


@with_lm_eval
def test_what_cannot_be_run_says_why(tasks: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("none.yaml").write_text("a: 1\n")
    assert evaluation.main(["model", "--tasks", "none.yaml"]) == 2
    assert "none.yaml: is no task of lm-eval: it has no field `task`" in capsys.readouterr().err
    assert evaluation.main(["model", "--tasks", "no_such_task"]) == 2
    assert "--tasks no_such_task: " in capsys.readouterr().err


def test_without_lm_eval_the_remedy_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    tiny_model_dir(tmp_path / "model")
    assert evaluation.main(["model", "--tasks", "arc_easy"]) == 2
    assert "pip install 'tunesmith[evals]'" in capsys.readouterr().err
