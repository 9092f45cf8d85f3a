"""What keeps a run folder whole: one run at a time, one config, and a signal that waits for the step to end."""

from __future__ import annotations

import fcntl
import json
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tokenizer.common.checkpoint import atomic_write
from tokenizer.common.config import differences
from tokenizer.common.errors import UserError
from tokenizer.common.run_config import FREE_TO_CHANGE, NEVER_TO_CHANGE


@contextmanager
def stop_signals() -> Iterator[list[str]]:
    """Yields a list that receives the name of a SIGINT, SIGTERM or SIGUSR1 (SLURM's notice that the time is up).

    The loop looks at it between two steps.
    """
    received: list[str] = []

    def remember(number: int, _frame: Any) -> None:
        if received:  # asked twice: stop at once, the last checkpoint stands
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, remember) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Two runs in one folder would tear each other's checkpoints: the second one stops here."""
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: data workers would inherit it
        except (BlockingIOError, PermissionError) as error:
            raise UserError(f"{folder}: another run is writing here; wait for it or choose run.dir=OTHER") from error
        yield


def claim(folder: Path, config: Mapping[str, Any], allow_changes: bool = False) -> None:
    """Write `config.yaml`. UserError for a folder that was made with another config.

    With `allow_changes` what differs is said, the old config is kept as `config.<n>.yaml`, and only another model or
    other tokens are refused.
    """
    text = yaml.safe_dump(dict(config), sort_keys=False)
    path = folder / "config.yaml"
    if path.exists():
        found = differences(yaml.safe_load(path.read_text(encoding="utf-8")), yaml.safe_load(text))
        changed = [line for line in found if line.partition(":")[0] not in FREE_TO_CHANGE]
        fatal = [line for line in changed if line.partition(":")[0].partition(".")[0] in NEVER_TO_CHANGE]
        if changed and (fatal or not allow_changes):
            way_out = "choose run.dir=OTHER" if fatal else "choose run.dir=OTHER, or go on with run.allow_changes=true"
            raise UserError(
                f"{folder}: was made with another config (there / here): {'; '.join(fatal or changed)}; {way_out}"
            )
        if changed:
            kept = folder / f"config.{len(list(folder.glob('config.*.yaml'))) + 1}.yaml"
            atomic_write(kept, path.read_bytes())
            print(f"{folder}: goes on with changes (before / now): {'; '.join(changed)}; {kept.name} is the old config")
    atomic_write(path, text.encode())


def note_unreadable(folder: Path, batch: Any) -> None:
    """Enter the damaged files that were met in this batch into `quarantine.jsonl`, one object a line, each once.

    Other workers, other processes and an earlier start of the run may have met the same file.
    """
    met: Mapping[str, str] = getattr(batch, "unreadable", {})
    if not met:
        return
    with open(folder / "quarantine.jsonl", "a+", encoding="utf-8") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)  # until the file is closed
        file.seek(0)
        known = {json.loads(line)["file"] for line in file if line.endswith("}\n")}
        for name, reason in met.items():
            if name not in known:
                file.write(json.dumps({"file": name, "reason": reason}) + "\n")
