"""The two new members of PEFT's closed enum ``PeftType``: what the configs name themselves by.

PEFT looks a saved adapter's ``peft_type`` up in an enum that has no door for others, so members are added to it
here, the way `enum` itself does it. Importing twice, or reloading, finds the members that are there already.
"""

from __future__ import annotations

from typing import Any

from peft import PeftType


def member(name: str) -> Any:
    """The member ``name`` of ``PeftType``, made when it is missing."""
    if name in PeftType.__members__:
        return PeftType[name]
    made: Any = str.__new__(PeftType, name)
    made._name_ = name
    made._value_ = name
    made._sort_order_ = len(PeftType._member_names_)
    # Past EnumType.__setattr__, which from Python 3.12 on guards members; attribute look-up then finds it there.
    type.__setattr__(PeftType, name, made)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = made
    PeftType._value2member_map_[name] = made
    return made


SSH = member("SSH")
SDCTFT = member("SDCTFT")
