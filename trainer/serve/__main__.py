"""`python -m trainer.serve`: start an engine and listen."""

from __future__ import annotations

import os
import sys

sys.modules["torch"] = None  # type: ignore[assignment]  # tokenizers need no torch, which takes seconds to import
os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # it would tell the user that torch is missing

import transformers  # noqa: E402, F401

del os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"]

from trainer.serve.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
