"""The ranks of a run as processes: how they find each other, whether they are of one run, and how they end."""

import hashlib
import logging
import os
import signal
import socket
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch
from torch import distributed as dist

from dflash_scale.receiver.client import RankPlace

log = logging.getLogger(__name__)

SHARED_WITHIN_S = 30.0  # a network file system may show another node's new files late
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"  # of torch: where gloo listens; else at what the host's own name resolves to


def launched_place() -> RankPlace | None:
    """Where this rank runs, from the launcher's environment (deepspeed's names, and torchrun's); None without one."""
    environment = os.environ
    if "RANK" not in environment:
        return None
    local_size = environment.get("LOCAL_SIZE") or environment.get("LOCAL_WORLD_SIZE") or "1"
    return RankPlace(
        rank=int(environment["RANK"]),
        world_size=int(environment.get("WORLD_SIZE", "1")),
        local_rank=int(environment.get("LOCAL_RANK", "0")),
        local_size=int(local_size),
    )


def join_ranks(device: torch.device) -> dist.ProcessGroup:
    """Joins the process group that the launcher's environment describes; returns a group for what stays on the CPU."""
    import deepspeed  # takes seconds, and a dry run does without

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


def check_alike(texts: Mapping[str, str], control: dist.ProcessGroup) -> None:
    """Compares what has to be the same on all ranks, by digests; the names are the same and in the same order on all.

    Raises:
        ValueError: on every rank, with the names of those that are not.
    """
    digests = [hashlib.sha256(text.encode()).digest() for text in texts.values()]
    mine = torch.tensor([int.from_bytes(digest[:7], "big") for digest in digests])
    lowest, highest = mine.clone(), mine.clone()
    dist.all_reduce(lowest, dist.ReduceOp.MIN, group=control)
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=control)
    unlike = [name for name, same in zip(texts, (lowest == highest).tolist(), strict=True) if not same]
    if unlike:
        raise ValueError(
            f"{', '.join(unlike)}: got several on the ranks of this run, wanted the same on all; give every node the "
            "same configuration and data set"
        )


def check_shared(folder: Path, run_id: str, control: dist.ProcessGroup, *, within_s: float = SHARED_WITHIN_S) -> None:
    """Makes `folder` if it is not there, and looks whether it is one and the same for all ranks.

    Raises:
        ValueError: on every rank, if a rank does not see what rank 0 writes there.
    """
    mark = folder / f".{run_id}"
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    dist.barrier(group=control)
    deadline = time.monotonic() + within_s
    while not (seen := mark.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = torch.tensor([int(not seen)])
    dist.all_reduce(blind, group=control)
    if dist.get_rank() == 0:
        mark.unlink()
    if blind.item():
        raise ValueError(
            f"train.output_dir: {int(blind)} of {dist.get_world_size()} ranks have another {folder} than rank 0, "
            "wanted one folder for all nodes, because a checkpoint is made of files of all ranks; name one on a shared "
            "file system"
        )


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
