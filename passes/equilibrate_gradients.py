"""Gradients that do not grow with the number of exits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from exitify.errors import PlanError
from exitify.passes.base import Pass
from exitify.program import Program

Tensors = Literal["all", "last"]
"""Which tensors the pass is about."""


@dataclass(frozen=True)
class EquilibrateGradients(Pass):
    """Let each tensor's gradient, while the exits are trained together, be the mean over the exits that need it.

    A tensor early in the network gets gradients from every exit behind it, and their sum grows with the number of exits.
    With k exits, the last one counted, exit i's head hands back the gradient of the value that it reads times 1/(k-i+1),
    and what goes on from there hands it back times (k-i)/(k-i+1); so of the gradient of exit j's loss with regard to a
    feature of stage i <= j there arrives 1/(k-i+1) (Li et al. 2019, section 3.1, equation 5). Heads' own parameters are
    behind all this, and their gradients stay as they are.

    It is a property of training alone. The stored graph, plan and segments are as before, and so is what is exported;
    forward values are the same bits; in `eval()`, and without all exits, nothing is scaled. Skip masks work as ever: what is
    scaled follows from the network that is left.

    On other graphs than a chain: let m(a) be how many exits are computed from the tensor a, the last one counted. Whatever
    reads a, and serves m(b) exits itself, hands back m(b)/m(a) of the gradient, and a head 1/m(a). With `tensors="all"` the
    gradient of every tensor is then the mean over the m(a) exits that it serves. A cut of several tensors has each of them
    scaled where it goes on. An exit on a side branch, whose value the next exit does not need, counts for what lies
    before the branch; what lies on the branch serves one exit, and is not scaled. What a head says to a later one (`cascade`)
    does not make the later exit one that its value serves.

    Losses on what a Program returns besides logits (`stages`, other outputs) go back through the same factors on their way,
    and have none of their own.

    Attributes:
        tensors: `all`; or `last`, only the values that heads read, as the paper's public code does for MSDNet, whose finer
            scales go on unscaled. The same where one tensor crosses each cut.
    """

    name: ClassVar[str] = "equilibrate-gradients"
    tensors: Tensors = "all"

    def apply(self, program: Program) -> Program:
        if self.tensors not in get_args(Tensors):
            raise PlanError(f"there is no way {self.tensors!r} to equilibrate gradients", f"there are {', '.join(get_args(Tensors))}")
        return program.replace(equilibrium=self.tensors)
