"""Weights of frozen encoders: where they lie, their sha256, and one clear sentence where they are not there.

Training never reaches for the network: `python -m tokenizer.frozen.download` fetches once, on a machine that has
internet. Random weights exist for tests only; the config asks for them by name, and every log line and every
checkpoint of such a run says so.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenizer.common.checkpoint import file_sha256
from tokenizer.common.device import pick_dtype
from tokenizer.common.errors import UserError

logger = logging.getLogger(__name__)

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"  # a pickle beside them is never opened
RANDOM_SIZES = ("tiny", "full")


@dataclass
class FrozenConfig:
    """Which weights a frozen encoder has, and how it computes."""

    weights: str = ""  # a folder, or a name on the Hugging Face hub that is in the cache; empty: the published ones
    random_for_tests: str = ""  # "tiny" or "full": random weights of that size. They mean nothing; for tests alone
    precision: str = "bf16"  # of the encoder, whatever the run's own: none (fp32) | bf16 | fp16

    def __post_init__(self) -> None:
        if self.random_for_tests not in ("", *RANDOM_SIZES):
            raise UserError(f"random_for_tests = {self.random_for_tests!r}: must be empty, or one of {RANDOM_SIZES}")
        if self.random_for_tests and self.weights:
            raise UserError(f"random_for_tests = {self.random_for_tests!r} does not read weights = {self.weights!r}")
        pick_dtype(self.precision)


@dataclass(frozen=True)
class Family:
    """A kind of encoder in the library `transformers`, and its published weights."""

    name: str  # as people call it
    key: str  # as our commands and the library's config.json call it
    hub_name: str
    model_class: str
    config_class: str
    tiny: dict[str, Any]  # the config of the tiny random one


@dataclass(frozen=True)
class FrozenWeights:
    """A module of the library, frozen, with where its numbers come from."""

    model: Any  # the library's nn.Module
    sha256: str  # of the weights file; of random weights, of their description
    is_random: bool


def load_weights(family: Family, config: FrozenConfig) -> FrozenWeights:
    """The encoder, in eval mode, without gradients of its own, in the precision of `config`.

    Raises UserError where the library or the weights are absent, and where the weights are of another kind.
    """
    transformers = _library(family)
    if config.random_for_tests:
        model, sha256 = _random_model(transformers, family, config.random_for_tests)
        logger.warning(
            "%s has RANDOM weights (random_for_tests): nothing that is trained here means a thing", family.name
        )
    else:
        folder = find_folder(family, config.weights)
        model, sha256 = _read_model(transformers, family, folder), file_sha256(folder / WEIGHTS_FILE)
        logger.info("%s: %s, sha256 %s", family.name, folder, sha256[:12])
    model = model.to(pick_dtype(config.precision)).requires_grad_(False).eval()
    return FrozenWeights(model, sha256, bool(config.random_for_tests))


def marked(kind: str, random: Sequence[str]) -> str:
    """What weights are called on their card, `random` being the encoders of the run that had random weights."""
    return f"{kind} (trained with RANDOM weights of {' and '.join(random)}, for tests)" if random else kind


def find_folder(family: Family, weights: str) -> Path:
    """The folder that holds config.json and model.safetensors. UserError where it is not on this machine."""
    name = weights or family.hub_name
    if Path(name).is_dir():
        missing = [file for file in (CONFIG_FILE, WEIGHTS_FILE) if not (Path(name) / file).is_file()]
        if missing:
            raise UserError(f"{name}: {' and '.join(missing)} of {family.name} not found in this folder")
        return Path(name)
    try:
        return fetch(family, name, local_files_only=True)
    except OSError as error:
        raise UserError(
            f"the weights of {family.name}, {name!r}, are not on this machine: run `python -m "
            f"tokenizer.frozen.download {family.key}` where there is internet, or set `weights` to a folder that holds "
            f"{CONFIG_FILE} and {WEIGHTS_FILE}"
        ) from error


def fetch(family: Family, name: str, local_files_only: bool) -> Path:
    """The folder of a hub model in the library's cache, downloaded into it where that is allowed; OSError if absent."""
    cached_file = _library(family).utils.hub.cached_file
    files = [cached_file(name, file, local_files_only=local_files_only) for file in (CONFIG_FILE, WEIGHTS_FILE)]
    return Path(files[0]).parent


def _library(family: Family) -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise UserError(
            f"{family.name} needs the package transformers, which is not installed: run `pip install -e .[semantic]`"
        ) from error


def _random_model(transformers: Any, family: Family, size: str) -> tuple[nn.Module, str]:
    """The same weights at every call, without a trace in the global generator."""
    settings = getattr(transformers, family.config_class)(**(family.tiny if size == "tiny" else {}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, family.model_class)(settings)
    return model, hashlib.sha256(f"random {family.key} {size}".encode()).hexdigest()


def _read_model(transformers: Any, family: Family, folder: Path) -> nn.Module:
    kind = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get("model_type")
    if kind != family.key:
        raise UserError(f"{folder}: holds weights of {kind!r}, not of {family.key!r} ({family.name})")
    model_class = getattr(transformers, family.model_class)
    model, report = model_class.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    if report["missing_keys"]:  # the library would leave them random and only warn
        missing = sorted(report["missing_keys"])
        raise UserError(f"{folder}: {len(missing)} tensors of {family.name} are missing, {missing[0]} first")
    return model
