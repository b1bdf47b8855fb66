"""`python -m trainer.serve`: start an engine and listen."""

from __future__ import annotations

import sys

sys.modules["torch"] = None  # type: ignore[assignment]  # tokenizers need no torch, which takes seconds to import

from trainer.serve.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
