"""Modules whose doctests cannot be collected: an optional package is not installed, or only a program may run them."""

from importlib.util import find_spec

OPTIONAL = {
    "trainer/inference/harness_model.py": "lm_eval",
    "trainer/environments/verifiers_harness.py": "verifiers",
    "trainer/model/thin_kernels.py": "triton",
    "trainer/model/swiglu_kernels.py": "triton",
}
collect_ignore = [
    "trainer/control/migrations/env.py",  # run by Alembic
    *(file for file, module in OPTIONAL.items() if find_spec(module) is None),
]
