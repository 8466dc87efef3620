"""The processes that one run has been started as (torchrun, accelerate launch), and all that passes between them.

Every process runs the same program. What is shared out (batches, rows of a batch, weights to factorise) is added up or
handed round here, so each knows what a single one would; the first writes. Without a launcher nothing here acts.
Whoever calls what waits must be sure that all processes come to the same call: decisions rest on what all of them know.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from lillama.errors import LillamaError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

PATIENCE = timedelta(hours=12)  # what one process may do alone; a dead one is noticed at once
EVIDENCE = 3.0  # seconds until the system shows which process is gone
BUCKET = 64 << 20  # bytes that travel together: for a message of one megabyte waiting takes longer than copying
# Launchers' words on the processes; once we know them nobody else is to act on them.
WORDS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE")
DIVIDE = "ACCELERATE_USE_FSDP"
UNSERVED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "accelerate's parallelism",
}


class LostError(LillamaError):
    """Another process of the run is gone."""


class SaidError(LillamaError):
    """What the first process failed at, which it says itself."""


@dataclass
class _Group:
    """This process among the others: `peers` are their (host, process id), `alone` counts blocks of that name."""

    rank: int = 0
    world: int = 1
    local: int | None = None
    peers: list[tuple[str, int]] = field(default_factory=list)
    store: Any = None
    alone: int = 0
    divide: bool = False


_group = _Group()
on_loss: list[Callable[[], None]] = []  # asked before another's end is taken for an error: it may have been told to


def rank() -> int:
    """The number of this process, from 0."""
    return 0 if _group.alone else _group.rank


def world() -> int:
    """How many processes there are."""
    return 1 if _group.alone else _group.world


def local() -> int | None:
    """The number of this process on its machine; None where there is one process."""
    return _group.local


def is_first() -> bool:
    """Whether this is the process that writes and speaks, also `alone`."""
    return _group.rank == 0


def named(text: str) -> str:
    """A line of this process for people, who must know which one says it."""
    return text if is_first() else f"[process {_group.rank} of {_group.world}] {text}"


def launched() -> bool:
    """Whether a launcher started several processes, and this is one of them."""
    told = all(word in os.environ for word in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    return told and int(os.environ["WORLD_SIZE"]) > 1


def join() -> None:
    """Meet the other processes, where a launcher started several; once."""
    if not launched() or _group.world > 1:
        if os.environ.get("WORLD_SIZE") == "1":
            _forget_words()
        return
    for word, name in UNSERVED.items():
        if _says(word):
            raise LillamaError(
                f"{name} is not supported: models are divided among processes by FSDP alone",
                where="the launcher",
                hint="Use torchrun, or accelerate launch --multi_gpu (or --cpu) without it.",
            )
    import torch
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    _group.divide = _says(DIVIDE)
    found, number, count = next(rendezvous("env://", timeout=PATIENCE))
    _group.local = int(os.environ.get("LOCAL_RANK", number))
    # Objects and what is on the host travel by gloo, what is on a card by nccl.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, store=found, rank=number, world_size=count, timeout=PATIENCE)
    _group.rank, _group.world, _group.store = number, count, found
    _forget_words()
    _group.peers = gather((socket.gethostname(), os.getpid()))
    _name_warnings()


def asked_to_divide() -> bool:
    """Whether the launcher was told that a model should be divided among the processes (FSDP)."""
    return _group.divide


def _says(word: str) -> bool:
    return os.environ.get(word, "false").lower() in ("true", "1", "yes")


def leave() -> None:
    """Tell the others that this process ends by itself, having said why."""
    if _group.store is not None:
        with contextlib.suppress(Exception):  # whoever keeps the store may be gone
            _group.store.set(f"left/{_group.rank}", "1")


def disband() -> None:
    """Let the others go, when all is done."""
    if _group.world > 1:
        from torch import distributed

        leave()
        distributed.destroy_process_group()
        _group.world = 1


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """As if this were the only process, for as long as the block lasts."""
    _group.alone += 1
    try:
        yield
    finally:
        _group.alone -= 1


def sum_(tensors: Iterable[Tensor]) -> None:
    """Add up each of `tensors` over the processes, in place."""
    if world() == 1:
        return
    import torch
    from torch import distributed

    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in bucket])
        flat = flat if flat.device.type in ("cpu", "cuda") else flat.cpu()
        _together(distributed.all_reduce, flat)
        for tensor, total in zip(bucket, flat.split([tensor.numel() for tensor in bucket])):
            tensor.detach().copy_(total.view(tensor.shape))


def summed(numbers: Sequence[float]) -> list[float]:
    """Each of `numbers` added up over the processes, in float64."""
    if world() == 1:
        return list(numbers)
    import torch

    sum_([found := torch.tensor(numbers, dtype=torch.float64)])
    return found.tolist()


def sum_gradients_(parameters: Iterable[Tensor], *more: Tensor) -> None:
    """Add up the gradients of `parameters`, and what `more` there is; one that no process has stays None."""
    if world() == 1:
        return
    import torch

    parameters = list(parameters)
    there = torch.tensor([float(p.grad is not None) for p in parameters])
    sum_([there])
    wanted = [p for p, count in zip(parameters, there.tolist()) if count]
    for parameter in wanted:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    sum_([*(p.grad for p in wanted if p.grad is not None), *more])


def gather(value: T) -> list[T]:
    """What every process has, in their order; tensors should be on the host."""
    if world() == 1:
        return [value]
    from torch import distributed

    found: list[Any] = [None] * world()
    _together(distributed.all_gather_object, found, value)
    return found


def collect(value: T) -> list[T]:
    """What every process has, in their order, on the first; nothing on the others."""
    if world() == 1:
        return [value]
    from torch import distributed

    found: list[Any] | None = [None] * world() if rank() == 0 else None
    _together(distributed.gather_object, value, found)
    return found or []


def agree(value: T) -> T:
    """What the first process has, on all of them."""
    if world() == 1:
        return value
    from torch import distributed

    held = [value]
    _together(distributed.broadcast_object_list, held, src=0)
    return held[0]


def hand(value: object, to: int) -> None:
    """Give process `to` a value, which it must `receive`; tensors should be on the host."""
    from torch import distributed

    _together(distributed.send_object_list, [value], dst=to)


def receive(source: int) -> Any:
    """The value that process `source` hands to this one."""
    from torch import distributed

    held: list[Any] = [None]
    _together(distributed.recv_object_list, held, src=source)
    return held[0]


def by_first(function: Callable[[], T]) -> T:
    """What `function` returns, which the first process calls while the others wait; what it raises, they raise."""
    if world() == 1:
        return function()
    if not is_first():
        theirs: tuple[Any, str | None] = agree((None, None))
        if theirs[1] is not None:
            raise SaidError(theirs[1])
        found: T = theirs[0]
        return found
    try:
        with alone():
            value = function()
    except Exception as error:
        with contextlib.suppress(LostError):
            agree((None, str(error)))
        raise
    agree((value, None))
    return value


def missing() -> list[int]:
    """The processes that are gone without a word; on other machines than this one nobody knows."""
    import psutil

    def lives(process: int) -> bool:
        with contextlib.suppress(psutil.Error):
            return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
        return False

    here = socket.gethostname()
    dead = [n for n, (host, process) in enumerate(_group.peers) if host == here and not lives(process)]
    return [number for number in dead if not _has_left(number)]


def said_of_missing() -> str:
    """Who is gone, for people; "" where nobody is, or it is another's to say."""
    gone = missing() if _group.world > 1 else []
    speaker = next((n for n in range(_group.world) if n not in gone), 0)
    if not gone or speaker != _group.rank:
        return ""
    return f"{_names(gone)} is gone"


