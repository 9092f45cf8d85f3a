"""The sampler: S slots. A slot takes the next clip as soon as its last one ends, so a short clip costs less.

    refill     a free slot takes the next request; given frames go into the cache in one pass
    run        one step of the model for all slots, each at its own position
    settle     after a length token, the host reads it and knows how many codes follow

A length token fixes how many codes follow, so the host reads nothing between two of them: codes stay on the device, and
steps run up to the next length token of any slot. That is one synchronisation per block, none if the length is forced.
Shapes never change: idle slots are computed too, so a row's numbers do not depend on the other rows, and its noise is
keyed by (seed, key of the request, position). A clip does not depend on its slot, its neighbours or the number of
processes.

Letters: S slots, G streams of a slot (2 with guidance: with and without the class), V ids of the head, Q ids of one
sequence, R = S G rows of a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from autoregressive.attention import Live, check_memory
from autoregressive.cuda_graph import CudaGraphs, GraphedStep, weak_method
from autoregressive.draw_kernel import draw_fused
from autoregressive.logits import draw_ids, guide, gumbel, id_words, key_words
from autoregressive.model import GPT
from autoregressive.sequence import (
    ClipCodes,
    Grammar,
    LengthRule,
    SequenceLayout,
    block_positions,
    length_rule,
    longest_sequence,
)
from tokenizer.common.device import compile_layers, has_triton
from tokenizer.common.errors import UserError

_NO_CODES = torch.empty(0, dtype=torch.long)
_LONGEST_STEP = 128  # keys; the longest is rounded up to a multiple, so that few shapes occur


@dataclass(frozen=True)
class Request:
    """One clip to be sampled.

    `key` names it: its random numbers depend on the seed and the key alone. `condition_L`: codes of the given frames.
    """

    key: tuple[int | str, ...]
    label: int | None = None
    condition_L: Tensor = _NO_CODES
    rule: LengthRule = LengthRule()


@dataclass(frozen=True)
class Sample:
    """A sampled clip. `broken`: why a sequence sampled without grammar masking is invalid; None if it is valid.

    `id_Q`: the whole sequence, on the model's device; a broken one ends at the invalid id.
    """

    request: Request
    id_Q: Tensor
    lengths: tuple[int, ...]
    broken: str | None = None

    def codes(self, layout: SequenceLayout) -> ClipCodes:
        """The codes and lengths for the tokenizer, on the CPU. The sample must not be broken."""
        assert self.broken is None, self.broken
        body_L = self.id_Q[layout.condition_tokens + 1 :].cpu()  # without condition codes and the class id
        return ClipCodes(
            body_L[body_L < layout.codebook_size], self.lengths, self.request.label, self.request.condition_L
        )


@dataclass(frozen=True)
class SamplingConfig:
    """How ids are drawn. The defaults are the paper's: no guidance, temperature 1, nothing cut off.

    guidance: s of u + s (c - u), one number, or one for each temporal block. If all are 1, the stream
    without class is not run; else it is run in all blocks.
    check_grammar: draw only ids that the grammar allows; if off, invalid sequences are detected and marked.
    compile: compile the model's layers, which delays the first clip.
    """

    slots: int = 8
    seed: int = 0
    guidance: tuple[float, ...] = (1.0,)
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    check_grammar: bool = True
    compile: bool = False
    fused_draw: bool = True  # on a GPU with Triton: draw by one kernel (draw_kernel.py)
    fp8_cache: bool = False  # keys and values in 8 bits (attention.FP8), half the memory and traffic of bf16

    def __post_init__(self) -> None:
        if self.slots < 1 or self.top_k < 0:
            raise UserError(f"slots = {self.slots} must be at least 1, top_k = {self.top_k} at least 0 (0 keeps all)")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"temperature = {self.temperature}: must be above 0; top_k = 1 takes the likeliest id")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p}: must lie above 0 and not above 1 (1 keeps all)")
        if not self.guidance or not all(0 <= scale < math.inf for scale in self.guidance):
            raise UserError(f"guidance = {list(self.guidance)}: give numbers of at least 0 (1 is no guidance)")

    def facts(self) -> dict[str, Any]:
        """All settings as JSON has them; later ones only if not at their defaults, so that earlier results resume."""
        later = {f.name: f.default for f in fields(self) if f.name in ("fused_draw", "fp8_cache")}
        known = {key: value for key, value in asdict(self).items() if key not in later or value != later[key]}
        return known | {"guidance": list(self.guidance)}

    @property
    def streams(self) -> int:
        """Rows of a slot: one with the class, and with guidance one without it."""
        return 1 if all(scale == 1 for scale in self.guidance) else 2

    def scale_of(self, block: int) -> float:
        """Guidance in temporal block `block`, its length token included."""
        return self.guidance[0] if len(self.guidance) == 1 else self.guidance[block]


@dataclass
class SamplerCounts:
    """Counts of a run so far: for the progress bar, the bench and the tests."""

    clips: int = 0
    broken: int = 0
    steps: int = 0  # of the model
    row_steps: int = 0  # steps summed over the slots that were in use
    synchronisations: int = 0  # times that the host waited for numbers of the device
    tokens: int = 0  # ids sampled, length tokens included

    def utilisation(self, slots: int) -> float:
        """Fraction of the slots in use over the whole run, 0 to 1."""
        return self.row_steps / max(1, self.steps * slots)


@dataclass
class _Slot:
    """The host's view of a slot in use. `position`: of the id that goes into the next step."""

    request: Request
    grammar: Grammar
    position: int

    @property
    def steps_to_event(self) -> int:
        return 1 if self.grammar.wants_length else self.grammar.codes_left


