"""Two hosts on one machine: network namespaces joined by a cable (a veth pair), a node of torchrun in each.

    python tests/helpers/two_hosts.py FOLDER        as root, on Linux

trains over the cable, kills one host in mid-run, waits for the other to end, and lets a run with --max-restarts go on
once the host is there again. Prints what happened and how long it took.
"""

import contextlib
import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ADDRESSES = ("10.77.0.1", "10.77.0.2")
STEPS = 60
FIT = [
    "fit", "--model=ClassificationTask", "--model.backbone_options={stem: patch4, depths: [1, 1, 1, 1]}",
    "--data=ShapesDataModule", "--data.size=32", "--data.train_size=80", "--data.val_size=8", "--data.batch_size=4",
    "--data.num_workers=0", "--report.images=0", "--trainer.max_epochs=6", "--trainer.log_every_n_steps=1",
    "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--checkpoint.last_every_n_steps=3",
    "--trainer.strategy=ddp", "--trainer.num_nodes=2", "--trainer.devices=1", "--ckpt_path=last",
]  # fmt: skip


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def why_not() -> str:
    """The reason why this machine permits no network namespaces; empty where it does."""
    if not shutil.which("ip"):
        return "there is no command ip (iproute2)"
    tried = subprocess.run(["ip", "netns", "add", f"try{os.getpid()}"], capture_output=True, text=True)
    if tried.returncode:
        return f"ip netns add: {tried.stderr.strip()}"
    try:
        ip("-n", f"try{os.getpid()}", "link", "add", "cable", "type", "veth", "peer", "name", "end")
    except subprocess.CalledProcessError as error:
        return f"ip link add: {error.stderr.strip()}"
    finally:
        ip("netns", "del", f"try{os.getpid()}")
    return ""


@contextlib.contextmanager
def two_hosts() -> Iterator[list[str]]:
    """Names of two namespaces, each with one end of a cable and nothing else."""
    hosts = [f"host{i}-{os.getpid()}" for i in (0, 1)]
    for host in hosts:
        ip("netns", "add", host)
    try:
        ip("link", "add", "cable", "netns", hosts[0], "type", "veth", "peer", "name", "cable", "netns", hosts[1])
        for host, address in zip(hosts, ADDRESSES, strict=True):
            ip("-n", host, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", host, "link", "set", "cable", "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield hosts
    finally:
        for host in hosts:
            ip("netns", "del", host)


def node(hosts: list[str], number: int, folder: Path, restarts: int) -> "subprocess.Popen[str]":
    """A node's torchrun; what it says goes to node_N.log in the folder, and it leads a process group."""
    launch = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d",
        f"--rdzv-endpoint={ADDRESSES[0]}:29400", "--rdzv-id=shunted", f"--local-addr={ADDRESSES[number]}",
        f"--rdzv-conf=is_host={1 - number},join_timeout=120", f"--max-restarts={restarts}", "-m", "shunted_lit",
    ]  # fmt: skip
    words = ["ip", "netns", "exec", hosts[number], *launch, *FIT, f"--trainer.default_root_dir={folder}"]
    # SHARE: else a node that comes back waits for an address that the first one told before it was there.
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "cable",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    with (folder / f"node_{number}.log").open("a") as log:
        return subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True)


def kill(process: "subprocess.Popen[str]") -> None:
    """All of a node at once, as where power fails: torchrun gives its workers sessions of their own."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout
    parents = {int(pid): int(parent) for pid, parent in (line.split() for line in listed.splitlines()[1:])}
    below = [process.pid]
    for pid in below:
        below += [child for child, parent in parents.items() if parent == pid]
    for pid in below:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def rows(folder: Path) -> list[int]:
    """Steps of which the run has written a loss."""
    file = folder / "version_0" / "metrics.csv"
    if not file.is_file():
        return []
    with file.open(newline="") as lines:
        return [int(row["step"]) for row in csv.DictReader(lines) if row.get("train/loss")]


def wait_for_steps(count: int, folder: Path, processes: list["subprocess.Popen[str]"], limit: float = 180) -> None:
    began = time.monotonic()
    while len(rows(folder)) < count:
        ended = [process.returncode for process in processes if process.poll() is not None]
        if ended or time.monotonic() - began > limit:
            raise RuntimeError(f"{len(rows(folder))} steps after {limit} s; nodes that ended: {ended}")
        time.sleep(0.2)


def survivor(hosts: list[str], folder: Path) -> tuple[int, float]:
    """Kills node 1 in mid-run; exit code of node 0, and how many seconds it took to end."""
    folder.mkdir(parents=True)
    nodes = [node(hosts, i, folder, restarts=0) for i in (0, 1)]
    try:
        wait_for_steps(8, folder, nodes)
        kill(nodes[1])
        began = time.monotonic()
        return nodes[0].wait(120), time.monotonic() - began
    finally:
        for process in nodes:
            kill(process)


def back_again(hosts: list[str], folder: Path) -> tuple[list[int], list[int]]:
    """Kills node 1 in mid-run and starts it again; exit codes of both, and the steps of the run."""
    folder.mkdir(parents=True)
    nodes = [node(hosts, i, folder, restarts=3) for i in (0, 1)]
    try:
        wait_for_steps(8, folder, nodes)
        kill(nodes[1])
        time.sleep(3)
        nodes[1] = node(hosts, 1, folder, restarts=3)
        return [process.wait(240) for process in nodes], rows(folder)
    finally:
        for process in nodes:
            kill(process)


if __name__ == "__main__":
    if reason := why_not():
        sys.exit(reason)
    place = Path(sys.argv[1])
    with two_hosts() as pair:
        code, seconds = survivor(pair, place / "survivor")
        print(f"one host was killed: the other ended after {seconds:.0f} s with exit code {code}")
        began = time.monotonic()
        codes, steps = back_again(pair, place / "back_again")
        print(
            f"one host was killed and came back: exit codes {codes}, {len(steps)} steps, {sorted(set(steps)) == steps}"
        )
        print(f"{time.monotonic() - began:.0f} s")
