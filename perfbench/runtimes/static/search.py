"""Greedy and beam search, without waiting for the device between tokens."""

from __future__ import annotations

import torch

from perfbench.runtimes.generation import Generation, StepClock, end
from perfbench.runtimes.static.decoder import Decoder

# As a score: worse than any sum of log-probabilities, and finite.
IMPOSSIBLE = -1e9
NOT_FORCED = -1e4


def greedy(
    decoder: Decoder,
    logits: torch.Tensor,
    clock: StepClock | None,
    forced: torch.Tensor | None,
    with_logits: bool,
) -> Generation:
    """From the `logits` [Q, V] of a prefill on: the best token of each step, or `forced` int64 [Q, N] instead.

    A request that has ended goes on to N unseen: to stop early the host would have to wait for the device.
    """
    tokens: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []
    for step in range(decoder.batch.new_tokens):
        if step:
            logits = decoder.step(tokens[-1])
        tokens.append(logits.argmax(dim=-1) if forced is None else forced[:, step])
        if with_logits:
            kept.append(logits.to(torch.float32, copy=True))  # the next step may write over them
        if clock is not None:
            clock.mark()
    chosen = torch.stack(tokens, dim=1)
    eos = decoder.batch.eos
    return Generation(end(chosen, eos) if eos else chosen, torch.stack(kept, dim=1) if with_logits else None)


def beam(decoder: Decoder, clock: StepClock | None, forced: torch.Tensor | None, with_logits: bool) -> Generation:
    """The continuation with the largest sum of log-probabilities among those that `beams` rows a request keep alive.

    forced: int64 [Q, N], which the first beam of each request takes instead; logits are the first beam's.
    """
    batch = decoder.batch
    requests, beams, device = batch.input_ids.shape[0], batch.beams, batch.input_ids.device
    first_rows = torch.arange(requests, device=device).unsqueeze(1) * beams
    # All beams are equal at first: only one may be continued, or they stay equal.
    scores = torch.full((requests, beams), IMPOSSIBLE, device=device)
    scores[:, 0] = 0.0
    tokens = torch.empty(requests, beams, batch.new_tokens, dtype=torch.int64, device=device)
    kept = []
    for step in range(batch.new_tokens):
        if step:
            logits = decoder.step(tokens[:, :, step - 1].flatten()).unflatten(0, (requests, beams)).float()
        else:
            logits = decoder.prefill().float().unsqueeze(1).expand(-1, beams, -1)
        if with_logits:
            kept.append(logits[:, 0].clone())
        chances = logits.log_softmax(dim=-1)
        if forced is not None:
            chances = torch.full_like(chances, NOT_FORCED)
            chances.scatter_(2, forced[:, None, step : step + 1].expand(-1, beams, -1), 0.0)
        vocabulary = chances.shape[-1]
        scores, best = (chances + scores.unsqueeze(-1)).flatten(1).topk(beams)
        source = best // vocabulary  # [Q, beams]
        tokens[:, :, :step] = _follow(tokens[:, :, :step], source)
        tokens[:, :, step] = best % vocabulary
        decoder.follow((source + first_rows).flatten())
        if clock is not None:
            clock.mark()
    return Generation(tokens[:, 0], torch.stack(kept, dim=1) if with_logits else None)


def beam_to_the_end(decoder: Decoder, clock: StepClock | None) -> Generation:
    """Beam search in which batch.eos ends a beam: of the ended ones, and of those that reach N tokens, the one with
    the largest mean log-probability. Equal to `generate()` with length_penalty 1 and early_stopping False.
    """
    batch = decoder.batch
    requests, beams, steps, device = batch.input_ids.shape[0], batch.beams, batch.new_tokens, batch.input_ids.device
    first_rows = torch.arange(requests, device=device).unsqueeze(1) * beams
    eos = torch.tensor(batch.eos, device=device)
    # Even if each beam's best token ends it, enough candidates are left to go on with.
    candidates = (1 + len(batch.eos)) * beams
    among_best = torch.arange(candidates, device=device) < beams
    scores = torch.full((requests, beams), IMPOSSIBLE, device=device)
    scores[:, 0] = 0.0
    tokens = torch.zeros(requests, beams, steps, dtype=torch.int64, device=device)
    ended = tokens.clone()
    ended_scores = torch.full((requests, beams), IMPOSSIBLE, device=device)
    has_ended = torch.zeros(requests, beams, dtype=torch.bool, device=device)
    may_improve = torch.ones(requests, 1, dtype=torch.bool, device=device)
    for step in range(steps):
        logits = decoder.step(tokens[:, :, step - 1].flatten()) if step else decoder.prefill()
        chances = logits.float().log_softmax(dim=-1).view(requests, -1, logits.shape[-1])
        found, best = (chances + scores.unsqueeze(-1)).flatten(1).topk(candidates)
        source, token = best // logits.shape[-1], best % logits.shape[-1]
        paths = _follow(tokens, source)
        paths[:, :, step] = token
        ends = torch.isin(token, eos) if step < steps - 1 else torch.ones_like(token, dtype=torch.bool)
        scores, going_on = (found + ends * IMPOSSIBLE).topk(beams)
        tokens, source = _follow(paths, going_on), source.gather(1, going_on)
        ends = ends & among_best & may_improve
        ended_scores, kept = torch.cat([ended_scores, found / (step + 1) + ~ends * IMPOSSIBLE], dim=1).topk(beams)
        ended = _follow(torch.cat([ended, paths], dim=1), kept)
        has_ended = torch.cat([has_ended, ends], dim=1).gather(1, kept)
        worst = ended_scores.min(dim=1, keepdim=True).values
        all_ended = has_ended.all(dim=1, keepdim=True)
        may_improve &= ~all_ended | (scores[:, :1] / (step + 1) > worst)
        decoder.follow((source + first_rows).flatten())
        if clock is not None:
            clock.mark()
    return Generation(end(ended[:, 0], batch.eos), None)


def _follow(paths: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
    """paths [Q, from, N] in the order of sources [Q, to]."""
    return paths.gather(1, sources.unsqueeze(-1).expand(-1, -1, paths.shape[2]))
