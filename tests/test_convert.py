"""Weights of other code: five spellings come back bit for bit, hostile pickles are refused, no half is kept."""

from __future__ import annotations

import os
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from einops import rearrange
from torch import Tensor, nn

from autoregressive import convert as convert_gpt
from autoregressive.model import GPT
from autoregressive.presets import PRESETS as GPTS
from autoregressive.presets import load_gpt
from tokenizer import convert
from tokenizer.common.config import to_dict
from tokenizer.common.errors import UserError
from tokenizer.common.foreign import read_foreign
from tokenizer.model import TransformerConfig
from tokenizer.presets import PRESETS, build_tokenizer, load_tokenizer
from tokenizer.router.model import Router, RouterConfig
from tokenizer.router.predict import load_router

Tensors = dict[str, Tensor]
Run = Callable[..., None]
DETR = {
    "self_attention": "self_attn",
    "cross_attention": "multihead_attn",
    "mlp.0": "linear1",
    "mlp.2": "linear2",
    "norm_self": "norm1",
    "norm_cross": "norm2",
    "norm_mlp": "norm3",
}


def random_weights(model: nn.Module) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(t.shape, generator=generator) for name, t in model.state_dict().items()}


def renamed(tensors: Tensors, *rules: tuple[str, str]) -> Tensors:
    for pattern, by in rules:
        tensors = {re.sub(pattern, by, name): tensor for name, tensor in tensors.items()}
    return tensors


def ancestor(tensors: Tensors) -> Tensors:
    """The ancestor's names of modules, with DETR's of a layer."""
    layers = [(rf"\.{re.escape(ours)}\.", f".{theirs}.") for ours, theirs in DETR.items()]
    return renamed(
        tensors,
        *layers,
        (r"^encoder\.(\d)", r"s2to1encoder.layers.\1"),
        (r"^decoder\.(\d)", r"s1to2decoder.layers.\1"),
        (r"^quantizer\.codebook", "quantize.embedding"),
        (r"^to_latent\.1", "quant_conv"),
        (r"^from_latent\.0", "post_quant_conv"),
        (r"^to_latent\.0", "s2to1encoder.conv_out"),
        (r"^from_latent\.1", "s1to2decoder.conv_in"),
        (r"^to_pixels", "s1to2decoder.some_head"),
        (r"^(patch_embed|query_embed)", r"s2to1encoder.\1"),
        (r"^(encoder)_(patch_pos|token_pos|norm)", r"s2to1encoder.\2"),
        (r"^(decoder)_(patch_pos|token_pos|norm)", r"s1to2decoder.\2"),
    )


def fused(tensors: Tensors, by: str) -> Tensors:
    """Queries, keys and values in one tensor, called `by` + weight or bias."""
    out = {}
    for name, tensor in tensors.items():
        if ".to_q." in name:
            parts = [tensors[name.replace(".to_q.", f".to_{x}.")] for x in "qkv"]
            out[re.sub(r"\.to_q\.", f".{by}", name)] = torch.cat(parts)
        elif not re.search(r"\.to_[kv]\.", name):
            out[name] = tensor
    return out


def ours_wrapped(tensors: Tensors) -> object:
    return {"model": {f"module.{name}": tensor for name, tensor in tensors.items()}, "step": np.int64(7)}


def multihead_attention(tensors: Tensors) -> object:
    names = renamed(fused(ancestor(tensors), "in_proj_"), (r"\.to_out\.", ".out_proj."))
    names |= {name: names[name][..., None, None] for name in names if "quant_conv.weight" in name}  # 1x1 convolutions
    wrong = {name: torch.zeros_like(tensor) for name, tensor in names.items()}
    return {"model": wrong, "ema": names, "lr": np.float64(0.1), "best": np.float32(2), "done": np.bool_(True)}


def apart(tensors: Tensors) -> object:
    rules = [(rf"\.to_{x}\.", f".{x}_proj.") for x in "qkv"]
    return {"state_dict": renamed(ancestor(tensors), *rules, (r"\.to_out\.", ".wo."))}


