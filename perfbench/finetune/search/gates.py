"""A backbone with a LoRA on every linear, each behind a gate (FanLoRA, equation 2): y = x W + g x A B, g in {0, 1}.

One layer can also be run once for all seven settings that differ from the usual one in a single gate of it. Rows then
lie in blocks of B, block 0 as usual; a module adds a block only where its own gate has been flipped:

    q, k, v   1 block in, 4 out: as usual, q flipped, k flipped, v flipped      (attention sees 4 blocks)
    o         4 in, 5 out                                                       (the rest of the layer sees 5)
    gate, up  5 in, 7 out                                                       (the activation sees 7)
    down      7 in, 8 out: as usual, then one for each of the seven

The product with the frozen weight is the same whichever way a module's own gate stands, so nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from perfbench.errors import FinetuneError
from perfbench.methods import lora
from perfbench.methods.lora import LoraOptions
from perfbench.methods.plan import AdapterPlan
from perfbench.methods.shape import MODULE_PATHS, MODULES, BackboneShape
from perfbench.runtimes.backbone import Backbone

FLIPPED = -1
# Module -> (blocks of its input, how many of the first of them are multiplied, what each block of its output is: the
# product of that input block, or the one with the gate flipped).
BLOCKS: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "q": (4, 1, (0, FLIPPED, 0, 0)),
    "k": (4, 1, (0, 0, FLIPPED, 0)),
    "v": (4, 1, (0, 0, 0, FLIPPED)),
    "o": (4, 4, (0, 1, 2, 3, FLIPPED)),
    "gate": (5, 5, (0, 1, 2, 3, 4, FLIPPED, 0)),
    "up": (5, 5, (0, 1, 2, 3, 4, 0, FLIPPED)),
    "down": (7, 7, (0, 1, 2, 3, 4, 5, 6, FLIPPED)),
}


class GatedLinear(torch.nn.Module):
    """A frozen linear and its low-rank pair. `gate`: False and True are 0 and 1; a tensor [rows, 1, 1] is a gate for
    each row. `ablating`: rows come in blocks and leave in the blocks that this module's line of BLOCKS says."""

    def __init__(self, module: str, linear: torch.nn.Module, a: torch.Tensor, b: torch.Tensor):
        """`a` [R, D_in] and `b` [R, D_out], with alpha / rank folded into b."""
        super().__init__()
        self.module = module
        self.linear = linear
        self.a = a
        self.b = b
        self.gate: bool | torch.Tensor = True
        self.ablating = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, S, D_in] -> [rows out, S, D_out]."""
        if self.ablating:
            return self._every_setting(x)
        y: torch.Tensor = self.linear(x)
        if isinstance(self.gate, torch.Tensor):
            return y + self.gate * F.linear(F.linear(x, self.a), self.b.t())
        return self._with_pair(y, x) if self.gate else y

    def _with_pair(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """y + x A B, in place: a pass over y less."""
        h = F.linear(x, self.a)
        y.view(-1, y.shape[-1]).addmm_(h.view(-1, h.shape[-1]), self.b)
        return y

    def _every_setting(self, x: torch.Tensor) -> torch.Tensor:
        blocks, multiplied, layout = BLOCKS[self.module]
        rows = x.shape[0] // blocks
        x = x[: multiplied * rows]
        usual: torch.Tensor = self.linear(x)
        flipped = usual[:rows].clone()
        if self.gate:
            usual = self._with_pair(usual, x)
        else:
            flipped = self._with_pair(flipped, x[:rows])
        return torch.cat([flipped if at == FLIPPED else usual[at * rows : (at + 1) * rows] for at in layout])


class GatedModel:
    """A model over the backbone's weights with a gate at every linear; the layers run one by one, or as a whole.

    `stem` gives what enters the first layer, `layers` are Hugging Face's own decoder layers with gated linears.
    """

    def __init__(self, backbone: Backbone, plan: AdapterPlan):
        self.shape = backbone.shape
        self.device = backbone.device
        self.dtype = backbone.dtype
        self.whole = backbone.skeleton()
        self.layers: Sequence[Any] = self.whole.model.layers
        self.linears = [self._gate(index, plan) for index in range(self.shape.layers)]
        # Hugging Face's model with empty layers: embeds, makes the mask and the rotary table as it would.
        self._stem = backbone.skeleton().model
        self._stem.layers = torch.nn.ModuleList(_Recorder() for _ in self.layers)

    def _gate(self, layer: int, plan: AdapterPlan) -> dict[str, GatedLinear]:
        gated = {}
        for module, path in MODULE_PATHS.items():
            pair = plan[layer].low_rank[module]
            parent, name = path.split(".")
            owner = getattr(self.layers[layer], parent)
            a, b = (tensor.to(self.device, self.dtype).contiguous() for tensor in (pair.a, pair.b))
            gated[module] = GatedLinear(module, getattr(owner, name), a, b)
            setattr(owner, name, gated[module])
        return gated

    def set_all(self, gate: bool) -> None:
        """Every gate of every layer on, or off."""
        for layer in range(self.shape.layers):
            self.set_layer(layer, dict.fromkeys(MODULES, gate))

    def set_layer(self, layer: int, gates: dict[str, bool] | dict[str, torch.Tensor]) -> None:
        """The gates of one layer, by module."""
        for module, gate in gates.items():
            self.linears[layer][module].gate = gate

    def stem(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        """What enters the first layer [rows, S, hidden], and the other arguments of each layer; these fit any number
        of rows, since nothing but the order of tokens is masked (padding stands on the right, after all that counts).
        """
        rows = ids.shape[0]
        self._stem(input_ids=ids, use_cache=False)
        recorders = list(self._stem.layers)
        every = []
        for recorder in recorders:
            arguments = dict(recorder.arguments)
            mask = arguments.get("attention_mask")
            if isinstance(mask, torch.Tensor) and mask.shape[0] == rows:
                arguments["attention_mask"] = mask[:1]
            every.append(arguments)
        return recorders[0].hidden, every

    def run(self, layer: int, hidden: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        """One layer with its gates as they stand, hidden [rows, S, hidden]."""
        out: torch.Tensor = self.layers[layer](hidden, **arguments)
        return out

    def run_ablated(self, layer: int, hidden: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        """One layer as its gates stand, and with each of them flipped: [rows, S, hidden] -> [8 x rows, S, hidden]."""
        block = self.layers[layer]
        with self._ablating(layer):
            four = block.input_layernorm(hidden).repeat(4, 1, 1)
            out, _ = block.self_attn(hidden_states=four, **arguments)
            five = (out.unflatten(0, (5, -1)) + hidden).flatten(0, 1)
            eight = block.mlp(block.post_attention_layernorm(five)).unflatten(0, (8, -1))
            residual = five.unflatten(0, (5, -1))
            eight[:5] += residual
            eight[5:] += residual[0]
        return eight.flatten(0, 1)

    @contextmanager
    def _ablating(self, layer: int) -> Iterator[None]:
        linears = self.linears[layer].values()
        for linear in linears:
            linear.ablating = True
        try:
            yield
        finally:
            for linear in linears:
                linear.ablating = False

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """The model's last norm."""
        out: torch.Tensor = self.whole.model.norm(hidden)
        return out

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """[positions, hidden] after the norm -> logits [positions, vocabulary]."""
        out: torch.Tensor = self.whole.lm_head(hidden)
        return out


