"""Work that any number of processes share: cut into units, each done under a lock, written aside and renamed.

Start workers on any machines that see the folder, kill them, start them again: a finished unit stays finished, and a
half-written one leaves nothing. What a unit holds must depend on its number alone; then the sum of all units has the
same bytes however the work was shared.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from tokenizer.common.checkpoint import atomic_write
from tokenizer.common.config import differences, to_dict, with_defaults
from tokenizer.common.device import float32_mode
from tokenizer.common.errors import UserError
from tokenizer.common.schema import read_json

A = TypeVar("A")
B = TypeVar("B")


def map_ahead(work: Callable[[A], B], items: Iterable[A], num_threads: int, most: int = 0) -> Generator[B, None, None]:
    """`work(item)` of every item, in order; `num_threads` run at once, at most `most` (0: twice as many) are under way.

    num_threads=0: on demand. For work that waits for another process, a codec or a device. An exception ends it.
    """
    if not num_threads:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        waiting: deque[Future[B]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                while waiting and (waiting[0].done() or len(waiting) >= (most or 2 * num_threads)):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def progress_bar(**options: Any) -> tqdm:
    """A bar on a terminal; in a log file a line every 30 seconds."""
    return tqdm(mininterval=1 if sys.stderr.isatty() else 30, dynamic_ncols=True, **options)


class WorkUnits:
    """`num_units` files in `folder`, each made by whichever worker comes first."""

    def __init__(self, folder: Path, num_units: int) -> None:
        self.folder, self.num_units = folder, num_units

    def path(self, unit: int) -> Path:
        return self.folder / f"{unit:06d}.safetensors"

    @property
    def paths(self) -> list[Path]:
        return [self.path(unit) for unit in range(self.num_units)]

    def num_done(self) -> int:
        return sum(path.exists() for path in self.paths)

    def claim(self, title: str | None = None) -> Iterator[tuple[int, ExitStack]]:
        """Every unit that is free, with the lock on it, which the caller closes once `path(unit)` is there.

        A caller may hold several. title: of a bar of units; None shows no bar.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        mine = os.getpid() % self.num_units  # start at different places, so that workers seldom meet
        order = [(mine + i) % self.num_units for i in range(self.num_units)]
        for unit in tqdm(order, desc=title, unit="unit", disable=title is None):
            if self.path(unit).exists():
                continue
            held = ExitStack()
            free = held.enter_context(lock(self.folder / f"{unit:06d}.lock", fcntl.LOCK_NB))
            if free and not self.path(unit).exists():
                yield unit, held
            else:
                held.close()

    def merge(self, merge: Callable[[], None]) -> bool:
        """Call `merge()`, one process at a time, if all units are done; False while some are not."""
        if self.num_done() < self.num_units:
            return False
        with lock(self.folder / "merge.lock"):
            merge()
        return True

    def work(self, do: Callable[[int], None], merge: Callable[[], None], title: str | None) -> bool:
        """Call `do(unit)` for every unit that is free; it must put the result at `path(unit)` in one step.

        Whoever finds all units done calls `merge()`, one at a time, and gets True; False while others are still at
        work on some. title: of the bar of units; None for a caller that shows its own.
        """
        for unit, held in self.claim(title):
            with held:
                do(unit)
        return self.merge(merge)

    def work_ahead(
        self,
        members: Callable[[int], Iterable[A]],
        read: Callable[[A], B],
        do: Callable[[int, Iterator[B]], None],
        merge: Callable[[], None],
        title: str,
        num_readers: int,
    ) -> bool:
        """Like `work`, but `do` also gets what `read` returns for the members of its unit, in order.

        `num_readers` threads call `read` ahead of `do`, on this unit and then on the next, which is held meanwhile.
        """
        with ExitStack() as all_held:

            def wanted() -> Iterator[tuple[int, ExitStack, A]]:
                for unit, held in self.claim(title):
                    all_held.callback(held.close)
                    for member in members(unit):
                        yield unit, held, member

            found = map_ahead(lambda item: (item[0], item[1], read(item[2])), wanted(), num_readers)
            with closing(found):
                for (unit, held), group in itertools.groupby(found, key=lambda item: item[:2]):
                    do(unit, (each for _, _, each in group))
                    held.close()
        return self.merge(merge)


def claim_folder(
    folder: Path,
    facts: Mapping[str, Any],
    way_out: str = "choose another dir=",
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Write down what the units of `folder` are made from.

    UserError, ending with `way_out`, if they were begun from something else. A key of a config in `facts` that an
    older folder lacks counts as its default, and so do the `defaults` of facts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    configs, facts = facts, {**json.loads(json.dumps(to_dict(facts))), "float32": float32_mode()}  # tuples -> lists
    path = folder / "made_from.json"
    with lock(folder / ".made_from.lock"):  # workers start together
        if not path.exists():
            atomic_write(path, json.dumps(facts, indent=1).encode())
    noted = {"float32": facts["float32"], **(defaults or {})}  # for folders of before these were noted
    before = noted | with_defaults(read_json(path, {}, way_out), configs, str(path))
    if changed := sorted(key for key in facts if before.get(key) != facts[key]):
        details = differences(*({key: side.get(key) for key in changed} for side in (before, facts)))
        raise UserError(
            f"{folder} holds work made from another {', '.join(changed)} (there / now: {'; '.join(details)}); {way_out}"
        )


@contextmanager
def lock(path: Path, flags: int = 0, shared: bool = False) -> Iterator[bool]:
    """True for the one process that holds the lock; the system frees it when that process ends, however it ends.

    Waits for it, or with LOCK_NB yields False if another has it. shared: any number may hold it together.
    """
    with open(path, "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | flags)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise no_locks(path.parent, error) from error
        yield True


@contextmanager
def only_job_in(folder: Path, way_out: str) -> Iterator[None]:
    """Hold `folder`/.lock: two jobs in one folder would remove each other's files, so UserError for the second."""
    with lock(folder / ".lock", fcntl.LOCK_NB) as free:
        if not free:
            raise UserError(f"{folder}: another job is writing here; wait for it, or {way_out}")
        yield


def no_locks(folder: Path, error: OSError) -> UserError:
    """The error of a folder whose file system gives no locks: Lustre without -o flock, some NFS and FUSE mounts."""
    return UserError(
        f"{folder}: this file system has no locks ({error.strerror}), so two jobs could damage each other's files; use "
        "a folder on another one, or have it mounted with locks (Lustre: -o flock)"
    )


def check_locks(folder: Path) -> str | None:
    """The same error as text if locks do not work where `folder` is or will be; for --dry-run. Leaves no file."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(file, fcntl.LOCK_UN)
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return str(no_locks(place, error))
    return None
