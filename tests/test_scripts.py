"""Every shell script prints its usage and refuses a wrong argument in one line."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "scripts").rglob("*.sh"))
SOURCED = {"scripts/_launch.sh", "scripts/set_env_vars_template.sh", "scripts/set_env_vars.sh"}
COMMANDS = [script for script in SCRIPTS if script not in SOURCED]
STAGES = [script for script in COMMANDS if re.match(r"scripts/train/\d", script)]
SHARED_STAGES = [script for script in STAGES if "/2_" in script or "/5a_" in script]
TRAINING_STAGES = [script for script in STAGES if script not in SHARED_STAGES]


def bash(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    cleared = {
        "GPUS",
        "NNODES",
        "NODE_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "MAX_RESTARTS",
        "WORKERS",
        "PRECISION",
        "PYPATH",
        "PYTHON",
        "VENV",
    }
    environment = {key: value for key, value in os.environ.items() if key not in cleared} | variables
    return subprocess.run(
        ["bash", *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )


def assert_refuses(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode != 0
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


@pytest.fixture
def echo_python(tmp_path: Path) -> str:
    """An interpreter that prints its arguments and its thread count, one call a line, and does nothing."""
    return str(executable(tmp_path / "python", 'echo "$@" "threads=${OMP_NUM_THREADS:-}"'))


def executable(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("script", [*SCRIPTS, ".ci/run"])
def test_bash_can_read_it(script: str) -> None:
    assert bash("-n", script).returncode == 0
    if script not in SOURCED:
        assert "set -euo pipefail" in (ROOT / script).read_text()


@pytest.mark.parametrize("script", COMMANDS)
def test_help(script: str) -> None:
    result = bash(script, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"bash {script}" in result.stdout


@pytest.mark.parametrize("script", [script for script in COMMANDS if script != "scripts/test.sh"])
def test_wrong_argument_is_one_line(script: str) -> None:
    assert_refuses(bash(script, "--no-such-flag"), "--no-such-flag")


@pytest.mark.parametrize("script", STAGES)
def test_stage_without_config_or_with_a_stray_word(script: str, tmp_path: Path) -> None:
    config = tmp_path / "a config.yaml"
    config.touch()
    assert_refuses(bash(script), "CONFIG.yaml")
    assert_refuses(bash(script, "configs/none.yaml"), "configs/none.yaml")
    assert_refuses(bash(script, str(config), "run.steps", "5"), "'run.steps'")
    assert_refuses(bash(script, str(config), VENV=str(tmp_path / "none")), "env_install.sh")


@pytest.mark.parametrize("script", TRAINING_STAGES)
def test_training_stage_starts_one_process(script: str, tmp_path: Path, echo_python: str) -> None:
    config = tmp_path / "a config.yaml"
    config.touch()
    result = bash(script, str(config), "run.steps=5", "--dry-run", PYPATH=echo_python, PRECISION="bf16")
    assert result.returncode == 0
    modules = {"3_router": "tokenizer.router.train", "5b_gpt": "autoregressive.train"}
    module = next((module for part, module in modules.items() if part in script), "tokenizer.train")
    assert result.stdout.split(" threads=")[0] == f"-m {module} {config} run.precision=bf16 run.steps=5 --dry-run"


def test_training_stage_starts_torchrun_for_several_processes(tmp_path: Path, echo_python: str) -> None:
    script, config = "scripts/train/1_proxy_tokenizer.sh", tmp_path / "proxy.yaml"
    config.touch()

    def started(*words: str, **variables: str) -> str:
        return bash(script, str(config), *words, PYPATH=echo_python, OMP_NUM_THREADS="1", **variables).stdout.strip()

    stage = f"-m tokenizer.train {config} threads=1"
    run = "-m torch.distributed.run"
    assert started(GPUS="8") == f"{run} --nnodes 1 --nproc-per-node 8 --standalone --max-restarts 0 {stage}"
    several = {"NNODES": "2", "GPUS": "4", "NODE_RANK": "1", "MASTER_ADDR": "first", "MAX_RESTARTS": "3"}
    rendezvous = "--node-rank 1 --master-addr first --master-port 29500"
    assert started(**several) == f"{run} --nnodes 2 --nproc-per-node 4 {rendezvous} --max-restarts 3 {stage}"
    assert "--global-batch-size=64" in started("--global-batch-size=64", "--overfit-one-batch")
    for wrong, word in (({"GPUS": "all"}, "'all'"), ({"NNODES": "2"}, "MASTER_ADDR"), ({"NODE_RANK": "1"}, "NNODES=1")):
        assert_refuses(bash(script, str(config), PYPATH=echo_python, **wrong), word)


def test_the_slurm_job_stops_the_run_and_goes_back_into_the_queue(tmp_path: Path) -> None:
    job = "scripts/slurm/train.sbatch"
    assert f"sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 {job}" in bash(job, "--help").stdout
    assert_refuses(bash(job, "train.py"), "'train.py'")
    signalled = 'trap "echo asked; exit 0" USR1; sleep 0.5; kill -USR1 $PPID; for i in {1..500}; do sleep 0.01; done'
    executable(tmp_path / "srun", signalled)
    executable(tmp_path / "scontrol", 'echo "scontrol $*"')
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = bash(job, "scripts/train/3_router.sh", "configs/debug/router.yaml", PATH=path, SLURM_JOB_ID="7")
    assert done.returncode == 0 and done.stdout.splitlines()[-2:] == ["asked", "scontrol requeue 7"]


@pytest.mark.parametrize("script", SHARED_STAGES)
def test_shared_work_starts_any_number_of_workers(script: str, tmp_path: Path, echo_python: str) -> None:
    config = tmp_path / "shared.yaml"
    config.touch()
    module = "tokenizer.router.curate" if "/2_" in script else "autoregressive.extract_codes"
    three = bash(script, str(config), "a=1", PYPATH=echo_python, WORKERS="3", OMP_NUM_THREADS="2")
    assert three.stdout == f"-m {module} {config} a=1 threads=2\n" * 3
    assert bash(script, str(config), PYPATH=echo_python).stdout.count(module) == 1
    half = bash(script, str(config), "a=1", PYPATH=echo_python, PRECISION="bf16", OMP_NUM_THREADS="2").stdout
    assert half == f"-m {module} {config} precision=bf16 a=1 threads=2\n"
    assert_refuses(bash(script, str(config), PYPATH=echo_python, WORKERS="many"), "WORKERS", "'many'")

    ranks = str(executable(tmp_path / "ranks", "echo $LOCAL_RANK"))  # decides which GPU a worker takes
    assert sorted(bash(script, str(config), PYPATH=ranks, WORKERS="3").stdout.split()) == ["0", "1", "2"]

    broken = str(executable(tmp_path / "broken", "exit 3"))
    assert_refuses(bash(script, str(config), PYPATH=broken, WORKERS="2"), "2 of 2 workers failed")


@pytest.mark.parametrize("script", [script for script in COMMANDS if script.endswith("_visualization.sh")])
def test_sampling_starts_a_process_for_each_gpu(script: str, echo_python: str) -> None:
    assert bash(script, "--x", PYPATH=echo_python).stdout.startswith("-m autoregressive.sample_")
    two = bash(script, "--x", PYPATH=echo_python, GPUS="2").stdout
    assert two.startswith("-m torch.distributed.run --standalone --nproc-per-node 2 -m autoregressive.sample_")
    assert_refuses(bash(script, "--x", PYPATH=echo_python, WORKERS="2"), "GPUS=n")


def test_stopping_curation_stops_its_workers(tmp_path: Path) -> None:
    config, sleeper = tmp_path / "curate.yaml", executable(tmp_path / "python", "echo started; exec sleep 50")
    config.touch()
    environment = os.environ | {"WORKERS": "2", "PYPATH": str(sleeper)}
    command = ["bash", "scripts/train/2_curate_router_data.sh", str(config)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as curation:
        assert curation.stdout is not None
        assert [curation.stdout.readline() for _ in range(2)] == ["started\n"] * 2
        curation.send_signal(signal.SIGINT)
        curation.communicate(timeout=10)  # ends only when no worker holds the pipe any more
    assert curation.returncode == 130


def test_set_up_installs_once(tmp_path: Path) -> None:
    venv, calls = tmp_path / "venv", tmp_path / "calls"
    executable(venv / "bin/python", f'echo "$@" >>"{calls}"')
    first = bash("scripts/env_install.sh", VENV=str(venv))
    assert first.returncode == 0 and "-m pip install" in calls.read_text()

    calls.unlink()
    again = bash("scripts/env_install.sh", VENV=str(venv))
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert not calls.exists(), "nothing has changed: pip must not be asked again"

    (venv / "evatok-installed").write_text("another pyproject.toml")
    assert bash("scripts/env_install.sh", VENV=str(venv)).returncode == 0
    assert "-m pip install" in calls.read_text()


def test_set_up_says_what_is_wrong(tmp_path: Path) -> None:
    too_old = str(executable(tmp_path / "python2", "exit 1"))
    assert_refuses(bash("scripts/env_install.sh", VENV=str(tmp_path / "venv"), PYTHON=too_old), "3.11", too_old)

    offline = executable(tmp_path / "venv/bin/python", 'case "$*" in *install*) exit 1;; esac')
    result = bash("scripts/env_install.sh", VENV=str(offline.parents[1]))
    assert result.returncode != 0 and result.stderr.count("\n") == 1 and "pip" in result.stderr
    assert not (offline.parents[1] / "evatok-installed").exists()


def test_environment_template_can_be_sourced() -> None:
    result = bash(
        "-euc", '. scripts/set_env_vars_template.sh && echo "$PROJECT_ROOT|$PYPATH|$PYTHONPATH"', PYTHONPATH="x"
    )
    assert result.stdout.strip() == f"{ROOT}|{ROOT}/.venv/bin/python|{ROOT}:x"