class Sampler:
    """Samples clips of one model. `places`: ids of the longest sequence to be sampled (default: any).

    Raises UserError if guidance does not fit the model, the keys and values do not fit into memory, or the step
    cannot be compiled here though `config` asks for it.
    """

    def __init__(self, model: GPT, config: SamplingConfig, places: int | None = None) -> None:
        layout, slots, streams = model.layout, config.slots, config.streams
        if streams == 2 and layout.num_classes == 0:
            raise UserError("guidance needs a model with classes, and this one has none: sample with --cfg-scale 1")
        if len(config.guidance) not in (1, layout.num_blocks):
            raise UserError(f"{len(config.guidance)} guidance scales: give one, or one for each of {layout.num_blocks}")
        assert not model.training, "call model.eval() first: dropout would change the samples"
        self.model, self.layout, self.config, self.counts = model, layout, config, SamplerCounts()
        self.places = places or layout.max_length
        self.cache_bytes = slots * model.cache_bytes_per_slot(streams, self.places, config.fp8_cache)
        check_memory(slots, self.cache_bytes // slots, model.device)
        self._cache = model.new_cache(slots, streams, self.places, config.fp8_cache)

        device = model.device
        self._slots: list[_Slot | None] = [None] * slots
        self._sequence_SQ = torch.zeros(slots, self.places + 1, dtype=torch.long, device=device)
        self._input_SG = torch.zeros(slots, streams, dtype=torch.long, device=device)  # ids of the next step
        self._position_S = torch.zeros(slots, dtype=torch.long, device=device)
        self._block_positions = block_positions(layout, device)
        self._inner_S = torch.zeros(slots, dtype=torch.long, device=device)  # in its block, of the id to be drawn
        self._step_state = (self._input_SG, self._position_S, self._inner_S)  # all that a step changes and starts from
        self._active_S = torch.zeros(slots, dtype=torch.long, device=device)  # 1 for slots in use
        self._key_S2 = torch.zeros(slots, 2, dtype=torch.long, device=device)
        self._scale_S = torch.ones(slots, device=device)
        self._scale_of = [1.0] * slots  # the host's copy
        self._bias_SV = torch.zeros(slots, layout.num_ids, device=device)
        self._word_V = id_words(layout.num_ids, device)
        self._bias_rows: dict[tuple[bool, ...], Tensor] = {}
        self._bias_of: list[tuple[bool, ...] | None] = [None] * slots
        if config.compile:
            compile_layers(model, device, "--compile", "sample without it")
        self._kernel_sees = device.type == "cuda" and has_triton()
        self._fuses_draw = self._kernel_sees and config.fused_draw
        self._run_step: Callable[[Live], None] = weak_method(self._advance)
        if device.type == "cuda":
            self._run_step = GraphedStep(self._run_step, self._step_state, CudaGraphs(device))

    def run(self, requests: Iterable[Request]) -> Iterator[Sample]:
        """Samples in the order in which they end. Stopping early frees all slots."""
        waiting = iter(requests)
        try:
            while True:
                for s in range(self.config.slots):
                    if self._slots[s] is None and (request := next(waiting, None)) is not None:
                        self._take(s, request)
                live_slots = [slot for slot in self._slots if slot]
                if not live_slots:
                    return
                steps = min(slot.steps_to_event for slot in live_slots)  # up to the next length token of any slot
                self._prepare()
                for _ in range(steps):
                    self._step()
                yield from self._settle(steps)
        finally:
            for s in range(self.config.slots):
                self._free(s)

    # --- refill ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _take(self, s: int, request: Request) -> None:
        """Put a request into slot `s`; its condition goes into the cache in one pass."""
        layout, given = self.layout, len(request.condition_L)
        if given != layout.condition_tokens:
            raise UserError(f"{given} condition codes, but this model's sequences begin with {layout.condition_tokens}")
        if longest_sequence(layout, request.rule) > self.places:
            raise UserError(f"a sequence of {longest_sequence(layout, request.rule)} ids in {self.places} places")
        condition_id = layout.condition_id(request.label)
        if given:
            condition_L = request.condition_L.to(self.model.device)
            with self._own_precision():
                self.model.prefill(condition_L, s, self._cache)
            self._sequence_SQ[s, :given] = condition_L
        self._sequence_SQ[s, given] = condition_id
        self._input_SG[s] = layout.open_id  # the stream without class
        self._input_SG[s, 0] = condition_id
        self._position_S[s] = given
        self._inner_S[s] = 0
        self._active_S[s] = 1
        self._key_S2[s] = torch.tensor(key_words(self.config.seed, *request.key))
        self._slots[s] = _Slot(request, Grammar(layout, request.rule), given)

    def _free(self, s: int) -> None:
        """Slot `s` idles at place 0, where a later clip overwrites what it leaves."""
        self._slots[s] = None
        self._position_S[s] = 0
        self._active_S[s] = 0

    # --- run ------------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Set guidance and mask of every slot for the steps up to the next event of any."""
        for s, slot in enumerate(self._slots):
            if slot is None:
                continue
            grammar = slot.grammar
            scale = self.config.scale_of(len(grammar.lengths) - (0 if grammar.wants_length else 1))
            if scale != self._scale_of[s]:
                self._scale_S[s] = self._scale_of[s] = scale
            if self.config.check_grammar:
                self._mask(s, grammar)

    def _mask(self, s: int, grammar: Grammar) -> None:
        """Allow slot `s` the ids that its grammar does. Rows of the mask are cached: there are few."""
        allowed = (grammar.codes_left > 0, *grammar.allowed_levels())
        if allowed == self._bias_of[s]:
            return
        if allowed not in self._bias_rows:
            row_V = torch.zeros(self.layout.num_ids).masked_fill(~grammar.allowed_ids(), -torch.inf)
            self._bias_rows[allowed] = row_V.to(self._bias_SV.device)
        self._bias_SV[s] = self._bias_rows[allowed]
        self._bias_of[s] = allowed

    @torch.inference_mode()
    def _step(self) -> None:
        """Every slot reads its id and draws the next. Nothing here waits for the device."""
        with self._own_precision():
            self._run_step(self._live())
        for slot in self._slots:
            if slot:
                slot.position += 1
        num_active = sum(slot is not None for slot in self._slots)
        self.counts.steps += 1
        self.counts.row_steps += num_active
        self.counts.tokens += num_active

    def _own_precision(self) -> torch.autocast:
        """Compute in the precision of the weights and the cache, also inside a training's autocast."""
        return torch.autocast(self.model.device.type, enabled=False)

    def _live(self) -> Live:
        """Which cached keys a step reads; see `Live` in attention.py."""
        if self._kernel_sees:
            return None  # it reads the positions on the device
        live = [slot.position + 1 if slot else 0 for slot in self._slots]
        return live if self.model.device.type == "cpu" else self._rounded(max(live))

    def _rounded(self, longest: int) -> int:
        return min(self.places, -(-longest // _LONGEST_STEP) * _LONGEST_STEP)

    def _advance(self, live: Live) -> None:
        """The device's part of a step: fixed shapes, all state in place."""
        c, position_S = self.config, self._position_S
        logits_RV = self.model.step(self._input_SG.flatten(), position_S, live, self._cache, self._inner_S)
        logits_SGV, cuts = logits_RV.unflatten(0, self._input_SG.shape), (c.temperature, c.top_k, c.top_p)
        if self._fuses_draw:
            next_S = draw_fused(logits_SGV, self._scale_S, self._bias_SV, self._key_S2, position_S, *cuts)
        else:
            # arg max of logits + Gumbel noise is a draw from their softmax; the noise depends on (key, position) alone
            noise_SV = gumbel(self._key_S2, position_S, self._word_V)
            next_S = draw_ids(guide(logits_SGV, self._scale_S), self._bias_SV, noise_SV, *cuts)  # [S]
        self._input_SG.copy_(next_S[:, None].expand_as(self._input_SG))  # both streams of a slot read the same id
        self._inner_S.copy_(self._block_positions.after(self._inner_S, next_S))
        self._sequence_SQ.scatter_(1, position_S[:, None] + 1, next_S[:, None])
        position_S += self._active_S  # idle slots stay at place 0

    # --- settle ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _settle(self, steps: int) -> list[Sample]:
        """Advance the grammars by the last `steps`; finished clips leave their slots."""
        due = [s for s, slot in enumerate(self._slots) if slot and slot.grammar.wants_length]
        drawn = self._length_tokens(due)
        samples = []
        for s, slot in enumerate(self._slots):
            if slot is None:
                continue
            broken = None
            if s not in drawn:
                slot.grammar.skip_codes(steps)
            elif slot.grammar.allows(drawn[s]):
                slot.grammar.advance(drawn[s])
            else:
                broken = f"place {slot.position} holds {drawn[s]}, but the grammar wants {slot.grammar.wanted}"
            if broken or slot.grammar.finished:
                samples.append(self._sample(s, slot, broken))
                self._free(s)
        return samples

    def _length_tokens(self, due: list[int]) -> dict[int, int]:
        """Slot -> the length token that it just drew, read in one transfer; not read if it was forced."""
        known = {}
        for s in due:
            slot = self._slots[s]
            assert slot is not None
            levels = [level for level, ok in zip(self.layout.levels, slot.grammar.allowed_levels(), strict=True) if ok]
            if self.config.check_grammar and len(levels) == 1:
                known[s] = self.layout.length_id(levels[0])
        if len(known) < len(due):
            self.counts.synchronisations += 1
            token_S = self._input_SG[:, 0].tolist()  # waits for the device
            known = {s: token_S[s] for s in due}
        return known

    def _sample(self, s: int, slot: _Slot, broken: str | None) -> Sample:
        id_Q = self._sequence_SQ[s, : slot.position + 1].clone()
        if broken is None and not self.config.check_grammar:
            self.counts.synchronisations += 1
            try:
                self.layout.decode(id_Q.cpu())
            except UserError as error:
                broken = str(error)
        self.counts.clips += 1
        self.counts.broken += broken is not None
        return Sample(slot.request, id_Q, slot.grammar.lengths, broken)


@torch.inference_mode()
def cost_of_fp8_cache(model: GPT) -> str:
    """What keys and values in 8 bits change in the logits of a clip that was sampled with exact ones, in words."""
    layout, device = model.layout, model.device
    given = layout.condition_tokens
    condition_L = torch.randint(layout.codebook_size, (given,), generator=torch.Generator().manual_seed(0))
    request = Request(("cost of 8 bits",), 0 if layout.num_classes else None, condition_L, length_rule(layout))
    (sample,) = Sampler(model, SamplingConfig(slots=1)).run([request])
    id_Q, position_Q = sample.id_Q, torch.arange(len(sample.id_Q), device=device)
    inner_Q = block_positions(layout, device).of(id_Q, position_Q)
    on_device = device.type == "cuda" and has_triton()
    kinds = []
    for fp8 in (False, True):
        cache = model.new_cache(1, 1, len(id_Q), fp8)
        if given:
            model.prefill(id_Q[:given], 0, cache)
        logits = []
        for q in range(given, len(id_Q) - 1):
            id_R, position_S, inner_S = (x[q : q + 1] for x in (id_Q, position_Q, inner_Q))
            logits.append(model.step(id_R, position_S, None if on_device else [q + 1], cache, inner_S))
        kinds.append(torch.cat(logits).float())
    exact_QV, ours_QV = (logits_QV.log_softmax(dim=1) for logits_QV in kinds)
    nats = (exact_QV.exp() * (exact_QV - ours_QV)).sum(dim=1).mean()
    same = (exact_QV.argmax(dim=1) == ours_QV.argmax(dim=1)).float().mean()
    return f"8-bit keys and values, {len(ours_QV)} ids of a clip: likeliest id equal in {same:.2%}, KL {nats:.2g} nats"
