"""The passes, by the name that the command line and recipes use."""

from __future__ import annotations

import dataclasses
import importlib
import re
from typing import TYPE_CHECKING, Any

from exitify.errors import PlanError

if TYPE_CHECKING:
    from exitify.passes.base import Pass

PASSES = {
    "choose-skips": "exitify.passes.choose_skips:ChooseSkips",
    "choose-exits": "exitify.passes.choose_exits:ChooseExits",
    "cascade-exits": "exitify.passes.cascade_exits:CascadeExits",
    "attach-heads": "exitify.passes.attach_heads:AttachHeads",
    "switch-norms": "exitify.passes.switch_norms:SwitchNorms",
    "cut-segments": "exitify.passes.cut_segments:CutSegments",
    "equilibrate-gradients": "exitify.passes.equilibrate_gradients:EquilibrateGradients",
}


def make_pass(text: str) -> Pass:
    """Return the pass that `str(pass)` wrote: `choose-exits{exits=auto head=auto}`.

    Raises:
        PlanError: no pass has that name, or it has no such option.
    """
    match = re.fullmatch(r"([a-z-]+)(?:\{(.*)\})?", text)
    if match is None or match[1] not in PASSES:
        raise PlanError(f"there is no pass {text!r}", f"there are {', '.join(PASSES)}")
    module, _, class_name = PASSES[match[1]].partition(":")
    kind = getattr(importlib.import_module(module), class_name)
    options = dict(item.partition("=")[::2] for item in re.split(r" (?=\w+=)", match[2] or "") if item)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for option in options:
        if option not in fields:
            raise PlanError(f"pass {match[1]!r} has no option {option!r}", f"it has {', '.join(fields) or 'none'}")
    kinds: dict[str, Any] = {name: type(field.default) for name, field in fields.items()}
    made: Pass = kind(**{name: kinds[name](value) for name, value in options.items()})
    return made


if __name__ == "passes":
    raise ImportError("this folder is the package exitify.passes: import it by that name")
