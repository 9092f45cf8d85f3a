"""The sentences of the report: what the budget asked for, why a clip got what it got, how the figures were made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]


def signed(number: float) -> str:
    """+0.50, or −0.50 with a true minus sign."""
    return f"{number:+.2f}".replace("-", "−")


def title(metrics: Mapping[str, Any]) -> str:
    """The result in a line."""
    num, tokens = len(metrics["clips"]), metrics["mean"]["tokens"]
    return f"1 clip, {tokens:.0f} tokens" if num == 1 else f"{num} clips, {tokens:.0f} tokens each on average"


def budget_sentence(metrics: Mapping[str, Any]) -> str:
    """What decided the lengths of every clip."""
    form, _, value = metrics["budget"].partition(":")
    if form == "fixed":
        return f"Every clip got the same tokens in its blocks: {value.replace(',', ', ')}."
    if form == "uniform":
        return f"Every clip got {value} tokens in each of its {metrics['tokenizer']['num_blocks']} blocks."
    among = {
        "router": "",
        "tokens": f" among those of at most {value} tokens",
        "price": f" after a price of {value} for every token",
        "average": f" after a price for every token at which the whole set keeps to {value} tokens a clip",
    }
    return f"Each clip got the assignment of tokens to blocks that the router rates highest{among[form]}."


def made_with(metrics: Mapping[str, Any]) -> str:
    """Weights, budget and perceptual network in one line; `protocol` has the rest."""
    router = metrics["router"]
    parts = [
        f"tokenizer {metrics['tokenizer']['sha256'][:12]}",
        f"router {router['sha256'][:12]}" if router else "no router",
        f"budget {metrics['budget']}",
        f"LPIPS by {metrics['lpips_backbone'] or 'none'}",
        f"{metrics['num_videos']} videos, {metrics['num_skipped']} skipped",
    ]
    return " · ".join(parts)


def size_warning(tokenizer: Mapping[str, Any]) -> str | None:
    """A sentence where clips and tokenizer are not the paper's."""
    if tokenizer["paper_size"]:
        return None
    clip = f"{tokenizer['num_frames']}×{tokenizer['size']}×{tokenizer['size']}"
    return (
        f"Not the size of the paper: clips of {clip} and a tokenizer of {tokenizer['num_parameters'] / 1e6:.1f}M "
        "parameters, where the paper has 16×128×128 and 145M. The figures show that the parts work; they are not to be "
        "compared with published ones."
    )


def why(record: Record, budget: str, motions: Sequence[float]) -> str:
    """Why this clip got what it got. `motions`: those of all clips of the report."""
    sentences = [choice(record, budget), movement(record, motions)]
    if record["num_padded"]:
        sentences.append(f"The file is short: its last frame is repeated {record['num_padded']} times.")
    return " ".join(sentence for sentence in sentences if sentence)


def choice(record: Record, budget: str) -> str:
    """The rule of the budget with the router's figures: scores are logits, their differences are what counts."""
    form = budget.partition(":")[0]
    alone = f" The router alone would spend {record['router_tokens']}." if "router_tokens" in record else ""
    if form in ("fixed", "uniform"):
        return f"Set by the budget.{alone}"
    scope = {"router": "", "tokens": " within the limit"}.get(form, " after the price")
    split = f"{record['best_uniform']} in every block"
    gap = record["score_gap"]
    against = f", {gap:.2f} above the best even split ({split})" if gap else f": it is an even split, {split}"
    differs = record["router_tokens"] != record["tokens"]
    return f"The router rates it highest{scope}{against}.{alone if differs else ''}"


def movement(record: Record, motions: Sequence[float]) -> str:
    """Its motion among all clips, and whether the block with most tokens is the one that moves most."""
    num, lower = len(motions), sum(motion < record["motion"] for motion in motions)
    among = (
        f"Moves more than {lower} of the other {num - 1} clips." if lower else f"No other of {num} clips moves less."
    )
    if num == 1:
        among = ""
    lengths, motion_N = record["assignment"], record["block_motion"]
    if lengths.count(max(lengths)) > 1 or max(motion_N) == min(motion_N):
        return among
    dearest, liveliest = lengths.index(max(lengths)) + 1, motion_N.index(max(motion_N)) + 1
    if dearest == liveliest:
        return f"{among} Block {dearest} moves most and gets most."
    return f"{among} Block {dearest} gets most, block {liveliest} moves most."


def protocol(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Everything that decides the figures, heading -> text."""
    tok, router, given = metrics["tokenizer"], metrics["router"], metrics["input"]
    rate = "each file's own frame rate" if given["fps"] is None else f"{given['fps']:g} frames a second"
    which = "every clip" if given["all_clips"] else "the first clip"
    which += f" (at most {given['max_clips']} in all)" if given["max_clips"] else ""
    ends = f"; {metrics['frames_left_out']} frames at the ends of files, too few for a clip, are left out"
    price = "" if metrics["price"] is None else f"; price {metrics['price']:.6g} a token"
    levels = ", ".join(map(str, tok["levels"]))
    return {
        "Videos": f"{given['vid_path']}: {metrics['num_videos']} files, {metrics['num_skipped']} skipped",
        "Clips": f"{which} of {tok['num_frames']} consecutive frames at {rate}, read with {given['backend']}; "
        f"short side to {tok['size']} pixels, centre crop; a file shorter than a clip repeats its last frame"
        + (ends if metrics["frames_left_out"] else ""),
        "Budget": metrics["budget"] + price,
        "Levels": f"{levels} tokens for each of {tok['num_blocks']} blocks: "
        f"{len(tok['levels']) ** tok['num_blocks']} assignments",
        "Tokenizer": f"{tok['weights']}, {tok['num_parameters'] / 1e6:.1f}M parameters, sha256 {tok['sha256']}",
        "Router": "none" if router is None else f"{router['weights']}, sha256 {router['sha256']}",
        "PSNR, SSIM": "of the models' own arrays, before any video is written; PSNR from the error of the whole clip",
        "LPIPS": metrics["lpips_backbone"] or f"none: {metrics['lpips_reason']}",
        "Motion": "mean absolute difference of neighbouring frames, grey levels 0 to 255",
        "Machine": f"{metrics['device']}; " + ", ".join(f"{k} {v}" for k, v in metrics["versions"].items()),
    }
