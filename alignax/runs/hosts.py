"""Several processes as one run: start-up, checks that all hosts agree, and exit.

The checks run in about a second, before anything compiles. They find a commit, config or
library that differs on one host, a coordinator behind a firewall, a workdir that only some
hosts see, and a full disk. Values are exchanged through the coordinator's key-value store
and not by a collective, since processes that differ could not compile the same collective.
"""

import contextlib
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
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax._src import clusters, distributed  # neither has a public name

from alignax.runs import checkpoint, workdirs

LEAST_FREE = 2**30  # bytes of disk below which no host starts
PATIENCE = 60.0  # seconds until a file of another host must be seen
ROOT = pathlib.Path(__file__).parents[2]
log = logging.getLogger(__name__)
_asked = itertools.count()  # a key of the store can be written only once


def start(timeout: float = 300.0) -> None:
    """`jax.distributed.initialize`, with errors that name the hosts.

    The address of process 0, the number of processes and the index of this one are read
    from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (the launchers set
    them). Without these jax detects them: on a TPU, under Slurm, in Kubernetes.

    Args:
      timeout: seconds to wait for the coordinator, and then for the other processes. If
        some do not connect, this process exits with 1, since jax would abort it.

    Raises:
      OSError: the coordinator cannot be reached.
      ValueError: only some of the variables are set, or jax finds no cluster.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given: Any = [os.environ.get(name) or None for name in names]
    method = "deactivate" if all(given) else None
    if any(given[1:]) and not all(given):
        raise ValueError(
            f"{[n for n, v in zip(names, given, strict=True) if not v]} not set, though "
            f"{[n for n, v in zip(names, given, strict=True) if v]} are: set all or none"
        )
    try:
        if not all(given):
            detect: Any = clusters.ClusterEnv.auto_detect_unset_distributed_params
            given = detect(*given, None, None, int(timeout))[:3]
        if None in given:
            raise ValueError(f"jax finds no cluster here: set {', '.join(names)}")
        address, count, index = given[0], int(given[1]), int(given[2])
        if index:
            reach(address, index, timeout)
        late = threading.Timer(timeout, _timed_out, (address, index, count, timeout))
        late.daemon = True
        late.start()
        try:
            jax.distributed.initialize(
                address, count, index, cluster_detection_method=method,
                initialization_timeout=int(timeout) + 60,
            )  # fmt: skip
        finally:
            late.cancel()
    except RuntimeError as error:
        raise OSError(f"host {socket.gethostname()}: {error}") from error


def _timed_out(address: str, index: int, count: int, timeout: float) -> None:
    """Exits a process whose peers did not connect in time, with hints."""
    print(
        f"error: host {socket.gethostname()} (process {index}): not all of {count} "
        f"processes met at {address} within {timeout:g} s. Is every one started, and is "
        "that port (JAX_COORDINATOR_PORT; on a TPU 8482 since jax 0.8.1) open to all?",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(1)


def reach(address: str, index: int, timeout: float) -> None:
    """Waits until a port accepts a connection.

    Args:
      address: 'host:port'.
      index: of this process, for the message.
      timeout: seconds.

    Raises:
      OSError: no connection within the timeout.
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
    """The values (JSON) that all processes pass here, in the order of the processes.

    Raises:
      OSError: a process does not report within `timeout` seconds.
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
            raise OSError(f"process {i} did not report within {timeout:g} s") from error
        out.append(json.loads(got))
    return out


def agree(look: Callable[[], Any]) -> tuple[list[str], list[Any]]:
    """Runs a function on all hosts: (names of the hosts, its results), by process.

    Args:
      look: returns JSON. If it raises on one host, all of them raise, so that none waits
        for a host that has failed.

    Raises:
      OSError: it failed on some host; the message has the hosts and their errors. With a
        single process the error is raised as it is.
    """
    if _size()[0] == 1:
        return [socket.gethostname()], [look()]
    found, wrong = None, ""
    try:
        found = look()
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"
    names, values, failed = zip(
        *exchange([socket.gethostname(), found, wrong]), strict=True
    )
    if any(failed):
        lines = [f"{names[i]} (process {i}): {x}" for i, x in enumerate(failed) if x]
        raise OSError("; ".join(lines))
    return list(names), list(values)


def check(config, workdir: str, patience: float = PATIENCE) -> None:
    """Checks that all hosts agree, before anything compiles.

    Args:
      config: a ConfigDict.
      workdir: folder of the run, made here.
      patience: seconds until every host must see a file that process 0 writes there.

    Raises:
      ValueError: hosts differ in their code, config, libraries or devices; the message
        names the hosts and both values.
      OSError: a host does not see the workdir that process 0 wrote to, has too little
        disk left, or fails otherwise; it is named.
    """
    folder, token = checkpoint.absolute(workdir), secrets.token_hex(8)
    written: list[Any] = []

    def ready():
        check_disk(workdir)
        if _size()[1] == 0:
            folder.mkdir(parents=True, exist_ok=True)
            written.append(folder / f".seen-{token}")
            written[0].write_text(token)
        return token, facts(config)

    def seen():
        path, end = folder / f".seen-{token}", time.monotonic() + patience
        while not path.exists():  # a network file system may show a new file late
            if time.monotonic() > end:
                raise OSError(
                    f"workdir {folder}: what process 0 wrote is not visible here; it must "
                    "be on a file system that all hosts share, or in a bucket"
                )
            time.sleep(0.2)

    try:
        names, found = agree(ready)
        compare(names, [reported for _, reported in found])
        token = found[0][0]
        agree(seen)
    finally:
        for path in written:
            with contextlib.suppress(OSError):
                path.unlink()
    if distributed.global_state.client is not None:  # starts the devices, on all
        kinds = sorted({device.device_kind for device in jax.local_devices()})
        here = f"{jax.local_device_count()} x {', '.join(kinds)}"
        compare(names, exchange({"local devices": here}))
        if jax.process_index() == 0:
            log.info("%d processes agree; each has %s", len(names), here)


def meet(what: str, timeout: float = 3600.0) -> None:
    """Waits until every process is here: the timeout of the first collective is shorter.

    Raises:
      OSError: a process does not arrive within `timeout` seconds.
    """
    try:
        exchange(what, timeout)
    except OSError as error:
        raise OSError(f"{what}: {error}") from error


def facts(config) -> dict[str, str]:
    """What must be the same on every host: versions, code and config, as text."""
    # Versions of all loaded packages, and of libtpu, which the devices will load.
    owners = importlib.metadata.packages_distributions()
    loaded = {name.split(".")[0] for name in sys.modules} | {"libtpu"}
    names = {owner for module in loaded for owner in owners.get(module, ())}
    found = {name: importlib.metadata.version(name) for name in sorted(names)}
    found["python"] = platform.python_version()
    text = json.dumps(workdirs.plain(config), sort_keys=True)
    from alignax import __version__

    found |= {
        "alignax": __version__,
        "commit": commit(),
        "code": digest(),
        "config": hashlib.sha256(text.encode()).hexdigest()[:12],
    }
    return found


def commit(root: pathlib.Path = ROOT) -> str:
    """Commit of the code, from git or a copied tree's file COMMIT; '' if unknown."""
    if (root / "COMMIT").exists():
        return (root / "COMMIT").read_text().strip()
    try:
        asked = ["git", "-C", str(root), "rev-parse", "HEAD"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def digest(package: pathlib.Path = ROOT / "alignax") -> str:
    """Hash of the package's source files, committed or not."""
    whole = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        whole.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return whole.hexdigest()[:12]


def compare(names: Sequence[str], reported: Sequence[dict[str, str]]) -> None:
    """Raises ValueError if a host reports another value than process 0.

    A value that is unknown on a host ('') is not compared.
    """
    wrong = []
    for key, first in reported[0].items():
        for i, other in enumerate(reported):
            value = other.get(key, "")
            if first and value and value != first:
                wrong.append(
                    f"{key} is {first} on {names[0]} (process 0) and {value} on "
                    f"{names[i]} (process {i})"
                )
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError("the hosts differ: " + "; ".join(wrong[:8]) + more)


def check_disk(workdir: str) -> None:
    """Raises OSError if too little disk is free at the workdir; for a bucket, in /tmp."""
    folder = pathlib.Path(tempfile.gettempdir())
    if "://" not in str(workdir):
        folder = pathlib.Path(workdir).absolute()
        while not folder.exists():
            folder = folder.parent
    left = shutil.disk_usage(folder).free
    if left < LEAST_FREE:
        raise OSError(
            f"{folder} has {left / 2**20:.0f} MiB left, less than {LEAST_FREE / 2**30:g} GiB"
        )


def leave(code: int, patience: float = 10.0) -> None:
    """Exits after an error; if there are other processes, without waiting for them.

    jax would wait for minutes at a barrier for processes that are in a collective.
    """
    count, _ = _size()
    if count == 1:
        sys.exit(code)
    client = distributed.global_state.client
    assert client is not None
    try:  # if all fail alike, each prints its error before the coordinator is gone
        client.wait_at_barrier("alignax/failed", int(1000 * patience))
    except RuntimeError:
        log.error("this process ends alone; the others will fail without it")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _size() -> tuple[int, int]:
    """(number of processes, index of this one), without starting the devices."""
    state = distributed.global_state
    if state.client is None:
        return 1, 0
    return state.num_processes, state.process_id
