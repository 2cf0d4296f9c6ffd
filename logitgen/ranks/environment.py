"""The launch as its environment describes it: this rank's number, the way to the other ranks, their store."""

import functools
import os
import socket
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator

from logitgen.errors import LostRankError, UsageError, first_line

SILENT_SECONDS = 120.0
"""A dead machine closes nothing. After this time without an answer from its kernel, its connections are given up."""

LOOK_SECONDS = 1.0
"""Seconds between two looks of a waiting rank at whether the others still move."""

MOVES = "moves"

_STORE_TIMEOUT = timedelta(seconds=10)

JOIN_TIMEOUT = timedelta(minutes=30)

_INTERFACE = "GLOO_SOCKET_IFNAME"

_TRAINING_ENGINES = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")


def launched_rank() -> int:
    """Return the number that the launcher gave this rank."""
    return int(os.environ.get("RANK", "0"))


def ranks_of_machine() -> int:
    """Return the number of ranks that the launcher started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def launched_ranks() -> int:
    """Return the number of ranks that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_several_machines() -> bool:
    """Tell whether the launch has ranks on other machines."""
    return launched_ranks() > ranks_of_machine()


def use_interface_to(host: str) -> None:
    """Have gloo use the network interface that leads to a host.

    By default gloo takes the address of this machine's own name, often a loopback that no other machine reaches.
    """
    family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # on a datagram socket this sends nothing
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address.partition("%")[0] == own for found in addresses):
            os.environ[_INTERFACE] = name


def give_up_silent_machines(seconds: float) -> None:
    """Have the system break connections to a machine that stays silent for this time. gloo and torch do not ask it to.

    A machine whose ranks hang still answers. Only on Linux.
    """
    if not hasattr(socket, "TCP_USER_TIMEOUT"):
        return
    step = max(1, int(seconds) // 5)
    for connection in psutil.Process().net_connections("tcp"):
        with socket.fromfd(connection.fd, connection.family, connection.type) as ours:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, step)
            ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, step)
            ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
            # Waiting ranks ask the store. On payload connections this timeout would also hit a leader that is slow to
            # read.
            if connection.raddr and connection.raddr.port == int(os.environ["MASTER_PORT"]):
                ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))


@functools.cache
def launch_store(timeout: timedelta = _STORE_TIMEOUT) -> Any:
    """Return the launch's store, which the launcher or else rank 0 keeps. Restarted ranks find it empty."""
    of_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=launched_rank() == 0 and not of_launcher,
        wait_for_workers=False,
        multi_tenant=True,
        timeout=timeout,
    )
    return dist.PrefixStore(  # type: ignore[attr-defined]
        f"logitgen/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store
    )


def counter(key: str, more: int = 0) -> int:
    """Add to one of the launch's counters, and return its value."""
    try:
        return int(launch_store().add(key, more))
    except RuntimeError as error:
        raise LostRankError(
            "The leader's launcher is unreachable: it has ended, or its machine or the network is down."
        ) from error


def join() -> Accelerator:
    """Join the other ranks of the launch.

    Raises:
        UsageError: The launch profile asks for something this machine does not have.
    """
    # The launcher does not pass a profile's use_cpu on to several ranks (accelerate 1.15): without a visible GPU they
    # would not even find each other. The CPU profile hides the GPUs, and visibility decides. Apple's GPU serves a
    # single rank only.
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    cpu = found is None or (found.type == "mps" and launched_ranks() > 1)
    if on_several_machines() and _INTERFACE not in os.environ:
        use_interface_to(os.environ["MASTER_ADDR"])
    if launched_ranks() > 1 and not dist.is_initialized():
        # Not left to Accelerate: with its static rendezvous, restarted ranks find the addresses of the dead ranks in
        # the launcher's store (torch 2.13).
        dist.init_process_group(store=launch_store(JOIN_TIMEOUT), rank=launched_rank(), world_size=launched_ranks())
    try:
        return Accelerator(cpu=cpu)
    except (ValueError, ImportError) as error:  # the profile or ACCELERATE_... asks for something this machine lacks
        raise UsageError(
            f"The launch profile does not fit this machine: {first_line(error)} Use one from accelerate_configs/."
        ) from error


def check_launch(num_ranks: int) -> None:
    """Refuse a launch whose processes do not see each other: each would take itself for the leader.

    Args:
        num_ranks: Number of ranks that this rank sees.

    Raises:
        UsageError: The launcher started another number, or has Accelerate shard models, which it only does for
            training.
    """
    for engine in _TRAINING_ENGINES:
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false") == "true":
            raise UsageError(
                f"The launch profile turns on {engine}, which Accelerate uses for training only. For a teacher larger "
                "than a GPU, use accelerate_configs/tensor_parallel.yaml or fsdp.yaml."
            )
    if launched_ranks() != num_ranks:
        raise UsageError(
            f"The launcher started {launched_ranks()} processes, but they do not see each other "
            f"(Accelerate reports {num_ranks}). Use a profile from accelerate_configs/ that fits this machine."
        )


def check_replicas(num_ranks: int, tp_size: int, fsdp_size: int, device_map: str | None) -> None:
    """Refuse a number of ranks that does not make whole replicas, see `Ranks.form_replicas`."""
    if device_map and num_ranks > 1:
        raise UsageError(
            f"--device_map must run on one rank, got {num_ranks}. "
            "Use accelerate_configs/single_gpu.yaml, or share the teacher with --tp_size or --fsdp_size."
        )
    size = tp_size * fsdp_size
    if num_ranks % size:
        raise UsageError(
            f"--tp_size {tp_size} and --fsdp_size {fsdp_size} need a multiple of {size} ranks, got {num_ranks}. "
            f"Use accelerate launch --num_processes {size} ..."
        )
