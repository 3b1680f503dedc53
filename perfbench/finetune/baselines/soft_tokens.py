"""Soft tokens that enter a frozen model before one of its layers: what P-tuning, IDPG and LPT share.

From that layer on every token of the row sees them, as if they stood in front of it: their rotary positions are those
before the row's first token, also where padding stands on the left, and the tokens' own positions stay as they are.
The tokens themselves see only each other, so they pass each layer by themselves; their keys and values are put before
the layer's own, and are kept with the cache while tokens are generated. Logits, labels and masks keep their lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from perfbench.finetune.baselines.bottleneck import Activation, device_of
from perfbench.peft.para import last_prompt_token

# Of the initial values of all weights, as in IDPG's own code.
_DEVIATION = 0.02

Pair = tuple[torch.Tensor, torch.Tensor]  # keys and values [B, kv_heads, tokens, head_dim]


@dataclass(frozen=True)
class Prompt:
    """The prompts of the batch in flight. inside: bool [B, S], its tokens, without padding and answer; last: int64
    [B], where each ends; inner: the model without its head; inputs: what tells the tokens and the mask to it."""

    inside: torch.Tensor
    last: torch.Tensor
    inner: Any
    inputs: dict[str, Any]

    @classmethod
    def of(cls, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Prompt:
        """Of one call of `model`: with labels each ends before the first one that counts, else with the row."""
        given: dict[str, Any] = {
            name: kwargs.get(name) for name in ("input_ids", "attention_mask", "position_ids", "inputs_embeds")
        }
        given |= {"input_ids": args[0]} if args else {}
        tokens = given["inputs_embeds"] if given["input_ids"] is None else given["input_ids"]
        mask = given["attention_mask"]
        last = last_prompt_token(tokens, kwargs.get("labels"), mask)
        inside = torch.arange(tokens.shape[1], device=tokens.device) <= last[:, None]
        return cls(inside if mask is None else inside & mask.bool(), last, model.model, given)


class Generator(nn.Module):
    """x -> act(x down^T + b) up^T + b: [..., size] -> [..., out], computed in the type of the parameters."""

    def __init__(self, size: int, bottleneck: int, out: int, activation: Activation):
        super().__init__()
        self.down, self.up = nn.Linear(size, bottleneck), nn.Linear(bottleneck, out)
        self.activation = activation
        for layer in (self.down, self.up):
            nn.init.normal_(layer.weight, std=_DEVIATION)
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The bottleneck's own arithmetic."""
        made: torch.Tensor = self.up(self.activation(self.down(x.to(self.down.weight.dtype))))
        return made


class _Recorder:
    """Stands for the cache while soft tokens pass a layer, and has their keys and values afterwards."""

    pair: Pair

    def update(self, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Pair:
        self.pair = (key, value)
        return self.pair


@dataclass(frozen=True)
class _Behind:
    """Stands for the cache in a layer, which finds the soft tokens' keys and values before those of the cache."""

    soft: Pair
    cache: Any

    def update(self, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Pair:
        if self.cache is not None:
            key, value = self.cache.update(key, value, *args, **kwargs)
        return torch.cat((self.soft[0], key), dim=2), torch.cat((self.soft[1], value), dim=2)


class SoftTokens(nn.Module):
    """`count` soft tokens before layer `at`; lies in the model as its module `soft_tokens`."""

    def __init__(self, count: int, at: int = 0):
        super().__init__()
        self.count, self.at = count, at
        self._prompt: Prompt | None = None
        self._made: torch.Tensor | None = None  # [B, count, hidden] before the next layer
        self._away = False

    def make(self, prompt: Prompt, hidden: torch.Tensor) -> torch.Tensor:
        """The soft tokens [B, count, hidden size] of prompts whose tokens enter layer `at` as `hidden` [B, S, ...]."""
        raise NotImplementedError

    @contextmanager
    def away(self) -> Iterator[None]:
        """Within it the model is the backbone alone."""
        self._away = True
        try:
            yield
        finally:
            self._away = False

    def note(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model's forward: what its layers are not told of the prompts."""
        cache = kwargs.get("past_key_values")
        if cache is None or cache.get_seq_length() == 0:
            self._prompt = Prompt.of(model, args, kwargs)

    def forget(self, model: Any, args: Any, output: Any) -> None:
        """After it."""
        self._prompt = self._made = None

    def enter(self, index: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the forward of layer `index`. An empty cache, not S > 1, tells a prompt from a generated token."""
        if self._away:
            return None
        hidden, cache = args[0] if args else kwargs["hidden_states"], kwargs.get("past_key_values")
        if cache is None or cache.get_seq_length(index) == 0:
            pair = self._pass(index, layer, hidden, kwargs)
            if cache is not None:
                cache.__dict__.setdefault("soft_tokens", {})[index] = pair
        else:
            kept: dict[int, Pair] = getattr(cache, "soft_tokens", {})
            if index not in kept:
                raise RuntimeError("soft tokens: the cache was filled without them; process the prompt again with them")
            pair = kept[index]
        mask = _seen(kwargs.get("attention_mask"), hidden, self.count)
        return args, {**kwargs, "past_key_values": _Behind(pair, cache), "attention_mask": mask}

    def _pass(self, index: int, layer: Any, hidden: torch.Tensor, kwargs: dict[str, Any]) -> Pair:
        """Lets the soft tokens pass the layer; their keys and values there."""
        if self._prompt is None:
            raise RuntimeError(
                "soft tokens: call the whole model, which knows the mask and the labels, not a part of it"
            )
        if layer.training and getattr(layer, "gradient_checkpointing", False):
            raise RuntimeError("soft tokens: a layer can't be computed again by itself; train without checkpointing")
        if index == self.at:
            self._made = self.make(self._prompt, hidden).to(hidden.dtype)
        assert self._made is not None
        first = self._prompt.inside.int().argmax(dim=1, keepdim=True).to(hidden.device)
        places = kwargs["position_ids"].expand(len(hidden), -1).gather(1, first)
        places = places + torch.arange(-self.count, 0, device=hidden.device)
        recorder = _Recorder()
        self._made = layer.forward(  # not by its call, whose hooks are this one
            self._made,
            attention_mask=None,
            position_ids=places,
            position_embeddings=self._prompt.inner.rotary_emb(self._made, position_ids=places),
            past_key_values=recorder,
        )
        return recorder.pair


def _seen(mask: torch.Tensor | None, hidden: torch.Tensor, soft: int) -> torch.Tensor | None:
    """The mask [B, 1, Q, K] of a layer with `soft` keys in front, which every token sees."""
    if mask is None:  # all that is before a token
        queries = hidden.shape[1]
        if queries == 1:
            return None
        mask = torch.ones((1, 1, queries, queries), dtype=torch.bool, device=hidden.device).tril()
    # True in a mask of truths, 0 in one that is added to the scores.
    return torch.cat((mask.new_full((*mask.shape[:3], soft), mask.dtype == torch.bool), mask), dim=3)


def insert(model: Any, soft: SoftTokens) -> Any:
    """Puts the soft tokens into a frozen model. ValueError on an attention whose masks have another form."""
    if model.config._attn_implementation != "sdpa":
        raise ValueError(f"attn_implementation: expected sdpa, got {model.config._attn_implementation}")
    model.requires_grad_(False)
    model.soft_tokens = soft.to(device_of(model))
    model.register_forward_pre_hook(soft.note, with_kwargs=True)
    model.register_forward_hook(soft.forget, always_call=True)
    for index, layer in enumerate(model.model.layers):
        if index >= soft.at:
            layer.register_forward_pre_hook(partial(soft.enter, index), with_kwargs=True)
    return model
