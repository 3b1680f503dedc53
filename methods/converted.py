"""Another method's adapter as LoRA of a chosen rank: the nearest low-rank pair to what it does to each weight.

The values come from the other method's adapter and the backbone's weights (`measure.on_device.conversion`); this file
says what they are once they are LoRA's. A backbone's bias stays its own, also where the other method scales it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perfbench.errors import nearest
from perfbench.methods import lora, parameters
from perfbench.methods.lora import LoraOptions
from perfbench.methods.options import RANK, MethodOptions
from perfbench.methods.plan import AdapterPlan
from perfbench.methods.registry import METHODS
from perfbench.methods.shape import MODULES, BackboneShape


@dataclass(frozen=True)
class ConvertedOptions(MethodOptions):
    """`of`: the method whose adapters are converted, with its default options; `rank`: of the pairs they become.
    `adapters` are those of that method."""

    of: str = field(
        default="road", metadata={"description": "the method whose adapters are converted, with its default options"}
    )
    rank: int = field(default=16, metadata=RANK)

    def __post_init__(self) -> None:
        """ValueError on a method that does not change weights."""
        served = {name: known for name, known in METHODS.items() if known.served_by == "plan" and known.module}
        fitting = [name for name, known in served.items() if known.in_weights]
        if self.of not in fitting:
            why = ", which does not change all tokens alike: no weights stand for it" if self.of in served else ""
            raise ValueError(
                f"of: expected a method that changes weights, got {self.of!r}{why}; {nearest(self.of, fitting)}"
            )

    @property
    def source(self) -> tuple[str, Any]:
        """The method that is converted, and its options."""
        return self.of, METHODS[self.of].options(adapters=self.adapters)


Options = ConvertedOptions


def expect_rank(rank: int, module: str, shape: BackboneShape) -> None:
    """ValueError where `module` has fewer inputs or outputs than a pair of this rank."""
    if rank > (most := min(shape.features(module))):
        raise ValueError(f"rank {rank}: expected at most {most}, the smaller side of {module}'s weight")


def shapes(shape: BackboneShape, options: ConvertedOptions) -> dict[str, tuple[int, ...]]:
    """A pair on every module that the other method changes: name -> size. ValueError on too large a rank."""
    changed = [layer.modules for layer in parameters.sized_plan(options.of, shape, options.source[1])]
    setting = tuple(tuple(module for module in MODULES if module in own) for own in changed)
    for module in (module for layer in setting for module in layer):
        expect_rank(options.rank, module, shape)
    return lora.shapes_of(setting, options.rank, shape)


def plan(values: parameters.Parameters, shape: BackboneShape, options: ConvertedOptions) -> AdapterPlan:
    """As LoRA's."""
    return lora.plan(values, shape, LoraOptions())


def save(
    values: parameters.Parameters, shape: BackboneShape, options: ConvertedOptions, folder: Path, backbone: str
) -> None:
    """Writes a PEFT LoRA checkpoint folder."""
    lora.save(values, shape, LoraOptions(), folder, backbone)


def load(folder: Path, shape: BackboneShape, options: ConvertedOptions) -> AdapterPlan:
    """The plan of a PEFT LoRA checkpoint folder, into which an adapter was converted. Raises AdapterError."""
    return lora.load(folder, shape, LoraOptions())
