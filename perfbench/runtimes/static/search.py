"""Greedy and beam search, without waiting for the device between tokens."""

from __future__ import annotations

import torch

from perfbench.runtimes.generation import Generation, StepClock
from perfbench.runtimes.static.decoder import Decoder

# As a score: worse than any sum of log-probabilities, and finite.
IMPOSSIBLE = -1e9
NOT_FORCED = -1e4


def greedy(
    decoder: Decoder, clock: StepClock | None, forced: torch.Tensor | None, with_logits: bool
) -> Generation:
    """The best token of each step, or `forced` int64 [Q, N] instead."""
    tokens: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []
    for step in range(decoder.batch.new_tokens):
        logits = decoder.step(tokens[-1]) if step else decoder.prefill()
        tokens.append(logits.argmax(dim=-1) if forced is None else forced[:, step])
        if with_logits:
            kept.append(logits.float())
        if clock is not None:
            clock.mark()
    return Generation(torch.stack(tokens, dim=1), torch.stack(kept, dim=1) if with_logits else None)


def beam(
    decoder: Decoder, clock: StepClock | None, forced: torch.Tensor | None, with_logits: bool
) -> Generation:
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
            kept.append(logits[:, 0])
        chances = logits.log_softmax(dim=-1)
        if forced is not None:
            chances = torch.full_like(chances, NOT_FORCED)
            chances.scatter_(2, forced[:, None, step : step + 1].expand(-1, beams, -1), 0.0)
        vocabulary = chances.shape[-1]
        scores, best = (chances + scores.unsqueeze(-1)).flatten(1).topk(beams)
        source = best // vocabulary  # [Q, beams]
        tokens[:, :, :step] = tokens[:, :, :step].gather(1, source.unsqueeze(-1).expand(-1, -1, step))
        tokens[:, :, step] = best % vocabulary
        decoder.follow((source + first_rows).flatten())
        if clock is not None:
            clock.mark()
    return Generation(tokens[:, 0], torch.stack(kept, dim=1) if with_logits else None)
