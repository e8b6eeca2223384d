"""The processes of a run: of this machine, of several, or those that torchrun has started."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import pickle
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch.multiprocessing import ProcessRaisedException, start_processes

from selftrain_d2.engine.children import children_stopped
from selftrain_d2.engine.step_trainer import NonFiniteLossError
from selftrain_d2.errors import InputError, message_in
from selftrain_d2.processes import shared_store, wait_for_all

logger = logging.getLogger(__name__)


@dataclass
class Processes:
    """How many processes a run has; the fields are as the arguments of ``detectron2.engine.launch``."""

    num_gpus: int = 1
    num_machines: int = 1
    machine_rank: int = 0
    dist_url: str = "auto"


def run_in_processes(
    main: Callable[..., Any], processes: Processes | None, arguments: tuple, device: str = "cuda"
) -> None:
    """Call ``main(*arguments)`` in every process; in this one where there is only one (None).

    Under torchrun the processes are there already: this one joins them, and leaves at its end. Either all call this
    with the same arguments, or only the main one does, in :func:`main_process_leads`. Processes that this one started
    end with it, also when it alone is interrupted or gets SIGTERM.

    Args:
        device: MODEL.DEVICE: each process has a GPU of its own, unless this is the CPU or there is none.

    Raises:
        InputError, NonFiniteLossError: as ``main`` raised it in any process.
        InputError: this machine has fewer GPUs; see also :func:`check_processes`.
    """
    p = processes or Processes()
    check_processes(p, device)
    use_cuda = _uses_cuda(device)
    if use_cuda and p.num_gpus > torch.cuda.device_count():
        raise InputError(f"--num-gpus is {p.num_gpus}, this machine has {torch.cuda.device_count()}.")
    if torch.distributed.is_torchelastic_launched():
        with _in_group_of_torchrun(use_cuda):
            if _Calls.handed_out is not None:
                _Calls.handed_out.exchange((main, arguments))
            main(*arguments)
        return
    if p.num_gpus * p.num_machines == 1:
        main(*arguments)
        return
    group = {
        "init_method": f"tcp://127.0.0.1:{_free_port()}" if p.dist_url == "auto" else p.dist_url,
        "world_size": p.num_gpus * p.num_machines,
    }
    try:
        with children_stopped():
            start_processes(_join_and_call, (main, arguments, p, use_cuda, group), nprocs=p.num_gpus)
    except ProcessRaisedException as error:
        # A child's traceback comes as text; what is one sentence there stays one here.
        for kind in (InputError, NonFiniteLossError):
            message = message_in(str(error), kind)
            if message is not None:
                raise kind(message) from error
        raise


def check_processes(p: Processes, device: str) -> None:
    """Check that a run can have these processes on MODEL.DEVICE.

    Raises:
        InputError: torchrun and ``p`` both ask for several; several machines have no address; several processes are
            to share one GPU.
    """
    several = p.num_gpus * p.num_machines > 1
    if torch.distributed.is_torchelastic_launched():
        if several:
            raise InputError(
                "torchrun starts the processes itself: leave out --num-gpus and --num-machines, or torchrun."
            )
        several = in_torchrun()
    elif p.num_machines > 1 and p.dist_url == "auto":
        raise InputError(
            "Several machines need --dist-url, the address of machine 0, e.g. tcp://10.0.0.1:29500."
        )
    if several and torch.device(device).type == "cuda" and torch.device(device).index is not None:
        raise InputError(
            f"MODEL.DEVICE is {device}, but each of several processes needs a GPU of its own: set it to cuda, and "
            "choose GPUs by the environment variable CUDA_VISIBLE_DEVICES."
        )


def in_torchrun() -> bool:
    """Whether torchrun started this process as one of several."""
    return torch.distributed.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


def restarted() -> bool:
    """Whether torchrun started this process in the place of one that was ended because some process had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def number_of_processes(p: Processes) -> int:
    """How many processes :func:`run_in_processes` calls its function in."""
    return int(os.environ["WORLD_SIZE"]) if in_torchrun() else p.num_gpus * p.num_machines