class _Recorder(torch.nn.Module):
    """Stands for a decoder layer: keeps what it is called with and hands the hidden state on."""

    hidden: torch.Tensor

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self.hidden, self.arguments = hidden_states, arguments
        return hidden_states


def load(backbone: Backbone, folder: Path) -> tuple[GatedModel, int]:
    """The gated model of a PEFT LoRA checkpoint folder, and the adapter's rank. Raises as `read` does."""
    plan, rank = read(folder, backbone.shape)
    return GatedModel(backbone, plan), rank


def read(folder: Path, shape: BackboneShape) -> tuple[AdapterPlan, int]:
    """The plan of a PEFT LoRA checkpoint folder, and its rank.

    AdapterError for a folder that can't be read or was made for another backbone; FinetuneError where a module of some
    layer has no LoRA, or the ranks differ.
    """
    plan = lora.load(folder, shape, LoraOptions())
    for index, layer in enumerate(plan):
        missing = [module for module in MODULES if module not in layer.low_rank]
        if missing:
            raise FinetuneError(
                f"{folder}: layer {index}: expected LoRA on {', '.join(MODULES)}, got none on {', '.join(missing)}; "
                "the search compares all of them: train LoRA on all seven linears"
            )
    ranks = sorted({pair.a.shape[0] for layer in plan for pair in layer.low_rank.values()})
    if len(ranks) != 1:
        raise FinetuneError(f"{folder}: expected one rank over all modules, got {ranks}; train with one")
    return plan, ranks[0]
