"""`trainer check` and `trainer shapes`: what they print, their exit codes, and that they import no torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from small_recipe import RFT, SFT, write_small

from trainer.commands.check_report import ValueReport, describe_plan, report_lines
from trainer.commands.cli import main
from trainer.config.load import find_shape, load_recipe
from trainer.planning.plan import make_plan

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "accelerate", "peft", "trl", "datasets", "wandb", "numpy", "httpx")


@pytest.fixture(autouse=True)
def in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run_quietly(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the command in a fresh interpreter that fails if anything heavy was imported."""
    code = (
        "import sys\n"
        "from trainer.commands.cli import main\n"
        "try:\n"
        f"    code = main({arguments!r})\n"
        "except SystemExit as stop:\n"
        "    code = stop.code\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not heavy, heavy\n"
        "sys.exit(code)\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["check", "--help"],
        ["train", "--help"],
        ["check", "recipe.yaml"],
        ["check", "recipe.yaml", "--json"],
        ["shapes"],
        ["shapes", "recipe.yaml"],
        ["submit", "recipe.yaml", "--launcher", "slurm", "--print"],
        ["jobs"],
        ["doctor"],
    ],
)
@pytest.mark.parametrize("recipe", [SFT, RFT], ids=["sft", "rft"])
def test_nothing_heavy_is_imported(arguments, recipe):
    write_small(Path(), recipe)
    done = run_quietly(arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_mistakes_go_to_stderr_without_a_traceback_and_exit_with_2():
    write_small(Path(), SFT.replace("rank: 4", "rnak: 4").replace("steps: 10", "steps: -1"))
    done = run_quietly(["check", "recipe.yaml"])
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "recipe.yaml:6: lora.rnak: unknown field; did you mean `rank`?\n"
        "recipe.yaml:12: steps: must be greater than 0 (got -1)\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "none.yaml"], "none.yaml: no such file"),
        (["check", "recipe.yaml", "--shape", "h100x7"], "--shape: h100x7: unknown; did you mean `h100x8`?"),
        (["check", "recipe.yaml", "--set", "stpes=3"], "--set stpes: unknown field; did you mean `steps`?"),
        (["shapes", "none.yaml"], "none.yaml: no such file"),
    ],
)
def test_what_the_user_must_change_exits_with_2(arguments, message, capsys):
    write_small(Path())
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert captured.out == ""


