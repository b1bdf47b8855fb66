"""Modules whose doctests cannot be collected: an optional package is not installed, or only a program may run them."""

from importlib.util import find_spec

OPTIONAL = {
    "lm_eval": "trainer/inference/harness_model.py",
    "verifiers": "trainer/environments/verifiers_harness.py",
}
collect_ignore = [
    "trainer/control/migrations/env.py",  # run by Alembic
    *(file for module, file in OPTIONAL.items() if find_spec(module) is None),
]
