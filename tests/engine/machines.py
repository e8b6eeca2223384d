"""Machines of a cluster, as agents of torchrun on this one."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]

# The real command, on one thread, with shards of eight images; what follows may change more.
_PROGRAM = """
import datetime, os, signal, sys, time
import torch
from selftrain_d2.cli import main
from selftrain_d2.data.pseudo_labels import writer
torch.set_num_threads(1)
writer.SHARD_SIZE = 8
rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
{change}
sys.exit(main(sys.argv[1:]))
"""

# An agent that gives no sign of life for a minute counts as lost: on a busy computer three seconds are nothing.
_CONF = "keep_alive_interval=2,keep_alive_max_attempt=30,read_timeout=600"


class Machines:
    """Machines of ``processes`` processes each that run one command.

    Args:
        number: of machines, or "1:2" for as many as there are, of up to two.
        folder: for the program and what the machines print.
        change: Python code that every process begins with; it knows its ``rank``, and its ``attempt`` from 0.
        restarts: how often the processes may be started anew.
    """

    def __init__(self, folder, arguments, *, number=2, processes=2, change="", restarts=0):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.folder = folder
        (folder / "program.py").write_text(_PROGRAM.format(change=change))
        self._command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", str(number), "--nproc-per-node", str(processes),
            "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test",
            "--local-addr", "127.0.0.1", "--max-restarts", str(restarts),
            "--monitor-interval", "0.1", str(folder / "program.py"), *map(str, arguments),
        ]  # fmt: skip
        self.agents = [self._start(machine) for machine in range(int(str(number).split(":")[-1]))]

    def _start(self, machine):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # docs/training.md: for restarts
        # Machine 0 has the rendezvous, not whichever comes first: a machine that is killed must not take it along.
        conf = ["--rdzv-conf", f"{_CONF},is_host={machine == 0}"]
        with open(self.folder / f"machine_{machine}.txt", "a") as output:
            return subprocess.Popen(
                [*self._command[:3], *conf, *self._command[3:]],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def kill(self, machine):
        """The agent and all its processes, at once."""
        agent = self.agents[machine]
        workers = _children(agent.pid)
        for pid in (agent.pid, *workers):
            os.kill(pid, signal.SIGKILL)
        agent.wait()

    def start_again(self, machine):
        self.agents[machine] = self._start(machine)

    def wait(self, seconds=1800):
        """Exit codes of the agents; the time is for those that hang, not for a busy computer."""
        end = time.monotonic() + seconds
        return [agent.wait(max(0.0, end - time.monotonic())) for agent in self.agents]

    def output(self):
        """What all machines printed."""
        return "".join(path.read_text() for path in sorted(self.folder.glob("machine_*.txt")))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for machine, agent in enumerate(self.agents):
            if agent.poll() is None:
                self.kill(machine)


def _children(pid):
    """Processes that a process has started, and those that they have."""
    found = [
        int(child)
        for task in Path(f"/proc/{pid}/task").glob("*/children")
        for child in task.read_text().split()
    ]
    return [*found, *(grandchild for child in found for grandchild in _children(child))]
