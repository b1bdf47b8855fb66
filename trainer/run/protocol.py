"""What launcher and worker agree on: environment variables, signals, the heartbeat interval."""

from __future__ import annotations

import signal
from typing import Final

HEARTBEAT_S: Final = 10.0
"""A worker rewrites its heartbeat at least this often."""
LATE_S: Final = 2.0
"""How late a heartbeat may be while its writer is alive."""
STOPPED_S: Final = 5.0
"""A polling loop that was held up longer than this was stopped (SIGSTOP, a suspended machine), not slow."""
FRESH_S: Final = 3 * HEARTBEAT_S
"""A heartbeat older than this is stale."""
LAUNCHER: Final = "TRAINER_LAUNCHER"
"""Environment variable: who started the worker."""
SUPERVISOR: Final = "trainer train"
"""Value of LAUNCHER in a supervised worker."""
SUPERVISOR_PID: Final = "TRAINER_SUPERVISOR_PID"
"""Environment variable: the supervisor's process id."""
SHUTDOWN_TIMEOUT: Final = "TRAINER_SHUTDOWN_TIMEOUT_S"
"""Environment variable: torchrun's --shutdown-timeout where it is not the default."""
STACKS_SIGNAL: Final = signal.SIGUSR2
"""A worker that receives it writes the stacks of its threads to its log, even while it holds the interpreter lock."""
TOKENIZING: Final = "tokenizing rows"
"""Begins the phase of an attempt that tokenizes rows; the rest says how far it is."""