@contextlib.contextmanager
def main_process_leads(device: str) -> Iterator[bool]:
    """Under torchrun the main process goes on by itself, and what it calls in all processes the others call with it.

    Args:
        device: MODEL.DEVICE.

    Yields:
        True in the main process, and where there is only one. In the others False, after the main one has left this
        context: nothing is left for them to do.
    """
    if not in_torchrun():
        yield True
        return
    with _in_group_of_torchrun(_uses_cuda(device)):
        calls = _Calls()
        if not comm.is_main_process():
            while (call := calls.exchange()) is not None:
                main, arguments = call
                main(*arguments)
            yield False
            return
        _Calls.handed_out = calls
        try:
            yield True
            calls.exchange()
        finally:
            _Calls.handed_out = None


class _Calls:
    """Hands calls of the main process to the others, in which :func:`run_in_processes` is not reached."""

    #: In the main process, in :func:`main_process_leads`.
    handed_out: ClassVar[_Calls | None] = None

    def __init__(self) -> None:
        self._store = shared_store()
        self._number = 0

    def exchange(self, call: tuple[Callable[..., Any], tuple] | None = None) -> Any:
        """What the main process gives, in every process; None when it gives nothing more.

        Waits without a time limit for all to be here: the main process may have hours of work of its own, and others
        a shard to label.
        """
        self._number += 1
        if comm.is_main_process():
            self._store.set(f"call/{self._number}", pickle.dumps(call))
        wait_for_all(self._store, f"here/{self._number}")
        return pickle.loads(self._store.get(f"call/{self._number}"))


@contextlib.contextmanager
def _in_group_of_torchrun(use_cuda: bool) -> Iterator[None]:
    """Join the processes that torchrun started, if this one has not yet; it leaves them at its end.

    Not after an error: others may then be in a collective, for which leaving would wait.
    """
    if not torch.distributed.is_initialized():
        _join_torchrun(use_cuda)
        atexit.register(_leave)
    try:
        yield
    except BaseException:
        atexit.unregister(_leave)
        raise


def _join_torchrun(use_cuda: bool) -> None:
    may_restart = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
    if may_restart and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # github.com/pytorch/pytorch/issues/135712
        logger.warning(
            "With --max-restarts set the environment variable TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun: "
            "else processes that are started anew may meet addresses of those before them, and fail."
        )
    _join(use_cuda, int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))


def _uses_cuda(device: str) -> bool:
    return torch.cuda.is_available() and torch.device(device).type == "cuda"


def _join_and_call(
    local_rank: int,
    main: Callable[..., Any],
    arguments: tuple,
    p: Processes,
    use_cuda: bool,
    group: dict[str, Any],
) -> None:
    _join(use_cuda, local_rank, p.num_gpus, rank=p.machine_rank * p.num_gpus + local_rank, **group)
    main(*arguments)
    _leave()


def _join(use_cuda: bool, local_rank: int, local_size: int, **group: Any) -> None:
    """What ``detectron2.engine.launch`` does in each process, which takes NCCL for tensors on CPUs too."""
    if use_cuda:
        torch.cuda.set_device(local_rank)
    torch.distributed.init_process_group("nccl" if use_cuda else "gloo", timeout=DEFAULT_TIMEOUT, **group)
    comm.create_local_process_group(local_size)
    comm.synchronize()


def _leave() -> None:
    """Leave the process group, once all are done.

    Without, a process that ends right after a collective is aborted now and then, when gloo's thread gives the tensors
    of that collective back to an interpreter that is no more (github.com/pytorch/pytorch/pull/179291). Destroying the
    group waits for the thread only if nothing else refers to the group, as detectron2 does; a barrier, which has no
    tensors, comes after those that have.
    """
    if wait_for_all(shared_store(), "done", DEFAULT_TIMEOUT.total_seconds()):
        comm.synchronize()
        torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
