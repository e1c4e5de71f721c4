"""Several processes that know of each other, for tests."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from torch import distributed, multiprocessing


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


def _work(number: int, port: str, many: int, work: Callable[[], Any], found: Any) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"tcp://localhost:{port}", rank=number, world_size=many
    )
    found[number] = work()
    distributed.destroy_process_group()


def in_processes(many: int, work: Callable[[], Any]) -> list[Any]:
    """Return what a function gives in each of several processes, forked from one that has imported the package."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["monai_xai"])
    with context.Manager() as manager:
        found = manager.dict()
        multiprocessing.start_processes(
            _work, (_free_port(), many, work, found), nprocs=many, start_method="forkserver"
        )
        return [found[number] for number in range(many)]