def test_warnings_go_to_stderr_and_do_not_fail(capsys):
    write_small(Path(), SFT.replace("dcp_save_interval: 5\n", ""))
    assert main(["check", "recipe.yaml"]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("warning: recipe.yaml: dcp_save_interval: 0: no checkpoints are saved")
    assert "small: sft, LoRA of model" in captured.out


def section(text: str, name: str) -> list[str]:
    """The lines of one section of the report, with single spaces."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(name)) + 1
    end = next((number for number in range(start, len(lines)) if not lines[number]), len(lines))
    return [" ".join(line.split()) for line in lines[start:end]]


def test_the_batch_arithmetic_is_written_out(capsys):
    write_small(Path(), num_rows=1000)
    assert main(["check", "recipe.yaml", "--set", "rows_per_step=300"]) == 0
    # the first 200 rows: 14 to 16 characters of prompt, 8 to 10 of completion
    # (10 * 22 + 89 * 24 + 1 * 25 + 100 * 26) / 200 = 24.905 characters -> / 3.5 + 2 turns of 5 = 17.12 tokens
    assert section(capsys.readouterr().out, "batch") == [
        "global batch 300 rows of about 17 tokens = about 5,135 tokens",
        "micro-batches of 1,024 tokens x 1 rank x 6 accumulated >= the global batch",
        "epoch 1,000 rows / 300 a step = 3.333 steps",
        "run 10 steps = 3 epochs",
    ]


def test_the_batch_of_rft_counts_completions(capsys):
    write_small(Path(), RFT)
    assert main(["check", "recipe.yaml", "--shape", "h100x8_dp"]) == 0
    # prompt 14 / 3.5 + 5 = 9 tokens and at most 16 new ones, 2 x 4 times
    assert section(capsys.readouterr().out, "batch")[:2] == [
        "global batch 2 prompts of about 9 tokens x 4 completions = at most 200 tokens",
        "micro-batches of 16,384 tokens x 8 ranks x 1 accumulated >= the global batch",
    ]


def test_micro_batches_that_several_ranks_compute_together(capsys):
    write_small(Path())
    shape = find_shape("cpu").model_dump() | {"name": "split", "gpus": 4, "context_parallel": 2}
    Path("split.yaml").write_text(json.dumps(shape))
    assert main(["check", "recipe.yaml", "--shape", "split.yaml", "--values"]) == 0
    out = capsys.readouterr().out
    micro = "micro-batches of 2,048 tokens x 2 groups of 2 ranks, each a slice of 1,024,"
    assert section(out, "batch")[1] == f"{micro} x 1 accumulated >= the global batch"
    assert "shape.context_parallel 2 shape split" in [" ".join(line.split()) for line in out.splitlines()]
    Path("split.yaml").write_text(json.dumps(shape | {"gpus": 3}))
    assert main(["check", "recipe.yaml", "--shape", "split.yaml"]) == 2
    assert "context_parallel: 2 does not divide the 3 training ranks of the shape" in capsys.readouterr().err


def test_the_memory_table_adds_up(capsys):
    write_small(Path())
    assert main(["check", "recipe.yaml"]) == 0
    rows = section(capsys.readouterr().out, "memory per device (estimated)")
    names = [row.rsplit(" ", 2)[0] for row in rows[:-1]]
    assert names == [
        "base weights", "adapter", "masters", "gradients", "optimizer", "copies for checkpoints", "activations",
        "head", "fragmentation", "kernels", "process",
    ]  # fmt: skip
    peak = rows[-1].split()
    assert (peak[0], *peak[2:]) == ("peak", "GiB", "of", "16", "GiB")
    assert float(peak[1]) == pytest.approx(sum(float(row.split()[-2]) for row in rows[:-1]), abs=0.03)


def test_a_shape_without_a_rate_says_that_there_is_none(capsys):
    write_small(Path())
    assert main(["check", "recipe.yaml", "--shape", "h100x1"]) == 0
    assert "device-hours: the shape h100x1 has no rate\n" in capsys.readouterr().out


def test_a_shape_with_a_rate_gives_device_hours(capsys):
    write_small(Path())
    base = load_recipe(Path("recipe.yaml"))
    shape = make_plan(base).shape.model_dump() | {"name": "fast", "rate": {"tflops": 1e-9, "basis": "measured"}}
    Path("fast.yaml").write_text(json.dumps(shape))
    assert main(["check", "recipe.yaml", "--shape", "fast.yaml", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    # 10 steps x 2 rows x 16.29 tokens x 4 FLOPs x (18,432 in blocks + 10,240 in the head), at 1,000 FLOP/s
    assert about["device_hours"] == pytest.approx(10 * 2 * (22 / 3.5 + 10) * 4 * 28_672 / 1000 / 3600)
    assert about["rate_basis"] == "measured"


def test_the_shape_says_why_and_on_what_basis(capsys):
    write_small(Path())
    assert main(["check", "recipe.yaml", "--set", "shape=auto"]) == 0
    assert section(capsys.readouterr().out, "small: sft") == [
        "shape cpu (CPU), by auto: the smallest that fits",
        "supports LoRA of up to 6.7 B parameters, and with a small model rows of up to 65,536 tokens "
        "(limits estimated)",
    ]


def test_launch_commands_can_be_typed(capsys):
    write_small(Path())
    argv = ["check", "recipe.yaml", "--set", "name=a", "--set", "data.columns={a: b}", "--set", "data.columns={}"]
    assert main(argv) == 0
    given = "--set name=a --set 'data.columns={a: b}' --set 'data.columns={}'"
    trainer, accelerate, torchrun, slurm = section(capsys.readouterr().out, "launch")
    assert trainer == f"trainer trainer train recipe.yaml {given}"
    assert accelerate.startswith("accelerate accelerate launch --config_file ")
    assert accelerate.endswith(f"-m trainer.worker recipe.yaml {given}")
    assert torchrun == f"torchrun torchrun --nproc_per_node 1 -m trainer.worker recipe.yaml {given}"
    assert slurm == f"slurm trainer submit recipe.yaml {given} --launcher slurm"


def test_on_two_machines_each_launcher_is_told_its_rank(capsys):
    write_small(Path())
    assert main(["check", "recipe.yaml", "--shape", "h100x16", "--json"]) == 0
    commands = json.loads(capsys.readouterr().out)["commands"]
    assert (
        "--num_processes 16 --num_machines 2 --machine_rank $NODE_RANK --main_process_ip $MAIN_IP "
        "--main_process_port 29500 -m trainer.worker recipe.yaml --shape h100x16"
    ) in commands["accelerate"]
    assert commands["torchrun"] == (
        "torchrun --nproc_per_node 8 --nnodes 2 --node_rank $NODE_RANK --master_addr $MAIN_IP --master_port 29500 "
        "-m trainer.worker recipe.yaml --shape h100x16"
    )


def test_every_value_is_shown_with_its_origin(capsys):
    write_small(Path(), RFT)
    assert main(["check", "recipe.yaml", "--set", "seed=7", "--values"]) == 0
    values = section(capsys.readouterr().out, "values")
    for line in (
        "seed 7 --set",
        "algorithm.clip_low 0.1 recipe.yaml:12",
        "algorithm.clip_high 0.28 preset dapo",
        "rollout.temperature 1 default",
        "rewards.0.use last_number recipe.yaml:17",
        "data.eval null default",
        "shape cpu recipe.yaml:19",
        "shape.micro_batch_tokens 1024 shape cpu",
    ):
        assert line in values


def test_json_is_one_document_with_everything(capsys):
    write_small(Path())
    assert main(["check", "recipe.yaml", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about.keys() == {
        "recipe", "name", "method", "training", "model", "identity", "shape", "batch", "memory", "device_hours",
        "rate_basis", "commands", "values", "warnings", "separate_reason",
    }  # fmt: skip
    assert about["batch"]["accumulation"] == 1
    assert about["model"] == {"path": "model", "params": 28_832, "adapted": None}
    assert about["values"]["lora.rank"] == {"value": 4, "origin": "recipe.yaml:6"}
    assert about["values"]["lora.alpha"] == {"value": 32.0, "origin": "default"}
    assert about["memory"]["total_gib"] == pytest.approx(sum(about["memory"]["parts_gib"].values()))


def test_colour_only_where_it_is_seen(capsys):
    write_small(Path())
    assert main(["check", "recipe.yaml"]) == 0
    assert "\x1b" not in capsys.readouterr().out
    about = describe_plan(make_plan(load_recipe(Path("recipe.yaml"))), "recipe.yaml")
    colored, plain = report_lines(about, is_colored=True, with_values=True), report_lines(about, with_values=True)
    assert [re.sub(r"\x1b\[\d+m", "", line).rstrip() for line in colored] == plain
    is_dim = ["\x1b[2m" in line for line in colored]
    assert any(is_dim)
    assert is_dim == [line.endswith("  default") for line in plain]


def test_a_narrow_terminal_folds_long_values_and_loses_nothing():
    write_small(Path(), SFT.replace("train: train.jsonl", "train: train.jsonl\n  columns: {prompt: a, completion: b}"))
    report = describe_plan(make_plan(load_recipe(Path("recipe.yaml"))), "recipe.yaml")
    report = replace(report, values={"data.system": ValueReport("word " * 40, "recipe.yaml:7")})
    values = report_lines(report, width=60, with_values=True)
    values = values[values.index("values") + 1 : -2]  # the verdict stands below
    assert max(len(line) for line in values) <= 60
    assert " ".join(" ".join(values).split()).count("word") == 40


def test_a_model_of_unknown_size_is_not_estimated(capsys):
    write_small(Path(), SFT.replace("path: model", f"path: owner/unknown\n  revision: {'a' * 40}"))
    assert main(["check", "recipe.yaml"]) == 0
    captured = capsys.readouterr()
    assert "memory per device: no estimate, the sizes of the model are unknown" in captured.out
    assert "owner/unknown: the sizes of the model are unknown, so it was not checked that it fits cpu" in captured.err


def test_shapes_are_listed_with_limits_and_basis(capsys):
    assert main(["shapes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    lines, made = lines[: lines.index("")], lines[lines.index("") + 3 :]
    assert " ".join(lines[1].split()) == (
        "cpu CPU 16 6.7 B; rows to 65,536 tokens (estimated) 0.75 B; rows to 32,768 tokens (estimated)"
    )
    assert [line.split()[0] for line in lines[1:]] == [
        "cpu", "h100x1", "h200x1", "a100x8", "h100x8", "h100x8_dp", "h100x8_vllm2",
        "h200x8", "h200x8_dp", "h100x16", "h100x16_hsdp", "h200x16", "h200x16_hsdp",
    ]  # fmt: skip
    assert [line.split()[0] for line in made] == [
        "rtx3090", "rtx4090", "rtx5090", "a6000", "l40s", "a100_40g", "a100", "h100", "h200", "b200",
    ]  # fmt: skip
    assert " ".join(made[1].split()) == "rtx4090 RTX-4090-24G 23.5 165.2 1008 none"


def test_shapes_say_which_of_them_a_recipe_fits_and_why_not(capsys):
    write_small(Path(), SFT.replace("max_seq_tokens: 128", "max_seq_tokens: 70000"))
    assert main(["shapes", "recipe.yaml"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert lines["cpu"].endswith("supports sequences up to 65,536 tokens (estimated)")
    assert lines["h100x1"].endswith("  fits")
    assert lines["h200x1"].endswith("  fits")
    assert lines["rtx4090"].endswith("  does not fit")
    assert lines["h100"].endswith("  fits h100x1")
    assert lines["h200"].endswith("  fits h200x1")


def test_a_printed_shape_is_a_shape_file(capsys):
    assert main(["shapes", "--print", "rtx4090x2"]) == 0
    Path("mine.yaml").write_text(capsys.readouterr().out)
    assert find_shape("mine.yaml") == find_shape("rtx4090x2")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What `check` starts as a second process, without starting it."""
    commands: list[list[str]] = []

    def record(argv: list[str], *, check: bool) -> subprocess.CompletedProcess[str]:
        assert not check
        commands.append(argv)
        return subprocess.CompletedProcess(argv, 2)

    run: Callable[..., subprocess.CompletedProcess[str]] = record
    monkeypatch.setattr("trainer.commands.check.subprocess.run", run)
    return commands


def test_data_and_rewards_start_a_second_process_and_return_its_code(started):
    write_small(Path(), RFT)
    argv = ["check", "recipe.yaml", "--data", "--rewards", "--set", "seed=1", "--shape", "h100x1", "--html", "a.html"]
    assert main(argv) == 2
    assert started == [
        [sys.executable, "-m", "trainer.checks.data_and_rewards", "recipe.yaml", "--set", "seed=1",
         "--shape", "h100x1", "--data",
         "--html", "a.html", "--rewards"],
    ]  # fmt: skip


def test_mistakes_are_found_before_a_second_process_is_started(started):
    write_small(Path(), SFT.replace("steps: 10\n", ""))
    assert main(["check", "recipe.yaml", "--data"]) == 2
    assert started == []


@pytest.mark.parametrize("recipe", sorted(path.name for path in (ROOT / "recipes").glob("*.yaml")))
def test_every_shipped_recipe_passes_and_saves_checkpoints(recipe, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    if "SmolLM2" in (ROOT / "recipes" / recipe).read_text() and not (ROOT / "models/SmolLM2-135M-Instruct").is_dir():
        pytest.skip("needs the embedded model")
    begins_with_a_run = "warm_start" in (ROOT / "recipes" / recipe).read_text()
    override = ["--set", "lora.warm_start=null"] if begins_with_a_run else []
    if "sampler: vllm" in (ROOT / "recipes" / recipe).read_text():  # else it needs an environment with vLLM
        override += ["--set", "rollout.vllm_url=http://127.0.0.1:8000"]
    assert main(["check", f"recipes/{recipe}", "--json", *override]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["values"]["dcp_save_interval"]["value"] > 0
    assert about["memory"]["total_gib"] < about["memory"]["available_gib"]
