"""Several processes as one run: how they start, what has to be the same, how they end.

What makes a run on many hosts fail after an hour in a queue is seen here in a second,
before anything compiles: another commit, config or library on one host, a coordinator
behind a firewall, a workdir that only some of them see, a full disk. Facts are exchanged
through the coordinator's key-value store, not by a collective: processes that differ
could not compile the same one.
"""

import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
import pathlib
import platform
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
from jax._src import distributed  # the key-value store has no public name

from alignax import checkpoint, workdirs

LEAST_FREE = 2**30  # bytes of disk below which no host starts
PATIENCE = 60.0  # seconds for what another host has written to be seen
ROOT = pathlib.Path(__file__).parents[1]
log = logging.getLogger(__name__)
_asked = itertools.count()  # a name in the store is written once


def start(timeout: float = 300.0) -> None:
    """`jax.distributed.initialize`, with an error that says who could not reach whom.

    The address of process 0, the number of processes and this one's place are read from
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (the launchers set them)
    or, without these, found by jax: on a TPU, under Slurm, in Kubernetes.

    Args:
      timeout: seconds to wait for the others.

    Raises:
      OSError: the coordinator cannot be reached, or not all processes came.
      ValueError: only some of the variables are there.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [os.environ.get(name, "") for name in names]
    if any(given[1:]) and not all(given):
        raise ValueError(
            f"{[n for n, v in zip(names, given, strict=True) if not v]} not set, though "
            f"{[n for n, v in zip(names, given, strict=True) if v]} are: set all or none"
        )
    settings: dict[str, Any] = {}
    if all(given):
        address, count, index = given[0], int(given[1]), int(given[2])
        settings = {
            "coordinator_address": address, "num_processes": count, "process_id": index,
            "cluster_detection_method": "deactivate",
        }  # fmt: skip
        if index:
            reach(address, index, timeout)
    try:
        jax.distributed.initialize(initialization_timeout=int(timeout), **settings)
    except (RuntimeError, OSError) as error:
        raise OSError(
            f"host {socket.gethostname()}: the processes did not find each other within "
            f"{timeout:g} s: {error}. Is every process started, and is the coordinator's "
            "port (JAX_COORDINATOR_PORT; on a TPU 8482 since jax 0.8.1) open?"
        ) from error


def reach(address: str, index: int, timeout: float) -> None:
    """Waits until a port answers.

    Args:
      address: 'host:port'.
      index: of this process, for the message.
      timeout: seconds.

    Raises:
      OSError: it does not.
    """
    host, port = address.rsplit(":", 1)
    end, why = time.monotonic() + timeout, ""
    while time.monotonic() < end:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
                return
        except OSError as error:
            why = str(error)
        time.sleep(0.2)
    raise OSError(
        f"host {socket.gethostname()} (process {index}) cannot reach the coordinator "
        f"{address} within {timeout:g} s: {why}. Is process 0 up, and is that port open?"
    )


def exchange(mine: Any, timeout: float = 300.0) -> list[Any]:
    """What every process says here (JSON), in the order of the processes.

    Raises:
      OSError: one of them says nothing.
    """
    count, index = _size()
    if count == 1:
        return [mine]
    client, name = distributed.global_state.client, f"alignax/{next(_asked)}"
    assert client is not None
    client.key_value_set(f"{name}/{index}", json.dumps(mine))
    out = []
    for i in range(count):
        try:
            got = client.blocking_key_value_get(f"{name}/{i}", int(1000 * timeout))
        except RuntimeError as error:
            raise OSError(f"process {i} said nothing in {timeout:g} s") from error
        out.append(json.loads(got))
    return out


def check(config, workdir: str) -> None:
    """What must hold on every host before anything compiles.

    Raises:
      ValueError: hosts differ in their code, config, libraries or devices; the message
        names the hosts and both values.
      OSError: a host does not see the workdir that process 0 wrote to, or has too
        little disk left.
    """
    names = exchange(socket.gethostname())
    compare(names, exchange(facts(config)))
    full = exchange(free(workdir))
    if short := [f"{n}: {line}" for n, line in zip(names, full, strict=True) if line]:
        raise OSError(
            f"less than {LEAST_FREE / 2**30:g} GiB of disk free on " + "; ".join(short)
        )
    check_shared(names, workdir)
    if distributed.global_state.client is not None:  # starts the devices
        kinds = sorted({device.device_kind for device in jax.local_devices()})
        here = f"{jax.local_device_count()} x {', '.join(kinds)}"
        compare(names, exchange({"local devices": here}))
        if jax.process_index() == 0:
            log.info("%d processes agree; each has %s", len(names), here)


def meet(what: str, timeout: float = 3600.0) -> None:
    """Waits until every process is here: the first collective waits less long.

    Raises:
      OSError: one of them does not come.
    """
    try:
        exchange(what, timeout)
    except OSError as error:
        raise OSError(f"{what}: {error}") from error


def facts(config) -> dict[str, str]:
    """What has to be the same on every host, as text."""
    # Versions of all that is loaded, and of what the devices will load.
    owners = importlib.metadata.packages_distributions()
    loaded = {name.split(".")[0] for name in sys.modules} | {"libtpu"}
    names = {owner for module in loaded for owner in owners.get(module, ())}
    found = {name: importlib.metadata.version(name) for name in sorted(names)}
    found["python"] = platform.python_version()
    said = json.dumps(workdirs.plain(config), sort_keys=True)
    from alignax import __version__

    found |= {
        "alignax": __version__,
        "commit": commit(),
        "code": digest(),
        "config": hashlib.sha256(said.encode()).hexdigest()[:12],
    }
    return found


def commit(root: pathlib.Path = ROOT) -> str:
    """Of the repository (by git, or by the file COMMIT of a copied tree); '' of none."""
    if (root / "COMMIT").exists():
        return (root / "COMMIT").read_text().strip()
    try:
        asked = ["git", "-C", str(root), "rev-parse", "HEAD"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def digest(package: pathlib.Path = ROOT / "alignax") -> str:
    """Of the code that runs, committed or not."""
    whole = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        whole.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return whole.hexdigest()[:12]


def compare(names: Sequence[str], said: Sequence[dict[str, str]]) -> None:
    """Raises ValueError if some host says another thing than process 0.

    A value that a host does not know ('') is not compared.
    """
    wrong = []
    for key, first in said[0].items():
        for i, other in enumerate(said):
            value = other.get(key, "")
            if first and value and value != first:
                wrong.append(
                    f"{key} is {first} on {names[0]} (process 0) and {value} on "
                    f"{names[i]} (process {i})"
                )
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError("the hosts differ: " + "; ".join(wrong[:8]) + more)


def free(workdir: str) -> str:
    """'' where this host has disk enough; else where how little is left."""
    folder = pathlib.Path(
        tempfile.gettempdir()
    )  # of a remote workdir, what is kept here
    if "://" not in str(workdir):
        folder = pathlib.Path(workdir).absolute()
        while not folder.exists():
            folder = folder.parent
    left = shutil.disk_usage(folder).free
    return f"{folder} has {left / 2**20:.0f} MiB" if left < LEAST_FREE else ""


def check_shared(
    names: Sequence[str], workdir: str, patience: float = PATIENCE
) -> None:
    """Raises OSError if some host does not see what process 0 writes to the workdir."""
    folder = checkpoint.absolute(workdir)
    _, index = _size()
    token, failed = secrets.token_hex(8), ""
    if index == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f".seen-{token}").write_text(token)
        except OSError as error:
            failed = f"cannot write to workdir {folder}: {error.strerror}"
    token, failed = exchange([token, failed])[0]
    if failed:
        raise OSError(failed)
    path, end = folder / f".seen-{token}", time.monotonic() + patience
    while not (seen := path.exists()) and time.monotonic() < end:
        time.sleep(0.2)  # a network file system may show a new file late
    everyone = exchange(seen)
    if index == 0:
        path.unlink(missing_ok=True)
    blind = [f"{names[i]} (process {i})" for i, ok in enumerate(everyone) if not ok]
    if blind:
        raise OSError(
            f"workdir {folder}: what {names[0]} (process 0) wrote is not seen on "
            f"{', '.join(blind)}; it must be on a file system that all hosts share, or in "
            "a bucket"
        )


def leave(code: int, patience: float = 10.0) -> None:
    """Ends this process after an error; beside others, without waiting for them.

    jax would wait minutes at a barrier for those that sit in a collective with us.
    """
    count, _ = _size()
    if count == 1:
        sys.exit(code)
    client = distributed.global_state.client
    assert client is not None
    try:  # where all fail alike, each says so before the coordinator is gone
        client.wait_at_barrier("alignax/failed", int(1000 * patience))
    except RuntimeError:
        log.error("this process ends alone; the others will miss it")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _size() -> tuple[int, int]:
    """(number of processes, index of this one), without starting the devices."""
    state = distributed.global_state
    if state.client is None:
        return 1, 0
    return state.num_processes, state.process_id
