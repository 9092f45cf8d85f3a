"""Settings: each mistake is one line that names the key, the value and the way out; every shipped YAML loads."""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoregressive.extract_codes import ExtractConfig
from autoregressive.presets import PRESETS, check_size
from autoregressive.train import GPTTrainConfig
from tokenizer.common.config import ConfigError, differences, dump_yaml, from_dict, load_config, load_section, to_dict
from tokenizer.common.errors import UserError
from tokenizer.model import TokenizerConfig
from tokenizer.router.curate import CurateConfig
from tokenizer.router.model import RouterConfig
from tokenizer.router.train import RouterTrainConfig
from tokenizer.train import TokenizerTrainConfig

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.fixture
def refuse(tmp_path: Path) -> Callable[..., str]:
    """(YAML text, overrides) -> the one line in which it is refused."""

    def run(text: str, *overrides: str) -> str:
        path = tmp_path / "here.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError) as refusal:
            load_config(TokenizerTrainConfig, path, overrides)
        message = str(refusal.value)
        assert "\n" not in message
        return message

    return run


# --- what is refused ------------------------------------------------------------------------------------------------


def test_a_single_value_is_a_list_of_one(tmp_path: Path) -> None:
    path = tmp_path / "here.yaml"
    path.write_text("data: {sources: /my videos}")
    config = load_config(TokenizerTrainConfig, path, ["model.levels=32", "val_data.sources=a b.csv"])
    assert config.data.sources == ["/my videos"] and config.val_data.sources == ["a b.csv"]
    assert config.model.levels == [32]


BOMB = "a: &a [x, x]\n" + "".join(f"b{i}: &b{i} [*{'a' if i == 0 else f'b{i - 1}'}, x]\n" for i in range(60))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, ["line 1", "anchors (&) and aliases (*) are not allowed"]),
        ("run: &r {dir: *r}", ["line 1", "anchors"]),
        ("run: {steps: &n 3}", ["anchors"]),
        ("run: " + "[" * 3000 + "]" * 3000, ["nested more than 20 deep"]),
        ("model: {levels: [" + "1, " * 30_000 + "2]}", ["more than 20000 values"]),
        ("# " + "x" * (1 << 20), ["1048578 bytes are no config"]),
        ("run: !!python/object/apply:os.system [ls]", ["not readable as YAML"]),
    ],
)
def test_yaml_that_is_not_plain_data_is_refused(refuse: Callable[..., str], text: str, words: list[str]) -> None:
    message = refuse(text)
    assert "here.yaml" in message
    for word in words:
        assert word in message
    with pytest.raises(ConfigError, match="anchors|nested"):
        load_config(TokenizerTrainConfig, None, ["run.dir=&a x"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run: {stps: 3}", ["unknown key 'run.stps'", "did you mean 'run.steps'?"]),
        ("modle: {size: 64}", ["unknown key 'modle'", "did you mean 'model'?"]),
        ("model: {encoder: {widht: 64}}", ["'model.encoder.widht'", "'model.encoder.width'"]),
        ("model: {encoder: {qqq: 64}}", ["'model.encoder.qqq'", "known here: layers, width, heads"]),
        ("run: {steps: abc}", ["run.steps = 'abc'", "Integer"]),
        ("run: {steps: true}", ["run.steps = True", "Integer"]),
        ("run: {steps: 1.5}", ["run.steps = 1.5", "Integer"]),
        ("run: {steps: null}", ["run.steps = None"]),
        ("run: {steps: '???'}", ["'run.steps' has no value yet"]),
        ("optim: {lr: fast}", ["optim.lr = 'fast'", "Float"]),
        ("data: {augment: maybe}", ["data.augment = 'maybe'", "bool"]),
        ("model: {levels: true}", ["model.levels = True"]),
        ("model: {levels: [a]}", ["model.levels[0] = 'a'"]),
        ("run: 3", ["key 'run' is a section, not the value 3"]),
        ("run: {steps: {x: 3}}", ["key 'run.steps' is a value, not a section with ['x']"]),
        ("run: {steps: 1, steps: 2}", ["line 1", "key 'steps' is given twice"]),
        ("- run", ["expected `key: value` lines"]),
        ("run: [", ["not readable as YAML", "line 1"]),
    ],
)
def test_a_wrong_key_or_value_is_named_with_the_nearest(
    refuse: Callable[..., str], text: str, words: list[str]
) -> None:
    message = refuse(text)
    assert "here.yaml" in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {num_frames: 17}", ["model.num_frames = 17", "model.patch_frames = 4", "nearest that is: 16"]),
        ("model: {num_frames: 2}", ["model.num_frames = 2", "nearest that is: 4"]),
        ("model: {patch_frames: 0}", ["patch_frames = 0", "above 0"]),
        ("model: {levels: [32, 1024]}", ["1024", "16x16", "the largest possible level is 512"]),
        ("model: {levels: [64, 32]}", ["levels = [64, 32]", "ascending"]),
        ("model: {size: 100}", ["model.size = 100", "model.patch_size = 8", "nearest that is: 96"]),
        ("model: {encoder: {heads: 7}}", ["heads = 7", "width = 512"]),
        ("model: {init: clever}", ["'clever'", "'structured' or 'random'"]),
        ("data: {size: 64}", ["data", "64 pixels", "128 pixels", "data.size=128"]),
        ("val_data: {num_frames: 8}", ["val_data", "8 frames", "val_data.num_frames=16"]),
        ("loss: {perceptual: 0}", ["loss.perceptual = 0", "'lpips_vgg'"]),
        ("policy: {kind: fixed}", ["policy.lengths"]),
        ("policy: {kind: router}", ["policy.router_ckpt"]),
        ("policy: {kind: random, lengths: [32, 32, 32, 32]}", ["policy.lengths", "does not read it"]),
        ("policy: {kind: best}", ["'best'", "'random', 'fixed' or 'router'"]),
    ],
)
def test_an_impossible_combination_is_named(refuse: Callable[..., str], text: str, words: list[str]) -> None:
    message = refuse(text)
    for word in ["here.yaml", *words]:
        assert word in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.steps", ["override 'run.steps'", "key.sub=value"]),
        ("=3", ["override '=3'", "key.sub=value"]),
        ("run.dir=", ["override 'run.dir='", "run.dir=null", "run.dir=''"]),
        ("run=3", ["override 'run=3'", "is a section"]),
        ("run.stps=3", ["override 'run.stps=3'", "did you mean 'run.steps'?"]),
        ("run.steps=[1,2", ["override 'run.steps=[1,2'"]),
        ("run.steps=many", ["run.steps = 'many'", "with overrides"]),
        ("data.sources[0]=x", ["data.sources"]),
    ],
)
def test_a_wrong_override_is_named(refuse: Callable[..., str], override: str, words: list[str]) -> None:
    message = refuse("{}", override)
    for word in words:
        assert word in message


