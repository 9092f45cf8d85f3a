"""The stages of the study in scripts/mini/reproduce.yaml, with the settings of a scale filled in."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

PLAN: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("reproduce.yaml").read_text(encoding="utf-8"))
SCALES = tuple(PLAN["scales"])
LABELS = ("hard", "soft", "quality")  # of the routers, in the order of their weights in `routers`
LEVELS = ("train", "validation", "test", "none")


@dataclass(frozen=True)
class Stage:
    """A command: `module` is run as `python -m`; `products` are patterns of the files that later stages read.

    level: the clips that it reads, one of LEVELS.
    """

    name: str
    module: str
    args: tuple[str, ...]
    products: tuple[str, ...]
    level: str

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the stages whose folders the arguments name, each once."""
        found = re.findall(r"<(\w+)>", " ".join(self.args))
        return tuple(dict.fromkeys(name for name in found if name != "self"))

    @property
    def family(self) -> str:
        """The name without its seed: stages of one family cost the same."""
        return re.sub(r"_s\d+$", "", self.name)


class Study:
    """The settings and the stages of a scale, each stage after those that it reads."""

    def __init__(self, scale: str) -> None:
        self.settings: dict[str, Any] = PLAN["shared"] | PLAN["scales"][scale]
        self.seeds: list[int] = self.settings["seeds"]
        self.stages = {stage.name: stage for stage in self._all()}

    def _all(self) -> Iterator[Stage]:
        yield from self._section("data")
        for seed in self.seeds:
            yield from self._section("training", seed)
        tests = " ".join(test for test, _ in PLAN["identities"].values())
        yield self._stage("identities", f"none pytest -p no:cacheprovider --junitxml=<self>/tests.xml {tests}", {})
        yield from self._section("test_data")
        for seed in self.seeds:
            yield from self._section("test", seed)

    def _section(self, section: str, seed: int | None = None) -> Iterator[Stage]:
        for name, text in PLAN[section].items():
            here = name if seed is None else f"{name}_s{seed}"
            yield self._stage(here, text, self.settings | {"seed": seed})

    def _stage(self, name: str, text: str, settings: dict[str, Any]) -> Stage:
        while re.search(r"\{\w+\}", text):  # a setting may name others
            text = re.sub(r"\{(\w+)\}", lambda found: _as_text(settings[found[1]]), text)
        text = re.sub(r"<(\w+)>", lambda found: f"<{_of_seed(found[1], settings.get('seed'))}>", text)
        level, module, *args = shlex.split(text)
        assert level in LEVELS, name
        return Stage(name, module, tuple(args), tuple(PLAN["makes"][module]), level)


def _of_seed(name: str, seed: int | None) -> str:
    return f"{name}_s{seed}" if name in PLAN["training"] or name in PLAN["test"] else name


def _as_text(value: Any) -> str:
    return "[" + ",".join(map(str, value)) + "]" if isinstance(value, list) else str(value)
