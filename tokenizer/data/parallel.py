"""Work on a long stream with a few threads, in order, with a bounded number of items in flight."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def map_ahead(work: Callable[[A], B], items: Iterable[A], num_threads: int) -> Iterator[B]:
    """`work(item)` of every item, in their order; `num_threads` run at once and twice as many wait at most.

    Threads are enough where the work waits for another process or for a codec. An exception ends the stream.
    """
    with ThreadPoolExecutor(num_threads) as pool:
        waiting: deque[Future[B]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= 2 * num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
