"""Rewards of the runs in test_rft.py; copied beside their recipes as rewards.py."""

import os
import time


def digits(completion, row):
    """The share of digits; as slow as the environment says."""
    time.sleep(float(os.environ.get("SLOW_S", "0")))
    return sum(letter.isdigit() for letter in completion) / max(1, len(completion))


def length(completion, row):
    return float(len(completion))


def treacherous(completion, row):
    """Never 0, and sometimes no number at all."""
    match row["kind"]:
        case "raises":
            raise LookupError(f"no reward for {completion!r}")
        case "sleeps":
            time.sleep(1000)
        case "exits":
            os._exit(7)
        case "nan":
            return float("nan")
    return 1.0 + len(completion)


def hard_or_easy(completion, row):
    """Every third prompt can be answered differently; of the others one is always and one never right."""
    time.sleep(float(os.environ.get("SLOW_S", "0")))
    kind = row.index % 3
    return float(kind == 1) if kind else sum(map(ord, completion)) % 97 / 96
