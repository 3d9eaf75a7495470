"""The ranks of a run as processes: how they find each other, leave together, and end with their launcher."""

import logging
import os
import signal
import socket
import time

import deepspeed
import psutil
import torch
from torch import distributed as dist

log = logging.getLogger(__name__)

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"  # of torch: where gloo listens; else at what the host's own name resolves to


def join_ranks(device: torch.device) -> dist.ProcessGroup:
    """Joins the process group that the launcher's environment describes; returns a group for what stays on the CPU."""
    if device.type == "cpu":
        # DeepSpeed's all-reduce for CPU inference: training never calls it, its build takes half a minute, and the
        # shared memory that it makes at once outlives a killed rank.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Many systems give a host's own name a loopback address, at which no other host finds it.
    interface = interface_towards(os.environ.get("MASTER_ADDR", "127.0.0.1"))
    if interface is not None:
        os.environ.setdefault(GLOO_INTERFACE, interface)
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo")
    return dist.new_group(backend="gloo")


def interface_towards(host: str) -> str | None:
    """The network interface from which this machine reaches `host`, a name or an address; None if that is not known."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # chooses a route; a datagram socket sends nothing for it
            mine = probe.getsockname()[0]
    except OSError:
        return None  # whoever connects says why
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == mine for address in addresses):
            return name
    return None


def leave_ranks() -> None:
    """Ends the process groups in step: a rank that exits while gloo's threads run may be aborted by the C++ runtime."""
    dist.barrier()
    dist.destroy_process_group()


def follow_launcher(poll_s: float = 1.0) -> None:
    """Ends this rank when its launcher is gone, so that a killed launcher leaves no rank behind.

    SIGTERM first, which saves a checkpoint at the next step; after a minute, an exit at once. The parent is the
    per-node launcher; its parent is followed too if it is DeepSpeed's front end.
    """
    try:
        parent = psutil.Process().parent()
        if parent is None:
            return
        followed = [parent]
        above = parent.parent()
        if above is not None and any("deepspeed" in word for word in above.cmdline()):
            followed.append(above)
        while all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in followed):
            time.sleep(poll_s)
    except psutil.NoSuchProcess:  # it went between two looks
        pass
    log.error("the launcher is gone: saving a checkpoint and stopping")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
    os._exit(1)
