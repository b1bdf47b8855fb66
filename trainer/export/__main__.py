"""`python -m trainer.export RUN`: what `trainer export` starts in a process of its own."""

from __future__ import annotations

import sys

from trainer.export.cli import main

if __name__ == "__main__":
    sys.exit(main())
