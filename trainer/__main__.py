"""`python -m trainer` is the command `trainer`."""

import sys

from trainer.commands.cli import main

sys.exit(main())
