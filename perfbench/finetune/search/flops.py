"""How much faster the shared evaluation can be than the naive one: both counted in FLOPs. Free of torch.

Counted are the products: linears, LoRA pairs that are switched on, attention (causal: half of the square), and the head
on the answers' positions. What is not (norms, activations, softmax) is shared in about the same proportion.
"""

from __future__ import annotations

from dataclasses import dataclass

from perfbench.methods.shape import MODULES, BackboneShape

# What has to be computed anew in a module's own layer once its gate is flipped; its own product is not among it.
AFTER = {
    "q": ("attention", "o", "gate", "up", "down"),
    "k": ("attention", "o", "gate", "up", "down"),
    "v": ("attention", "o", "gate", "up", "down"),
    "o": ("gate", "up", "down"),
    "gate": ("down",),
    "up": ("down",),
    "down": (),
}


@dataclass(frozen=True)
class Work:
    """FLOPs of both evaluations of all 2 x 7 x layers + 2 settings on one sequence. `bound`: how many times as fast
    the shared one can be."""

    naive: float
    shared: float

    @property
    def bound(self) -> float:
        """naive / shared."""
        return self.naive / self.shared


def work(shape: BackboneShape, rank: int, tokens: int, answer_tokens: float) -> Work:
    """Both evaluations of a sequence of `tokens`, of which the loss counts `answer_tokens`; without any, no head."""
    plain = {m: 2.0 * tokens * shape.features(m)[0] * shape.features(m)[1] for m in MODULES}
    plain["attention"] = 4.0 * shape.heads * shape.head_dim * tokens * (tokens + 1) / 2
    pair = {m: 2.0 * tokens * rank * sum(shape.features(m)) for m in MODULES}
    head = 2.0 * shape.hidden * shape.vocab * answer_tokens
    layers, flips = shape.layers, len(MODULES)
    layer_off = sum(plain.values())
    layer_on = layer_off + sum(pair.values())

    settings = 2 * (flips * layers + 1)
    naive_on = (flips * layers + 1) * layers * layer_on - layers * sum(pair.values())
    naive_off = (flips * layers + 1) * layers * layer_off + layers * sum(pair.values())
    # A base pass runs every layer once; each setting of layer l runs the rest of l, and the layers above it.
    above = flips * layers * (layers - 1) / 2
    rest_off = sum(plain[part] for module in MODULES for part in AFTER[module])
    rest_on = rest_off + sum(pair[part] for module in MODULES for part in AFTER[module] if part in pair)
    shared_on = (layers + above) * layer_on + layers * rest_on
    shared_off = (layers + above) * layer_off + layers * (rest_off + sum(pair.values()))
    return Work(naive_on + naive_off + settings * head, shared_on + shared_off + settings * head)
