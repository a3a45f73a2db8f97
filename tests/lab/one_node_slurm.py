"""A Slurm of one node for tests, from Debian's packages slurm-wlm and munge, in a folder of its own."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CONFIG = """
ClusterName=twofold
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
MpiDefault=none
SchedulerParameters=sched_interval=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=test Nodes=ALL Default=YES State=UP
"""


def missing() -> str | None:
    """Why there can be no Slurm here; None where there can."""
    absent = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name, path=_path()) is None]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "a Slurm for tests is started as root"


@contextmanager
def one_node_slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Run munge, slurmctld and slurmd, and yield the environment in which Slurm's commands reach them."""
    host = socket.gethostname()
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    config = folder / "slurm.conf"
    config.write_text(_CONFIG.format(host=host, folder=folder, ports=_free_ports(2)))
    environment = {"SLURM_CONF": str(config), "PATH": _path()}
    with _munge():
        started = []
        try:
            for name, options in (("slurmctld", ["-D", "-f", str(config)]), ("slurmd", ["-D", "-f", str(config)])):
                with (folder / f"{name}.out").open("w") as log:
                    started.append(
                        subprocess.Popen([name, *options], env=os.environ | environment, stdout=log, stderr=log)
                    )
            _wait_until_idle(environment, folder)
            yield environment
        finally:
            for process in reversed(started):
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    process.kill()


@contextmanager
def _munge() -> Iterator[None]:
    """Start munged, unless one answers."""
    if _answers():
        yield
        return
    user = pwd.getpwnam("munge")
    run = Path("/run/munge")
    run.mkdir(exist_ok=True)
    os.chown(run, user.pw_uid, user.pw_gid)
    run.chmod(0o755)
    with subprocess.Popen(
        ["munged", "--foreground"], user="munge", group=user.pw_gid, env={"PATH": _path()}
    ) as process:
        try:
            _wait(_answers, "munge does not answer")
            yield
        finally:
            process.terminate()


def _answers() -> bool:
    command = "munge -n | unmunge"
    return subprocess.run(command, shell=True, capture_output=True, check=False).returncode == 0


def _wait_until_idle(environment: dict[str, str], folder: Path) -> None:
    def idle() -> bool:
        command = ["sinfo", "--noheader", "--format=%T"]
        found = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
        return found.stdout.strip() == "idle"

    try:
        _wait(idle, "Slurm's node is not idle")
    except TimeoutError as error:
        logs = [path.read_text()[-2000:] for path in sorted(folder.glob("*.log")) + sorted(folder.glob("*.out"))]
        raise TimeoutError("\n".join([str(error), *logs])) from error


def _wait(condition, message: str) -> None:
    end = time.monotonic() + 60
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(message)
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
