"""How the next token of a request is drawn that does not want the likeliest one."""

from __future__ import annotations

import torch


class Sampling:
    """Softmax of the logits over `temperature` > 0, of the likeliest tokens alone whose probabilities come to `top_p`
    in (0, 1] together; `seed` fixes every draw, None draws anew each time."""

    def __init__(self, temperature: float, top_p: float = 1.0, seed: int | None = None):
        self.temperature, self.top_p = temperature, top_p
        self._chance = torch.Generator()
        if seed is None:
            self._chance.seed()
        else:
            self._chance.manual_seed(seed)

    def draw(self, logits: torch.Tensor) -> int:
        """The next token, of logits [V] on any device."""
        weights = (logits.float().cpu() / self.temperature).softmax(dim=-1)
        if self.top_p < 1:
            ordered, places = weights.sort(descending=True, stable=True)
            before = ordered.cumsum(dim=-1) - ordered
            weights = torch.zeros_like(weights).scatter(0, places, ordered * (before < self.top_p))
        return int(torch.multinomial(weights, 1, generator=self._chance))
