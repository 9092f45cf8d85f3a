"""report.html of the main job: how many tokens each clip got, and why. Made from the results folder alone.

The words and figures are here; reconstruction.html is the page.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokenizer.common.checkpoint import atomic_write
from tokenizer.common.clip_shape import fitted, sides
from tokenizer.common.schema import read_json, read_json_value
from tokenizer.viz.frames import FULL_ERROR
from tokenizer.viz.page import PLAYED_FPS, film_sheet, render
from tokenizer.viz.plots import Series, area_chart, bar_chart, scatter_chart, to_svg

MOST_FILMS = 60
MOST_BYTES = 6 << 20  # of films, which the page holds as base64: 50 clips of 64x64, or 15 of 128x128, in four rows
NUM_EXTREMES = 3  # a row of the page
MOST_DOTS = 2000
MOST_ASSIGNMENTS = 10

Record = Mapping[str, Any]


def write_report(folder: str | Path) -> Path:
    """Write report.html beside metrics.json, skipped.json and clips/, and return its path."""
    folder = Path(folder)
    metrics = read_json(folder / "metrics.json", {"clips": list[dict]}, "run the job again")
    skipped = read_json_value(folder / "skipped.json", "run the job again")
    path = folder / "report.html"
    atomic_write(path, report_page(folder, metrics, skipped).encode())
    return path


def closing_lines(metrics: Mapping[str, Any]) -> str:
    """What the job prints: assignments, motion beside tokens, padding, and last the mean figures."""
    mean, use, correlation = metrics["mean"], metrics["assignments"], metrics["motion_tokens_rank_correlation"]
    commonest = " ".join(map(str, use["commonest"]))
    lines = [
        f"{use['num_distinct']} distinct assignments of {use['num_possible']}; the commonest ({commonest}) has "
        f"{use['commonest_share']:.0%} of the clips"
    ]
    thirds = metrics["tokens_by_motion"]
    if len(thirds) > 1:
        each = "; ".join(f"{t['motion']:.1f} grey levels: {t['tokens']:.1f} tokens" for t in thirds)
        rank = "" if correlation is None else f"; rank correlation {correlation:+.2f}"
        lines.append(f"motion and tokens, clips in {len(thirds)} groups from still to lively: {each}{rank}")
    lines += sentences(metrics)
    left_out = f", {metrics['frames_left_out']} frame(s) at their ends left out" if metrics["frames_left_out"] else ""
    lpips = "" if mean["lpips"] is None else f", {metrics['lpips_backbone']} {mean['lpips']:.4f}"
    lines.append(
        f"{len(metrics['clips'])} clip(s), {mean['tokens']:.1f} tokens each, PSNR {mean['psnr']:.2f} dB, "
        f"SSIM {mean['ssim']:.4f}{lpips}; {metrics['num_skipped']} video(s) skipped{left_out}"
    )
    return "\n".join(lines)


def report_page(folder: Path, metrics: Mapping[str, Any], skipped: Sequence[Mapping[str, str]]) -> str:
    """The page. `folder`: where clips/<name>/film.jpg are."""
    records, tok = metrics["clips"], metrics["tokenizer"]
    largest = max((folder / "clips" / r["name"] / "film.jpg").stat().st_size for r in records)
    groups = grouped(records, min(MOST_FILMS, max(3 * NUM_EXTREMES, MOST_BYTES // largest)))
    keys = {r["name"]: f"c{i}" for i, r in enumerate(r for _, _, group in groups for r in group)}
    motions = [r["motion"] for r in records]
    cards = [
        (heading, note, [card(r, keys[r["name"]], metrics["budget"], unit(metrics), motions) for r in group])
        for heading, note, group in groups
    ]
    pictures = {key: (folder / "clips" / name / "film.jpg").read_bytes() for name, key in keys.items()}
    captions = ["original", "reconstruction", *(["uniform"] if metrics["compare_uniform"] else []), "error"]
    length_SN = np.array([r["assignment"] for r in records])
    return render(
        "reconstruction.html",
        title=title(metrics),
        lede=budget_sentence(metrics),
        made_with=made_with(metrics),
        notes=notes(metrics),
        figures=figures(metrics),
        protocol=protocol(metrics),
        charts=charts(metrics, keys),
        levels=[(level, 100 * (length_SN == level).mean(axis=0)) for level in reversed(tok["levels"])],
        mean_lengths=length_SN.mean(axis=0),
        num_blocks=tok["num_blocks"],
        longest=tok["levels"][-1],
        groups=cards,
        captions=captions,
        films=film_sheet(pictures, tok["num_frames"], len(captions)),
        skipped=skipped,
        played_fps=PLAYED_FPS,
        full_error=FULL_ERROR,
    )


def grouped(records: Sequence[Record], most: int = MOST_FILMS) -> list[tuple[str, str, list[Record]]]:
    """(heading, note, clips): the worst, the cheapest, the most expensive, then others up to `most` in all.

    A clip appears once, in the first group that has it. Few clips are one group, the cheapest first.
    """
    by_cost = sorted(records, key=lambda r: (r["tokens"], r["motion"]))
    if len(records) < 3 * NUM_EXTREMES:
        return [("All clips", "fewest tokens first", by_cost)]
    by_quality = sorted(records, key=lambda r: r["psnr"])
    wanted: list[tuple[str, str, Iterable[Record]]] = [("Worst reconstructions", "lowest PSNR first", by_quality)]
    if by_cost[0]["tokens"] < by_cost[-1]["tokens"]:
        wanted += [("Fewest tokens", "", by_cost), ("Most tokens", "", reversed(by_cost))]
    seen: set[str] = set()
    groups = []
    for heading, note, ranked in wanted:
        extremes = list(ranked)[:NUM_EXTREMES]
        group = [r for r in extremes if r["name"] not in seen]
        if missing := len(extremes) - len(group):
            note = f"besides {missing} already shown above"
        seen |= {r["name"] for r in group}
        groups.append((heading, note, group))
    rest = [r for r in by_cost if r["name"] not in seen]
    shown = evenly(rest, max(0, most - len(seen)))
    note = "fewest tokens first"
    if len(shown) < len(rest):
        note = f"{len(shown)} of {len(rest)}, evenly spread from the fewest tokens to the most"
    groups.append(("Other clips", note, shown))
    return [group for group in groups if group[2]]


def card(r: Record, key: str, budget: str, unit: str, motions: Sequence[float]) -> dict[str, Any]:
    """What the page shows of one clip. `key`: its anchor and the class that holds its film. `unit`: of scores."""
    numbers = {"tokens": str(r["tokens"]), "PSNR": f"{r['psnr']:.1f} dB"}
    if r["lpips"] is not None:
        numbers["LPIPS"] = f"{r['lpips']:.3f}"
    numbers["motion, grey levels"] = f"{r['motion']:.1f}"
    if "uniform_psnr" in r:
        numbers[f"uniform, {r['uniform_tokens']} tokens"] = f"{r['uniform_psnr']:.1f} dB"
    return {
        "key": key,
        "file": r["file"],
        "start": r["start"],
        "lengths": r["assignment"],
        "numbers": numbers,
        "why": why(r, budget, unit, motions),
    }


def figures(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The large figures at the top: (label, value, unit)."""
    mean, book, use = metrics["mean"], metrics["codebook"], metrics["assignments"]
    correlation, totals = metrics["motion_tokens_rank_correlation"], uniform_totals(metrics["tokenizer"])
    lpips = ("–", "not measured") if mean["lpips"] is None else (f"{mean['lpips']:.4f}", metrics["lpips_backbone"])
    return [
        ("tokens per clip", f"{mean['tokens']:.1f}", f"tokens, of {totals[0]} to {totals[-1]}"),
        ("PSNR", f"{mean['psnr']:.2f}", "dB"),
        ("SSIM", f"{mean['ssim']:.3f}", "1 = equal"),
        ("LPIPS", *lpips),
        ("distinct assignments", f"{use['num_distinct']}", f"of {use['num_possible']}"),
        ("commonest assignment", f"{100 * use['commonest_share']:.0f} %", "of the clips"),
        ("motion", f"{mean['motion']:.1f}", "grey levels"),
        ("motion ~ tokens", "–" if correlation is None else signed(correlation), "rank correlation"),
        ("codebook in use", f"{100 * book['share_used']:.0f} %", f"of {book['size']} codes"),
    ]


