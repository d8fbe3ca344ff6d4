"""Several hosts on one machine: a network namespace each, with an address of its own, on one bridge.

They share files and processes, and nothing else: what one of them binds to its loopback no other sees, what it binds
to its address they see through the bridge. Needs root and iproute2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

PORT, DASHBOARD, METRICS = 6379, 8265, 8090  # each host has all ports to itself
TOKEN = "7" * 64


def missing() -> str:
    """Why there can be no hosts here; "" where there can."""
    if not shutil.which("ip"):
        return "several hosts on one machine need iproute2"
    if os.geteuid() != 0 or subprocess.run(["ip", "netns", "add", f"gt{os.getpid()}"], capture_output=True).returncode:
        return "several hosts on one machine need root and network namespaces"
    subprocess.run(["ip", "netns", "del", f"gt{os.getpid()}"], check=True)
    return ""


class Host:
    """One of them."""

    def __init__(self, name: str, address: str, scratch: Path) -> None:
        self.name, self.address, self.scratch = name, address, scratch
        self.ray: subprocess.Popen[bytes] | None = None

    def command(self, words: Sequence[str]) -> list[str]:
        return ["ip", "netns", "exec", self.name, *words]

    def run(self, words: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        options.setdefault("env", os.environ | AUTH)
        return subprocess.run(self.command(words), capture_output=True, text=True, **options)

    def start_ray(self, cpus: float, head: Host | None) -> None:
        """A node of the cluster whose head is `head`, or a head."""
        words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={self.address}",
                 f"--num-cpus={cpus}", f"--metrics-export-port={METRICS}",
                 f"--temp-dir={self.scratch}", "--disable-usage-stats"]  # fmt: skip
        words += [f"--address={head.address}:{PORT}"] if head else [
            "--head", f"--port={PORT}", "--dashboard-host=0.0.0.0", f"--dashboard-port={DASHBOARD}",
        ]  # fmt: skip
        with (self.scratch / "out.txt").open("wb") as out:
            self.ray = subprocess.Popen(self.command(words), stdout=out, stderr=out, env=os.environ | AUTH)

    def listens(self, port: int) -> bool:
        """Whether somebody there answers, asked from within the network."""
        probe = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 1)"
        return self.run([sys.executable, "-c", probe, self.address, str(port)]).returncode == 0

    def stop_ray(self) -> None:
        if self.ray is not None:
            self.ray.terminate()
            try:
                self.ray.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.ray.kill()
                self.ray.wait()
        # what is left in the namespace
        left = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True).stdout.split()
        for pid in left:
            subprocess.run(["kill", "-9", pid], capture_output=True)


AUTH = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """`count` hosts that see each other."""
    mark = f"g{os.getpid() % 100000}"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    with ExitStack() as stack:
        ip("link", "add", f"{mark}b", "type", "bridge")
        stack.callback(ip, "link", "del", f"{mark}b")
        ip("link", "set", f"{mark}b", "up")
        every = []
        for i in range(count):
            name = f"{mark}n{i}"
            scratch = Path(tempfile.mkdtemp(prefix=f"ray{i}-"))
            stack.callback(shutil.rmtree, scratch, ignore_errors=True)
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
            ip("link", "add", f"{mark}v{i}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"{mark}v{i}", "master", f"{mark}b", "up")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "address", "add", f"10.77.0.{i + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            host = Host(name, f"10.77.0.{i + 1}", scratch)
            stack.callback(host.stop_ray)
            every.append(host)
        yield every


@contextmanager
def ray_cluster(cpus: Sequence[float]) -> Iterator[list[Host]]:
    """A Ray cluster of hosts with so many CPUs each; the first is the head."""
    with hosts(len(cpus)) as every:
        head = every[0]
        for host, count in zip(every, cpus, strict=True):
            host.start_ray(count, None if host is head else head)
            if host is head:
                wait_for(lambda: head.listens(PORT) and head.listens(DASHBOARD), 90)
        ask = "import ray; ray.init(log_to_driver=False); print(sum(n['Alive'] for n in ray.nodes()))"
        address = {"RAY_ADDRESS": f"{head.address}:{PORT}"}

        def joined() -> bool:
            done = head.run([sys.executable, "-c", ask], env=os.environ | AUTH | address)
            return done.stdout.split()[-1:] == [str(len(cpus))]

        wait_for(joined, 90)
        yield every


def wait_for(true: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{true} has not come true within {seconds:g} s")
        time.sleep(0.5)
