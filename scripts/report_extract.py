"""Compare base and adapter on held-out rows, with plain transformers and PEFT only."""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

BASE = "models/SmolLM2-135M-Instruct"
HELD_OUT = "datasets/extract_heldout.jsonl"
NUM_ROWS = 100
BATCH = 50
MAX_NEW_TOKENS = 56


def main(run: Path) -> None:
    """Answer held-out rows with and without the adapter, and print the table."""
    adapter = run / "adapter"
    report_file = run / "report.json"
    if report_file.is_file() and report_file.stat().st_mtime > (adapter / "adapter_model.safetensors").stat().st_mtime:
        report = json.loads(report_file.read_text())
    else:
        report = measure(adapter)
        report_file.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    show(report, adapter)


def measure(adapter: Path) -> dict[str, Any]:
    """Greedy answers of base and adapter to the same rows."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # concerns PEFT's own code
    rows = [json.loads(line) for line in Path(HELD_OUT).read_text().splitlines()][:NUM_ROWS]
    tokenizer = AutoTokenizer.from_pretrained(BASE, padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16)
    tuned = PeftModel.from_pretrained(base, str(adapter))
    tuned.base_model.model.eval()

    def answers(name: str) -> list[str]:
        begin, texts = time.monotonic(), []
        for start in range(0, len(rows), BATCH):
            chats = [row["messages"][:-1] for row in rows[start : start + BATCH]]
            inputs = tokenizer.apply_chat_template(
                chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
            )
            with torch.inference_mode():
                output = tuned.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            texts += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"{name}: {len(rows)} held-out rows answered in {time.monotonic() - begin:.0f} s", file=sys.stderr)
        return texts

    with tuned.disable_adapter():
        before = answers("before")
    with torch.no_grad():
        tuned = tuned.merge_and_unload()  # only in this process, to answer faster; files are unchanged
    after = answers("after")
    wanted = [row["messages"][-1]["content"] for row in rows]
    return {
        "rows": len(rows),
        "before": score(before, wanted),
        "after": score(after, wanted),
        "samples": [
            {"sentence": rows[index]["messages"][-2]["content"], "before": before[index], "after": after[index]}
            for index in range(3)
        ],
    }


def score(answers: list[str], wanted: list[str]) -> dict[str, float]:
    """Fractions of answers that are valid JSON, have the right keys, and match exactly."""
    parsed = [parse(answer) for answer in answers]
    truth = [json.loads(text) for text in wanted]
    pairs = list(zip(parsed, truth, strict=True))
    return {
        "valid JSON": sum(answer is not None for answer in parsed) / len(pairs),
        "right keys": sum(answer is not None and answer.keys() == right.keys() for answer, right in pairs) / len(pairs),
        "exact match": sum(answer == right for answer, right in pairs) / len(pairs),
    }


def parse(answer: str) -> dict[str, Any] | None:
    """The answer as an object, or None."""
    try:
        value = json.loads(answer)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def show(report: dict[str, Any], adapter: Path) -> None:
    """Print table and samples."""
    print(f"\n{report['rows']} held-out sentences from template families that were not trained on:\n")
    print(f"  {'':<14}{'before':>8}{'after':>8}")
    for name in report["before"]:
        print(f"  {name:<14}{report['before'][name]:>8.0%}{report['after'][name]:>8.0%}")
    for sample in report["samples"]:
        before = " ".join(sample["before"].split())
        print(f"\n  sentence  {sample['sentence']}\n  before    {before[:90]}\n  after     {sample['after']}")
    print(f"\nadapter: {adapter} (load it with peft.PeftModel.from_pretrained on {BASE})")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
