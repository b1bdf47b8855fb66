"""Submit runs, wait for them and resume them from Python: `submit`, `reconnect_and_wait`."""

from __future__ import annotations

from trainer.jobs.job import Job, find_job, jobs, reconnect_and_wait, submit
from trainer.jobs.slurm_script import SlurmOptions
from trainer.run.state import JobState, Outcome

__all__ = ["Job", "JobState", "Outcome", "SlurmOptions", "find_job", "jobs", "reconnect_and_wait", "submit"]