def compiled(tensors: Tensors) -> object:
    names = renamed(fused(ancestor(tensors), "wqkv."), (r"\.to_out\.", ".wo."))
    return {f"_orig_mod.module.{name}": tensor for name, tensor in names.items()}


def shapes_only(tensors: Tensors) -> object:
    """Unknown names outside of the layers, a 3D convolution over pixels, tables with more axes."""
    names = ancestor(tensors)
    patches = names.pop("s2to1encoder.patch_embed.weight")
    names["s2to1encoder.conv_in.weight"] = rearrange(
        patches, "D (pt ph pw C) -> D C pt ph pw", pt=4, ph=8, pw=8
    ).contiguous()
    names["s2to1encoder.conv_in.bias"] = names.pop("s2to1encoder.patch_embed.bias")
    names = renamed(names, ("patch_pos", "where_3d"), ("token_pos", "where_1d"), (r"query_embed\.", "mystery."))
    for name in names:
        if "where_3d" in name:
            names[name] = names[name].unflatten(0, (4, -1))
        elif "where_1d" in name:
            names[name] = names[name][None]
    return {"ema": names}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    def run(entry: object, *args: object) -> None:
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, args)])
        entry.main()  # type: ignore[attr-defined]

    return run


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "ours.yaml"
    path.write_text(yaml.safe_dump({"model": to_dict(PRESETS["VQ_debug"])}))
    return path


