"""What a pass is: options in, program in, program out; the frame checks what comes out."""

from __future__ import annotations

import abc
import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from exitify.program import Program


@dataclass(frozen=True)
class Pass(abc.ABC):
    """One step from program to program. Its fields are its options, its text makes it again."""

    name: ClassVar[str]

    @abc.abstractmethod
    def apply(self, program: Program) -> Program:
        """Return a new program; the one given stays as it was, and shares its weights with the new one."""

    def __call__(self, program: Program) -> Program:
        """Apply, record the step in the recipe, and verify the result; an error names the pass and keeps its type."""
        try:
            result = self.apply(program)
            result = result.replace(recipe=(*program.recipe, str(self)))
            result.verify()
        except Exception as error:
            if hasattr(error, "add_note"):
                error.add_note(f"in pass {self}")
            raise
        return result

    def __str__(self) -> str:
        options = [f"{field.name}={getattr(self, field.name)}" for field in dataclasses.fields(self)]
        return self.name + (f"{{{' '.join(options)}}}" if options else "")