def _names(numbers: Sequence[int]) -> str:
    return ", ".join(f"process {n} of {_group.world} (pid {_group.peers[n][1]})" for n in numbers)


def _has_left(number: int) -> bool:
    with contextlib.suppress(Exception):
        return bool(_group.store.check([f"left/{number}"]))
    return False


def _together(function: Callable[..., Any], *given: Any, **options: Any) -> None:
    """Call what waits for the others. Raises LostError where one of them is gone."""
    try:
        function(*given, **options)
    except RuntimeError as error:
        gone = _await_missing()
        what = f"{_names(gone)} is gone" if gone else f"another process stopped ({str(error).splitlines()[0]})"
        raise _lost(what) from error


@contextlib.contextmanager
def naming_the_lost() -> Iterator[None]:
    """Of an error that a library makes of another process's end, make one that says which it was (LostError)."""
    try:
        yield
    except RuntimeError as error:
        if _group.world == 1 or not (gone := _await_missing()):
            raise
        raise _lost(f"{_names(gone)} is gone") from error


def _await_missing() -> list[int]:
    """Who is gone, once the system shows it; nobody where it does not in time."""
    _ask()
    until = time.monotonic() + EVIDENCE
    while not (gone := missing()) and time.monotonic() < until:
        time.sleep(0.1)
        _ask()
    return gone


def _lost(what: str) -> LostError:
    return LostError(what, where="the processes of this run", hint="The same command continues where it was.")


def _ask() -> None:
    for ask in on_loss:
        ask()


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type and device, up to some size together, in their order."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        like = not bucket or (tensor.dtype, tensor.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (not like or size + tensor.nbytes > BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def _forget_words() -> None:
    """Take the launcher's words away, or transformers' Trainer would share batches out a second time."""
    for name in [name for name in os.environ if name in WORDS or name.startswith("ACCELERATE_")]:
        del os.environ[name]


def _name_warnings() -> None:
    """Have warnings say which process they are of, but for the first."""
    import logging

    if not is_first() and logging.lastResort is not None:
        logging.lastResort.setFormatter(logging.Formatter(named("%(message)s")))