def charts(metrics: Mapping[str, Any], keys: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(heading, SVG, line below) of each chart. `keys`: clip name -> anchor."""
    records, book, totals = metrics["clips"], metrics["codebook"], uniform_totals(metrics["tokenizer"])
    ranked, others = commonest(records)
    drawn = evenly(records, MOST_DOTS)
    linked = "Each dot is a clip and links to it."
    linked += f" {len(drawn)} of {len(records)} clips are drawn." if len(drawn) < len(records) else ""
    links = [f"#{keys[r['name']]}" if r["name"] in keys else "" for r in drawn]
    hints = [f"{place(r)}: {r['tokens']} tokens, PSNR {r['psnr']:.1f} dB, motion {r['motion']:.1f}" for r in drawn]
    correlation = metrics["motion_tokens_rank_correlation"]
    related = "No rank correlation: all clips have the same number of tokens or the same motion."
    if correlation is not None:
        related = f"Rank correlation {signed(correlation)} over {len(records)} clips."
    name, key, y_title, by = "Structural similarity", "ssim", "SSIM, 1 = equal", "LPIPS was not measured."
    if metrics["mean"]["lpips"] is not None:
        name, key, y_title, by = "Perceptual distance", "lpips", "LPIPS, 0 = equal", f"By {metrics['lpips_backbone']}."
    codes = (
        f"{100 * book['share_used']:.0f} % of the {book['size']} codes occur among {book['num_drawn']} tokens; "
        f"perplexity {book['perplexity']:.0f} codes."
    )

    def dots(x: str, y: str) -> Series:
        return Series("clips", [(r[x], r[y]) for r in drawn], hints, links)

    tokens, motion = "tokens per clip", "motion, grey levels"
    quality = scatter_chart(dots("tokens", "psnr"), tokens, "PSNR, dB", x_levels=totals)
    second = scatter_chart(dots("tokens", key), tokens, y_title, x_levels=totals)
    moving = scatter_chart(dots("motion", "tokens"), motion, tokens, y_levels=totals)
    names, counts = [name for name, _ in ranked], [count for _, count in ranked]
    bars = bar_chart(names, counts, "", "tokens of blocks 1, 2, ..; number of clips")
    curve = list(zip(np.linspace(0, book["size"], len(book["curve"])), book["curve"], strict=True))
    usage = area_chart(curve, "codes, commonest first", "frequency relative to even use", 1.0, "even use")
    return [
        ("Quality against tokens", to_svg(quality, "PSNR against tokens"), linked),
        (f"{name} against tokens", to_svg(second, f"{name} against tokens"), by),
        ("Tokens against motion", to_svg(moving, "tokens against motion"), related),
        ("Commonest assignments", to_svg(bars, "number of clips of each assignment"), others),
        ("Codebook", to_svg(usage, "frequency of the codes"), codes),
    ]


def commonest(records: Sequence[Record]) -> tuple[list[tuple[str, int]], str]:
    """The commonest assignments with their numbers of clips, and a line about the others."""
    counts = Counter(tuple(r["assignment"]) for r in records)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], sum(item[0])))[:MOST_ASSIGNMENTS]
    line = "All clips have the same assignment." if len(counts) == 1 else f"{len(counts)} distinct assignments."
    if rest := len(records) - sum(count for _, count in ranked):
        line += f" The {len(counts) - len(ranked)} not drawn have {rest} clips together."
    return [("  ".join(map(str, lengths)), count) for lengths, count in ranked], line


def uniform_totals(tokenizer: Mapping[str, Any]) -> list[int]:
    """Tokens of a clip if all its blocks get the same level, for each level."""
    return [level * tokenizer["num_blocks"] for level in tokenizer["levels"]]


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items at even distances, including the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def signed(number: float) -> str:
    """+0.50, or −0.50 with a true minus sign."""
    return f"{number:+.2f}".replace("-", "−")


def place(record: Record) -> str:
    """A clip's file, and its first frame if it is not the file's first."""
    return record["file"] + (f", frame {record['start']}" if record["start"] else "")


def title(metrics: Mapping[str, Any]) -> str:
    num, tokens = len(metrics["clips"]), metrics["mean"]["tokens"]
    return f"1 clip, {tokens:.0f} tokens" if num == 1 else f"{num} clips, {tokens:.0f} tokens each on average"


def budget_sentence(metrics: Mapping[str, Any]) -> str:
    """How the lengths of every clip were chosen."""
    form, _, value = metrics["budget"].partition(":")
    if form == "fixed":
        return f"The blocks of every clip got the same tokens: {value.replace(',', ', ')}."
    if floor := metrics["quality_floor"]:
        network = floor["perceptual_net"] or "the table's network"
        return (
            f"Each clip got the fewest tokens for which the router predicts a distance of at most {value} by {network} "
            "for the proxy's reconstruction, or, if no assignment is predicted to reach it, the best predicted one."
        )
    if form == "uniform":
        return f"Every clip got {value} tokens in each of its {metrics['tokenizer']['num_blocks']} blocks."
    among = {
        "router": "",
        "tokens": f" among those of at most {value} tokens",
        "price": f" after subtracting {value} {unit(metrics)} per token",
        "average": f" after subtracting a price per token that keeps the whole set at {value} tokens per clip",
    }.get(form, f" under the budget {metrics['budget']}")
    weight = "" if metrics["trade_off"] is None else f" at the trade-off w_q = {metrics['trade_off']:g}"
    return f"Each clip got the assignment of tokens to blocks that the router rates highest{weight}{among}."


def unit(metrics: Mapping[str, Any]) -> str:
    """Of a router's scores: the reward if it predicts qualities, else logits."""
    return "logits" if metrics["trade_off"] is None else "units of reward"


def made_with(metrics: Mapping[str, Any]) -> str:
    """Weights, budget and perceptual network in one line; `protocol` has the rest."""
    router = metrics["router"]
    parts = [
        f"tokenizer {metrics['tokenizer']['sha256'][:12]}",
        f"router {router['sha256'][:12]}" if router else "no router",
        f"budget {metrics['budget']}",
        *([] if metrics["trade_off"] is None else [f"trade-off w_q = {metrics['trade_off']:g}"]),
        f"LPIPS by {metrics['lpips_backbone'] or 'none'}",
        f"{metrics['num_videos']} videos, {metrics['num_skipped']} skipped",
    ]
    return " · ".join(parts)


def notes(metrics: Mapping[str, Any]) -> list[str]:
    """What a reader must know before the figures."""
    found = []
    if not metrics["complete"]:
        found.append("The run was stopped: the report covers the clips it finished.")
    found += sentences(metrics)
    tokenizer = metrics["tokenizer"]
    if not tokenizer["paper_size"]:
        clip = "×".join(map(str, (tokenizer["num_frames"], *sides(tokenizer["size"]))))
        found.append(
            f"Not the size of the paper: clips of {clip} and a tokenizer of {tokenizer['num_parameters'] / 1e6:.1f}M "
            "parameters; the paper has 16×128×128 and 145M. Do not compare these figures with published ones."
        )
    return found


def sentences(metrics: Mapping[str, Any]) -> list[str]:
    """About padding, uniform assignments and quality:Q, as far as they apply."""
    found = (padding_sentence(metrics), uniform_sentence(metrics), floor_sentence(metrics))
    return [sentence for sentence in found if sentence]


def padding_sentence(metrics: Mapping[str, Any]) -> str | None:
    """How many clips repeat their last frame, and the figures without them; None if no clip does."""
    padding, num = metrics["padding"], len(metrics["clips"])
    if not padding["num_clips"]:
        return None
    text = (
        f"{padding['num_clips']} of {num} clip(s) are padded: {padding['num_frames']} of their "
        f"{padding['num_clips'] * metrics['tokenizer']['num_frames']} frames repeat the last frame of a short video."
    )
    without = padding["mean_without"]
    if without is None:
        return f"{text} No clip is without padding."
    lpips = "" if without["lpips"] is None else f", LPIPS {without['lpips']:.4f}"
    return (
        f"{text} Without them: {without['tokens']:.1f} tokens per clip, PSNR {without['psnr']:.2f} dB, "
        f"SSIM {without['ssim']:.4f}{lpips}."
    )


def uniform_sentence(metrics: Mapping[str, Any]) -> str | None:
    """The mean figures at the nearest uniform assignment of each clip; None if they were not asked for."""
    uniform = metrics["mean_uniform"]
    if uniform is None:
        return None
    lpips = "" if uniform["uniform_lpips"] is None else f", LPIPS {uniform['uniform_lpips']:.4f}"
    return (
        f"The same clips at the nearest uniform assignment: {uniform['uniform_tokens']:.1f} tokens each, "
        f"PSNR {uniform['uniform_psnr']:.2f} dB, SSIM {uniform['uniform_ssim']:.4f}{lpips}."
    )


def floor_sentence(metrics: Mapping[str, Any]) -> str | None:
    """How many clips keep quality:Q, by prediction and measured; None under other budgets."""
    floor, num = metrics["quality_floor"], len(metrics["clips"])
    if floor is None:
        return None
    missed = floor["num_not_predicted"]
    text = f"No assignment is predicted to keep {metrics['budget']} for {missed} of {num} clip(s)"
    if floor["num_kept_measured"] is None:
        return f"{text}; whether the others do was not measured by {floor['perceptual_net'] or 'the same network'}."
    return f"{text}; measured with this tokenizer, {floor['num_kept_measured']} of {num} keep it."


def why(record: Record, budget: str, unit: str, motions: Sequence[float]) -> str:
    """Why this clip got its tokens. `unit`: of scores. `motions`: those of all clips of the report."""
    sentences = [choice(record, budget, unit), movement(record, motions)]
    if record["num_padded"]:
        sentences.append(f"The file is short: its last frame is repeated {record['num_padded']} times.")
    sentences += [f"Note: {note}." for note in record.get("notes", [])]
    return " ".join(sentence for sentence in sentences if sentence)


def choice(record: Record, budget: str, unit: str) -> str:
    """The rule of the budget with the router's figures; of scores only differences count."""
    form = budget.partition(":")[0]
    if form == "quality":
        predicted = f"{record['predicted_distance']:.4f}"
        if record["keeps_quality"]:
            return f"The cheapest assignment that is predicted to keep the quality: a distance of {predicted}."
        return f"No assignment is predicted to keep the quality: this is the best one, at a distance of {predicted}."
    alone = f" The router alone would spend {record['router_tokens']} tokens." if "router_tokens" in record else ""
    if form in ("fixed", "uniform"):
        return f"Set by the budget.{alone}"
    scope = {"router": "", "tokens": " within the limit"}.get(form, " after the price")
    uniform = f"{record['best_uniform']} tokens in every block"
    gap = record["score_gap"]
    against = f", {gap:.2f} {unit} above the best uniform one ({uniform})" if gap else f": {uniform}"
    differs = record["router_tokens"] != record["tokens"]
    return f"The router's first choice{scope}{against}.{alone if differs else ''}"


def movement(record: Record, motions: Sequence[float]) -> str:
    """Its motion among all clips, and whether the block with most tokens is the one that moves most."""
    num, lower = len(motions), sum(motion < record["motion"] for motion in motions)
    among = (
        f"It moves more than {lower} of the other {num - 1} clips." if lower else f"No other of {num} clips moves less."
    )
    if num == 1:
        among = ""
    lengths, motion_N = record["assignment"], record["block_motion"]
    if lengths.count(max(lengths)) > 1 or max(motion_N) == min(motion_N):
        return among
    longest, liveliest = lengths.index(max(lengths)) + 1, motion_N.index(max(motion_N)) + 1
    if longest == liveliest:
        return f"{among} Block {longest} moves most and gets most."
    return f"{among} Block {longest} gets most, block {liveliest} moves most."


def protocol(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Everything that affects the figures, heading -> text."""
    tok, router, given = metrics["tokenizer"], metrics["router"], metrics["input"]
    rate = "each file's own frame rate" if given["fps"] is None else f"{given['fps']:g} frames a second"
    most = f" (at most {given['max_clips']} in all)" if given["max_clips"] else ""
    which = ("every clip" if given["all_clips"] else "the first clip") + most
    ends = f"; {metrics['frames_left_out']} frames at the ends of files, too few for a clip, are left out"
    price = "" if metrics["price"] is None else f"; price {metrics['price']:.6g} {unit(metrics)} per token"
    trade_off = "" if metrics["trade_off"] is None else f"; trade-off w_q = {metrics['trade_off']:g}"
    levels = ", ".join(map(str, tok["levels"]))
    return {
        "Videos": f"{given['vid_path']}: {metrics['num_videos']} files, {metrics['num_skipped']} skipped",
        "Clips": f"{which} of {tok['num_frames']} consecutive frames at {rate}, read with {given['backend']}; "
        f"{fitted(tok['size'])}; a file shorter than a clip repeats its last frame"
        + (ends if metrics["frames_left_out"] else ""),
        "Budget": metrics["budget"] + price + trade_off,
        "Levels": f"{levels} tokens for each of {tok['num_blocks']} blocks: "
        f"{len(tok['levels']) ** tok['num_blocks']} assignments",
        "Tokenizer": f"{tok['weights']}, {tok['num_parameters'] / 1e6:.1f}M parameters, sha256 {tok['sha256']}",
        "Router": "none" if router is None else f"{router['weights']}, sha256 {router['sha256']}",
        "PSNR, SSIM": "measured on the models' arrays, before a video is written; PSNR of the whole clip's error",
        "LPIPS": metrics["lpips_backbone"] or f"none: {metrics['lpips_reason']}",
        "Motion": "mean absolute difference of neighbouring frames, grey levels 0 to 255",
        "Machine": f"{metrics['device']}, float32 {metrics['float32']}; "
        + ", ".join(f"{k} {v}" for k, v in metrics["versions"].items()),
    }
