"""How a new type of adapter becomes known to PEFT, which has a registry for it but a closed list of names."""

from __future__ import annotations

from typing import Any

from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType


def register(name: str, config: type[Any], model: type[Any]) -> None:
    """Makes `peft_type: NAME` a type like PEFT's own; `name` in lower case, parameters begin with `name` and `_`.

    The name has to be a member of the enum PeftType, which can only be extended from within.
    """
    key = name.upper()
    if key in PeftType.__members__:
        return
    member = str.__new__(PeftType, key)
    member._name_, member._value_ = key, key
    PeftType._member_map_[key] = member
    PeftType._value2member_map_[key] = member
    PeftType._member_names_.append(key)
    type.__setattr__(PeftType, key, member)
    register_peft_method(name=name, config_cls=config, model_cls=model)
