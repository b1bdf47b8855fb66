"""Held-out loss by transformers and PEFT alone: `python -I plain_loss.py ROWS MODEL[+ADAPTER] ...`; JSON on stdout."""

import json
import sys
from pathlib import Path


def main() -> None:
    sys.modules["trainer"] = None  # type: ignore[assignment]  # importing it raises ImportError

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    losses = {}
    for argument in sys.argv[2:]:
        base, _, adapter = argument.partition("+")
        tokenizer = AutoTokenizer.from_pretrained(adapter or base)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()
        total = count = 0
        for row in rows:
            messages = row["messages"]
            prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
            answer = [*tokenizer.encode(messages[-1]["content"], add_special_tokens=False), tokenizer.eos_token_id]
            ids = torch.tensor([prompt + answer])
            with torch.no_grad():
                logprobs = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            total -= logprobs.gather(1, torch.tensor(answer)[:, None]).sum().item()
            count += len(answer)
        losses[argument] = total / count
    print(json.dumps(losses))


if __name__ == "__main__":
    main()