def test_a_missing_file_is_named_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "proxy.yaml").write_text("{}")
    with pytest.raises(ConfigError, match=r"prxy.yaml: no such config file; did you mean .*/proxy.yaml\?"):
        load_config(TokenizerTrainConfig, tmp_path / "prxy.yaml")


@pytest.mark.parametrize("value", ["${oc.env:HOME}", "x ${oc.env:HOME}", "${run.steps}", "${", "${oc.env:"])
@pytest.mark.parametrize("text", ["run: {{dir: '{}'}}", "data: {{sources: ['{}']}}", "model: {{levels: '{}'}}"])
def test_interpolation_is_refused_not_resolved(refuse: Callable[..., str], text: str, value: str) -> None:
    message = refuse(text.format(value))
    assert value in message and "not expanded" in message


def test_interpolation_is_refused_everywhere(refuse: Callable[..., str]) -> None:
    assert "not expanded" in refuse("{}", "run.dir=${oc.env:HOME}")
    with pytest.raises(ConfigError, match="not expanded"):
        from_dict(TokenizerConfig, {"init": "${oc.env:HOME}"}, "weights from elsewhere")


@pytest.mark.parametrize("tag", ["object/apply:os.system", "object/apply:pathlib.Path", "name:os.system", "tuple"])
def test_tags_that_build_objects_are_refused(refuse: Callable[..., str], tag: str) -> None:
    assert "could not determine a constructor" in refuse(f"run: !!python/{tag} [echo]")


# --- what is read ---------------------------------------------------------------------------------------------------