@pytest.mark.parametrize("spelling", [ours_wrapped, multihead_attention, apart, compiled, shapes_only])
def test_five_spellings_come_back_bit_for_bit(
    spelling: Callable[[Tensors], object],
    run: Run,
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights = random_weights(build_tokenizer("VQ_debug"))
    torch.save(spelling(weights), tmp_path / "theirs.pt")
    run(convert, tmp_path / "theirs.pt", "--to", tmp_path / "out.safetensors", "--config", config)
    assert "mapped, but does not reconstruct" in capsys.readouterr().out  # random weights
    found = load_tokenizer(tmp_path / "out.safetensors").state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_nothing_is_written_unless_all_is_filled_and_nothing_is_left(
    run: Run, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = ancestor(random_weights(build_tokenizer("VQ_debug")))
    weights["distill_mlp.0.weight"] = torch.zeros(5, 6)
    weights["odd.table"] = weights.pop("quantize.embedding.weight")
    theirs, out, given = tmp_path / "theirs.pt", tmp_path / "out.safetensors", tmp_path / "map.yaml"
    torch.save({"model": weights, "epoch": 3}, theirs)
    command = (convert, theirs, "--config", config, "--to", out)
    with pytest.raises(UserError) as refusal:
        run(*command)
    text = str(refusal.value)
    assert "1 of ours are not filled: quantizer.codebook.weight (64, 8)" in text
    assert "2 of theirs have no place: distill_mlp.0.weight (5, 6), odd.table (64, 8)" in text
    assert not out.exists() and "\n" not in text
    run(convert, theirs, "--config", config)  # the inventory
    printed = capsys.readouterr().out
    assert "distill_mlp.0.weight  (5, 6)  float32" in printed and "(epoch: 3)" in printed and not out.exists()
    given.write_text("distill_mlp.*: drop\nodd.table: quantizer.codebook.weight\n")
    run(*command, "--map", given)
    assert torch.equal(load_tokenizer(out).state_dict()["quantizer.codebook.weight"], weights["odd.table"])
    given.write_text("absent.*: drop\n")
    with pytest.raises(UserError, match=r"no tensor of theirs is called 'absent.\*'"):
        run(*command, "--map", given)


class _Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch never-run",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_hostile_pickles_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"model": {"w": torch.zeros(1)}, "args": _Hostile()}, path)
    with pytest.raises(UserError, match=r"refused, because its pickle names (posix|nt)\.system"):
        read_foreign(path)
    torch.save({"model": {"w": torch.zeros(1)}, "config": Path("x")}, path)
    with pytest.raises(UserError, match=r"refused, because its pickle names pathlib"):
        read_foreign(path)
    path.write_bytes(pickle.dumps(_Hostile()))  # no zip around it
    with pytest.raises(UserError, match="refused|cannot be read"):
        read_foreign(path)
    torch.save({"model": {"w": torch.zeros(1)}, "history": np.zeros(3)}, path)  # an array, not a scalar
    with pytest.raises(UserError, match="_reconstruct|ndarray"):
        read_foreign(path)
    for content, reason in ((b"no pickle", "cannot be read"), (pickle.dumps([1]), "cannot be read|holds a")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=reason):
            read_foreign(path)


def test_their_config_is_translated_or_named(tmp_path: Path) -> None:
    path = tmp_path / "theirs.yaml"
    args = {
        "frame_num": 16, "input_size": 128, "temporal_patch_size": 4, "spatial_token_num_choices": [32, 64, 128],
        "codebook_size": 8192, "codebook_embed_dim": 8, "codebook_l2_norm": True, "commit_loss_beta": 0.25,
        "encoder_size": "small", "decoder_size": "base", "z_channels": 256, "num_latent_tokens": 512,
    }  # fmt: skip
    path.write_text(yaml.safe_dump({"model": {"model_cls": "x.Y", "init_args": args}, "data": {"root": "/x"}}))
    found = convert.tokenizer_config(path)
    assert found.config.levels == [32, 64, 128] and found.config.codebook_size == 8192
    assert found.config.decoder == TransformerConfig(layers=12, width=768, heads=12)
    assert found.unknown == {"num_latent_tokens": 512, "section data": "..."}
    path.write_text(yaml.safe_dump({"model": {"init_args": {**args, "codebook_l2_norm": False}}}))
    with pytest.raises(UserError, match="codebook_l2_norm = False"):
        convert.tokenizer_config(path)


def test_a_router_in_the_spelling_of_timm(run: Run, tmp_path: Path) -> None:
    config = RouterConfig(size=32, levels=[2, 4, 8], layers=2, width=32, heads=2)
    weights = random_weights(Router(config))
    rules = (
        (r"^layers\.", "blocks."), ("to_qkv", "qkv"), (r"attention\.to_out", "attn.proj"), (r"attention\.", "attn."),
        ("norm_attention", "norm1"), ("norm_mlp", "norm2"), (r"mlp\.0", "mlp.fc1"), (r"mlp\.2", "mlp.fc2"),
        ("cls_D", "cls_token"), ("^embed", "patch_embed.proj"),
    )  # fmt: skip
    theirs = renamed(weights, *rules)
    theirs["cls_token"] = theirs["cls_token"][None, None]
    torch.save(theirs, tmp_path / "r.pt")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"model": to_dict(config)}))
    out = tmp_path / "r.safetensors"
    run(convert, tmp_path / "r.pt", "--kind", "router", "--config", tmp_path / "r.yaml", "--to", out)
    found = load_router(out).model.state_dict()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_a_gpt_in_the_spelling_of_llamagen(run: Run, tmp_path: Path) -> None:
    weights = random_weights(GPT(GPTS["GPT-debug"]))
    theirs = {}
    for name, tensor in renamed(weights, (r"^blocks\.", "layers.")).items():
        if name == "embedding.weight":
            rows = GPTS["GPT-debug"].layout.num_ids
            theirs["tok_embeddings.weight"] = tensor[:rows]
            theirs["cls_embedding.embedding_table.weight"] = tensor[rows:]
        elif name.endswith("to_hidden.weight"):
            for key, part in zip(("w1", "w3"), tensor.chunk(2), strict=True):
                theirs[name.replace("to_hidden", f"feed_forward.{key}")] = part
        else:
            theirs[name] = tensor
    rules = (
        ("to_qkv", "attention.wqkv"), ("to_out", "attention.wo"), ("from_hidden", "feed_forward.w2"),
        ("feed_norm", "ffn_norm"), (r"^head\.", "output."), ("^positions$", "pos_embed"),
    )  # fmt: skip
    torch.save({"model": {k: v.clone() for k, v in renamed(theirs, *rules).items()}}, tmp_path / "g.pt")
    run(convert_gpt, tmp_path / "g.pt", "--gpt-model", "GPT-debug", "--to", tmp_path / "g.safetensors")
    found = load_gpt(tmp_path / "g.safetensors").model.state_dict()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
