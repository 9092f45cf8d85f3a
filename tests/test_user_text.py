"""Whatever a user types is read, or refused in one line: flags, lengths, classes, data sources, overrides of a YAML."""

from __future__ import annotations

import argparse
import errno
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoregressive.condition import parse_classes
from autoregressive.flags import parse_guidance, parse_lengths
from tokenizer.common import cli
from tokenizer.common.clip_shape import size_argument
from tokenizer.common.config import load_config
from tokenizer.common.errors import UserError
from tokenizer.data.sources import find_sources_of
from tokenizer.train import TokenizerTrainConfig

NAMES = ["disc still", "bar slide", "Pull, then lift", "7"]
ODD = [
    "²",
    "٣",
    "9" * 5000,
    "1e999",
    "-1",
    "nan",
    "1_0",
    "\0",
    "\n",
    "\ud800",
    "[",
    "]",
    ":",
    ",",
    "{",
    "}",
    "${a}",
    "&a",
    '"',
]
text = st.lists(st.sampled_from(ODD) | st.text(max_size=4) | st.integers(0, 20).map(str), max_size=4).map("".join)


def override(item: str) -> Any:
    return load_config(TokenizerTrainConfig, "configs/debug/proxy.yaml", [item])


READERS: dict[str, Callable[[str], Any]] = {
    "at_least": cli.at_least(1),
    "positive": cli.positive,
    "frame_rate": cli.frame_rate,
    "size": size_argument,
    "lengths": lambda x: parse_lengths("--fixed-prefix", x),
    "guidance": parse_guidance,
    "classes": lambda x: parse_classes(x, NAMES),
    "bundled": lambda x: find_sources_of(f"bundled:train:{x}", 16, 32),
    "rendered": lambda x: find_sources_of(f"synthetic:{x}", 16, 32),
    "photos": lambda x: find_sources_of(f"photos:configs:{x}", 16, 32),
    "packed": lambda x: find_sources_of(f"absent.safetensors:{x}", 16, 32),
    "shards": lambda x: find_sources_of(f"absent-{{{x}}}.tar", 16, 32),
    "videos": lambda x: find_sources_of(f"absent{x}", 16, 32),
    "key": override,
    "number": lambda x: override(f"run.steps={x}"),
    "list": lambda x: override(f"data.sources=[{x}]"),
    "shape": lambda x: override(f"model.size={x}"),
}


@pytest.mark.parametrize("name", READERS)
def test_any_text_is_read_or_refused_in_one_line(name: str) -> None:
    @settings(max_examples=25, deadline=None)
    @given(st.sampled_from(ODD) | text)
    def check(x: str) -> None:
        try:
            READERS[name](x)
        except (UserError, argparse.ArgumentTypeError) as error:
            assert "\n" not in str(error)
        except OSError as error:
            assert error.errno == errno.ENAMETOOLONG  # of which run_cli makes a line
        except ValueError:
            assert name in ("at_least", "size")  # of which argparse makes a line

    check()


@pytest.mark.parametrize("source", ["", " "])
def test_an_empty_source_is_not_the_current_folder(source: str) -> None:
    with pytest.raises(UserError, match="is empty"):
        find_sources_of(source, 16, 32)


def test_a_number_without_end_is_refused() -> None:
    nines = "9" * 5000
    for kind in ("bundled:train", "synthetic:train", "photos:configs"):
        with pytest.raises(UserError, match="expected"):
            find_sources_of(f"{kind}:{nines}", 16, 32)
    assert len(find_sources_of("synthetic:train:2-5", 16, 32)[0]) == 3
    with pytest.raises(UserError, match="whole numbers"):
        parse_lengths("--fixed-prefix", nines)
    with pytest.raises(UserError, match="no such class"):
        parse_classes(nines, NAMES)
