"""One method with its tenants on runtime `continuous`, for a batch whose requests are all there from the start."""

from __future__ import annotations

from typing import Any

import torch

from perfbench.errors import AdapterError
from perfbench.methods.bank import Bank
from perfbench.runtimes.backbone import Backbone
from perfbench.runtimes.continuous.residency import NOT_INVOKED
from perfbench.runtimes.continuous.rows import Rows
from perfbench.runtimes.generation import Batch, Generation, StepClock, end


class ContinuousArm:
    """The adapters of a bank, or none, over rows that stay for the last size of batch."""

    def __init__(self, backbone: Backbone, bank: Bank | None, kernels: str):
        self.model: Any = backbone.model
        self.bank = bank
        self.rows: Rows | None = None
        self._backbone, self._kernels = backbone, kernels

    def generate(
        self,
        batch: Batch,
        *,
        clock: StepClock | None = None,
        forced: torch.Tensor | None = None,
        with_logits: bool = False,
    ) -> Generation:
        """As `generation.generate`, for one beam. Prompts are read one after the other, each without its padding."""
        if batch.beams != 1:
            raise ValueError(f"expected 1 beam, got {batch.beams}")
        if self.bank is not None and any(map(self.bank.invocation_of, batch.slots)):
            raise AdapterError(NOT_INVOKED)
        with torch.inference_mode():
            rows = self._rows_for(batch)
            read = []
            for ids, mask, slot in zip(batch.input_ids, batch.attention_mask.bool(), batch.slots, strict=True):
                read.append(rows.read(rows.enter(slot), ids[mask]))
            logits = torch.stack(read)
            tokens: list[torch.Tensor] = []
            kept: list[torch.Tensor] = []
            for step in range(batch.new_tokens):
                if step:
                    logits = rows.step(tokens[-1])
                tokens.append(logits.argmax(dim=-1) if forced is None else forced[:, step])
                if with_logits:
                    kept.append(logits.float())
                if clock is not None:
                    clock.mark()
            chosen = torch.stack(tokens, dim=1)
        return Generation(end(chosen, batch.eos) if batch.eos else chosen, torch.stack(kept, 1) if kept else None)

    def _rows_for(self, batch: Batch) -> Rows:
        requests, prompt_tokens = batch.input_ids.shape
        capacity = prompt_tokens + batch.new_tokens - 1
        if self.rows is None or (self.rows.most, self.rows.capacity) != (requests, capacity):
            self.rows = None  # gives the old ones back before new ones are taken
            self.rows = Rows(self._backbone, self.bank, self._kernels, requests, capacity)
            self.rows.step_of(requests)
        self.rows.lengths.clear()
        return self.rows

    def tensors(self) -> list[torch.Tensor]:
        """The bank, the rows, and the table of rotations."""
        held = self.bank.tensors() if self.bank else []
        if self.rows is not None:
            held += [*self.rows.tensors(), self.rows.weights.cos, self.rows.weights.sin]
        return held

    def close(self) -> None:
        """Drops the bank, and the cache where no other arm holds it."""
        self.model = self.bank = self.rows = None