def test_defaults_then_file_then_overrides(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("run: {steps: 7, seed: 3}\noptim: {lr: 1e-3}\ndata: {fps: 3}\n")
    config = load_config(TokenizerTrainConfig, path, ["run.steps=9", "model.levels=[32,64]", "data.fps=null"])
    assert (config.run.steps, config.run.seed, config.run.batch_size) == (9, 3, 8)
    assert (config.optim.lr, config.model.levels, config.data.fps) == (1e-3, [32, 64], None)
    assert isinstance(config.model, TokenizerConfig)
    assert load_config(TokenizerTrainConfig, None) == TokenizerTrainConfig()


def test_a_section_of_a_foreign_schema(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("model: {size: 64, levels: [8, 16]}\nother: {x: 1}\n")
    assert load_section(TokenizerConfig, path, "model").size == 64
    with pytest.raises(ConfigError, match="no section 'modle'; it has 'model', 'other'"):
        load_section(TokenizerConfig, path, "modle")


def test_differences_name_the_keys() -> None:
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == ["a.c: 2 / 3", "d: None / 4"]


@dataclasses.dataclass
class Inner:
    number: float = 1.0
    maybe: int | None = None
    words: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Outer:
    inner: Inner = dataclasses.field(default_factory=Inner)
    word: str = ""
    flag: bool = False
    counts: list[int] = dataclasses.field(default_factory=list)


words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12).filter(
    lambda s: "${" not in s and s != "???"
)
outers = st.builds(
    Outer,
    st.builds(
        Inner,
        st.floats(allow_nan=False),
        st.none() | st.integers(),
        st.lists(words, max_size=3),
    ),
    words,
    st.booleans(),
    st.lists(st.integers(), max_size=3),
)


@settings(max_examples=60, deadline=None)
@given(outers)
def test_what_is_saved_is_read_back(tmp_path_factory: pytest.TempPathFactory, config: Outer) -> None:
    path = tmp_path_factory.mktemp("config") / "a.yaml"
    path.write_text(dump_yaml(to_dict(config)))
    assert load_config(Outer, path) == config
    assert from_dict(Outer, to_dict(config), "itself") == config


# --- what ships -----------------------------------------------------------------------------------------------------


def schema_of(path: Path) -> type:
    """By the stage that its name begins with."""
    stages: dict[str, type] = {"curate": CurateConfig, "router": RouterTrainConfig}
    stages |= {"extract": ExtractConfig, "gpt": GPTTrainConfig}
    name = path.name.lower()
    return next((schema for stage, schema in stages.items() if name.startswith(stage)), TokenizerTrainConfig)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_config_that_ships_loads_and_tells_its_story(path: Path) -> None:
    config: Any = load_config(schema_of(path), path)
    assert from_dict(type(config), to_dict(config), "itself") == config
    head = path.read_text().split("\n\n")[0].splitlines()
    story = [line for line in head if line.startswith("#")]
    name = path.relative_to(ROOT).as_posix()
    assert len(story) >= 2 and story == head[: len(story)]
    command = next(line for line in story if "bash scripts/train/" in line)
    script, wanted = re.findall(r"(scripts/train/\w+\.sh) (\S+\.yaml)", command)[0]
    assert (ROOT / script).is_file() and wanted == name


def test_stages_of_one_folder_belong_together() -> None:
    """The router's clips, levels and blocks are those of the tokenizer it chooses for."""
    for folder in ("mini", "debug"):
        paths = {path.stem: path for path in CONFIGS if path.parent.name == folder}
        tokenizers = [load_section(TokenizerConfig, paths[name], "model") for name in ("proxy", "final")]
        assert tokenizers[0] == tokenizers[1]
        if "router" in paths:
            router = load_section(RouterConfig, paths["router"], "model")
            for name in ("num_frames", "size", "levels", "patch_frames"):
                assert getattr(router, name) == getattr(tokenizers[0], name)


@pytest.mark.parametrize("path", [path for path in CONFIGS if "gpt" in path.name.lower()], ids=lambda path: path.stem)
def test_a_gpt_has_a_named_size_and_archives_that_are_made(path: Path) -> None:
    config = load_config(GPTTrainConfig, path)
    sizes = {"mini": "GPT-mini", "next": "GPT-mini", "debug": "GPT-debug"}
    preset = sizes.get(path.parent.name) or "-".join(path.stem.split("_")[:2])
    is_next = path.parent.name == "next"  # GPT-mini gets the codebook of the next miniature when that is released
    check_size(replace(config.model, codebook_size=2048) if is_next else config.model, preset, path.name)
    if path.parent.name == "mini" and config.model.num_classes:
        assert replace(PRESETS[preset], dropout=config.model.dropout) == config.model
    extract = load_config(ExtractConfig, path.with_name(f"{Path(config.archive).name}.yaml"))
    assert extract.condition_lengths == config.model.condition_lengths
    assert extract.tokenizer == config.tokenizer
    if extract.class_names:
        assert len(extract.class_names) == config.model.num_classes


def test_a_config_error_is_a_user_error() -> None:
    """So that every entry point ends it in one line and exit code 2."""
    assert issubclass(ConfigError, UserError)
