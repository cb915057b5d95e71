"""Several processes, one result: `torchrun --nproc_per_node 2 -m stages.cli run CONFIG`.

All processes run the same program on the same data, in step. What costs time is split here: each computes its
share of a list and gets the others' shares. With one process every function does the plain thing.
"""

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import groupby
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

T = TypeVar("T")
R = TypeVar("R")


def place() -> tuple[int, int]:
    """(number of this process, how many there are)."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def join() -> None:
    """Meet the other processes of torchrun, if it started this one, over nccl or on CPUs gloo."""
    if "RANK" in os.environ:
        from accelerate import PartialState

        on_cpu: dict[str, Any] = {"cpu": True, "backend": "gloo"}
        state = PartialState(**({} if torch.cuda.is_available() else on_cpu))
        # Threads of gloo that still run when the interpreter goes abort the process.
        atexit.register(state.destroy_process_group)


def wait() -> None:
    """Until all processes are here."""
    if place()[1] > 1:
        dist.barrier(group=_plain_group())


def shared(parts: Sequence[T], work: Callable[[T], R]) -> list[R]:
    """`work` of every part, each done by one process and known to all; an error of one is raised by all."""
    rank, size = place()
    if size == 1:
        return [work(part) for part in parts]
    gathered = _gathered(lambda: [work(part) for part in parts[rank::size]])
    return [gathered[i % size][i // size] for i in range(len(parts))]


def once(work: Callable[[], R]) -> R:
    """What `work` gives to the first process; the others do not do it."""
    rank, size = place()
    if size == 1:
        return work()
    return _gathered(lambda: work() if rank == 0 else None)[0]  # type: ignore[return-value]


def _gathered(work: Callable[[], R]) -> list[R]:
    """What `work` gives to each process, at all of them."""
    try:
        mine: tuple[R | None, Exception | None] = work(), None
    except Exception as error:
        mine = None, error
    found: list[Any] = [None] * place()[1]
    dist.all_gather_object(found, mine, group=_plain_group())
    for _, failed in found:
        if failed is not None:
            raise failed
    return [value for value, _ in found]


@cache
def _plain_group() -> Any:
    """For objects of Python, which GPUs need not see."""
    return dist.new_group(backend="gloo")


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients that the processes found, each on its share of a step.

    What has none in any process keeps none: an optimiser would decay it, and move it by its momentum. They go
    in few large messages, since on CPUs a message costs more than what is in it.
    """
    if place()[1] == 1:
        return
    for some in _buckets(parameter for parameter in parameters if parameter.requires_grad):
        reached = some[0].new_tensor([parameter.grad is not None for parameter in some])
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in some]
        message = torch.cat([reached, *(grad.flatten() for grad in grads)])
        dist.all_reduce(message)
        moves, *found = torch.split(message, [len(some), *(grad.numel() for grad in grads)])
        for parameter, moved, grad in zip(some, moves.tolist(), found, strict=True):
            parameter.grad = grad.view_as(parameter) if moved else None


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Neighbours of one type and device, up to BUCKET numbers, or a larger one alone."""
    for _, alike in groupby(parameters, key=lambda p: (p.dtype, p.device)):
        some: list[nn.Parameter] = []
        for parameter in alike:
            if some and sum(p.numel() for p in some) + parameter.numel() > BUCKET:
                yield some
                some = []
            some.append(parameter)
        yield some


BUCKET = 2**22
"""Numbers in one message of gradients."""


def summed(values: Mapping[str, float]) -> dict[str, float]:
    """By name, the sums over the processes of what each found on its share."""
    if place()[1] == 1:
        return dict(values)
    found = _gathered(lambda: dict(values))
    names = dict.fromkeys(name for of in found for name in of)
    return {name: sum(of.get(name, 0.0) for of in found) for name in names}
