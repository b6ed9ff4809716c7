"""Work on several shards at once, each in a process."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def map_in_processes(function: Callable[[T], R], items: Iterable[T], processes: int) -> Iterator[R]:
    """Yield ``function(item)`` of each item, in order, from ``processes`` processes; from this one where that is 1.

    ``function`` is picklable: a function of a module, or an object of a class of a module.
    """
    if processes <= 1:
        yield from map(function, items)
        return
    # Threads may be running here, and a fork would copy their locks: the processes are forked from a server that has
    # no threads and has imported the module of ``function``.
    context = get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(function, items)
