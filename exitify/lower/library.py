"""Segments into one library: Relax functions, kernels scheduled, weights as arguments."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax, tirx
from tvm.relax import transform
from tvm.relax.expr_functor import PyExprMutator, mutator

from exitify.artifact.artifact import Artifact
from exitify.artifact.manifest import Precision, name_of
from exitify.errors import first_line
from exitify.lower import attention, functions, linear, normalization  # noqa: F401 (functions: how processors compute exp and the like)
from exitify.lower.blocked import IN_ROWS, Borders, to_blocks
from exitify.lower.from_onnx import NotLowered, not_lowered, segment_module
from exitify.lower.lift_constants import lift_constants
from exitify.lower.precision import to_half
from exitify.lower.processors import Machine
from exitify.lower.schedules import default_schedule, gpu
from exitify.plan import Segment

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kernels:
    """Segments as functions over kernels that are not scheduled yet.

    module: A Relax function a segment, under the segment's name; and kernels, equal ones once.
    weights: What each function takes behind the plan's inputs and parameters, in order.
    second_weights: What those whose norms have a second set take in its place.
    in_blocks: Values that functions take and give in blocks of channels; block: Their last size.
    in_batches: Sizes beside 1 for which there is a function too, under `name_of`, by segment.
    """

    module: tvm.IRModule
    weights: Mapping[str, tuple[NDArray[Any], ...]]
    second_weights: Mapping[str, tuple[NDArray[Any], ...]]
    in_blocks: frozenset[str] = frozenset()
    block: int = 0
    in_batches: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def kernels(self) -> dict[str, tirx.PrimFunc]:
        """The kernels by name."""
        return {var.name_hint: function for var, function in self.module.functions_items() if isinstance(function, tirx.PrimFunc)}


class AnyMachine(Protocol):
    """What kernels are lowered and built for: a `Machine`, or a `GpuMachine`."""

    @property
    def description(self) -> dict[str, Any]:
        """TVM's target as plain values."""

    @property
    def identity(self) -> tuple[object, ...]:
        """What measurements depend on."""

    @property
    def is_here(self) -> bool:
        """Whether the machine at hand can run the code."""

    @property
    def target(self) -> tvm.target.Target:
        """TVM's target."""


def lower_segments(
    artifact: Artifact,
    segments: Sequence[Segment],
    machine: AnyMachine,
    *,
    precision: Precision = "fp32",
    batches: Sequence[int] = (),
    leave: bool = False,
) -> Kernels:
    """Lower segments to kernels for a machine.

    Args:
        precision: Of weights and of what is computed within a segment.
        batches: Sizes beside 1 for which segments get functions too, over the same weights.
        leave: Whether a segment that TVM cannot take is left out.

    Raises:
        NotLowered: TVM cannot take a segment, and `leave` is false.
    """
    while True:
        kernels, refused = _lowered(artifact, segments, machine, precision, batches)
        if not refused:
            return kernels
        if not leave:
            raise next(iter(refused.values()))
        # Once more without them: what they take and give is rows of images.
        segments = [segment for segment in segments if segment.name not in refused]


def _lowered(
    artifact: Artifact, segments: Sequence[Segment], machine: AnyMachine, precision: Precision, batches: Sequence[int]
) -> tuple[Kernels, dict[str, NotLowered]]:
    """The segments that TVM can take, and why it cannot take the others."""
    builder = relax.BlockBuilder()
    weights: dict[str, tuple[NDArray[Any], ...]] = {}
    second_weights: dict[str, tuple[NDArray[Any], ...]] = {}
    in_batches: dict[str, tuple[int, ...]] = {}
    refused: dict[str, NotLowered] = {}

    def add(function: relax.Function, module: tvm.IRModule, name: str) -> None:
        """A function under this name, and its kernels."""
        kernels = [(var.name_hint, kernel) for var, kernel in module.functions_items() if isinstance(kernel, tirx.PrimFunc)]
        known = {hint: builder.add_func(kernel, hint) for hint, kernel in kernels}
        builder.add_func(_calling(function, known).with_attr("global_symbol", name), name)

    between, in_blocks = artifact.plan.maps_between({segment.name for segment in segments}), set[str]()
    for segment in segments:
        borders = _borders(segment, between, in_blocks)
        try:
            lowered, given = _fused(segment_module(artifact, segment), segment, machine, precision, borders)
            function, constants = lift_constants(lowered["main"])
            if segment.has_two_norm_sets:
                second, _ = _fused(segment_module(artifact, segment, second=True), segment, machine, precision, borders)
                second_weights[segment.name] = _in_place_of(constants, lift_constants(second["main"])[1], segment)
        except NotLowered as refusal:
            refused[segment.name] = refusal
            continue
        in_blocks.update(segment.outputs[number] for number in given)
        add(function, lowered, segment.name)
        weights[segment.name] = tuple(constants)
        for batch in batches:
            for_several, given_so = _fused(segment_module(artifact, segment, batch=batch), segment, machine, precision, borders, batch)
            function, others = lift_constants(for_several["main"])
            if given_so == given and len(others) == len(constants) and all(map(np.array_equal, others, constants)):
                add(function, for_several, name_of(segment.name, batch))
                in_batches[segment.name] = (*in_batches.get(segment.name, ()), batch)
            else:
                log.warning("%s has no code for batches of %d: its weights or the form of its maps would be others", segment.name, batch)
    block = machine.vectors.lanes if isinstance(machine, Machine) else 0
    return Kernels(builder.get(), weights, second_weights, frozenset(in_blocks), block if in_blocks else 0, in_batches), refused


def _borders(segment: Segment, between: AbstractSet[str], in_blocks: AbstractSet[str]) -> Borders:
    """What a segment takes and may give in blocks. Where a block may be left out, its output is its input: both are in blocks, or neither."""
    taken = [number for number, name in enumerate(segment.inputs) if name in in_blocks]
    if segment.kind == "block":
        return Borders(taken, given=taken)
    return Borders(taken, may=[number for number, name in enumerate(segment.outputs) if name in between])


def _in_place_of(first: Sequence[NDArray[Any]], second: Sequence[NDArray[Any]], segment: Segment) -> tuple[NDArray[Any], ...]:
    """The second set's constants, for the same function: those that are the first set's too are the same arrays."""
    if [(array.shape, array.dtype) for array in first] != [(array.shape, array.dtype) for array in second]:
        raise not_lowered(segment, "its two sets of norms do not become the same code")
    return tuple(one if np.array_equal(one, other) else other for one, other in zip(first, second))


def _fused(
    module: tvm.IRModule, segment: Segment, machine: AnyMachine, precision: Precision = "fp32", borders: Borders = IN_ROWS, batch: int = 1
) -> tuple[tvm.IRModule, frozenset[int]]:
    """Operators to kernels, element-wise ones joined to what they follow; and which outputs are in blocks of channels."""
    forms = {}
    if isinstance(machine, Machine):
        forms = {"relax.matmul": linear.legalize(machine.vectors, batch), **normalization.legalize(machine.vectors)}
    passes = [
        transform.LegalizeOps(forms),
        transform.FoldConstant(),
        transform.AnnotateTIROpPattern(),
        transform.FuseOps(),
        transform.FuseTIR(),
        transform.DeadCodeElimination(),
    ]
    try:
        with machine.target:
            module = tvm.transform.Sequential([transform.FoldConstant(), transform.DecomposeOpsForInference(), transform.FoldConstant()])(module)
            module = to_half(module) if precision == "fp16" else module
            given: frozenset[int] = frozenset()
            if isinstance(machine, Machine):
                module = transform.DeadCodeElimination()(attention.fuse_attention(module, machine.vectors))
                module, given = to_blocks(module, machine.vectors, borders)
            fused = tvm.transform.Sequential(passes)(module)
    except Exception as error:
        raise not_lowered(segment, first_line(error)) from error
    left: list[str] = []

    def note(expression: Any) -> None:
        if isinstance(expression, relax.Call) and isinstance(expression.op, tvm.ir.Op) and expression.op.name != "relax.call_tir":
            is_outside = bool(expression.args) and isinstance(expression.args[0], relax.ExternFunc)
            left.append(str(expression.args[0].global_symbol) if is_outside else expression.op.name)

    relax.analysis.post_order_visit(fused["main"], note)
    if left:
        raise not_lowered(segment, f"it has no kernel for {', '.join(sorted(set(left)))}")
    return fused, given


def _calling(function: relax.Function, known: Mapping[str, Any]) -> relax.Function:
    """The function with its calls of kernels led to those of the same name in another module."""
    return relax.Function(function.params, _Calling(known).visit_expr(function.body), function.ret_ty, function.is_pure)


@mutator
class _Calling(PyExprMutator):  # type: ignore[misc]
    def __init__(self, known: Mapping[str, Any]) -> None:
        super().__init__()
        self.known = known

    def visit_global_var_(self, var: Any) -> Any:
        return self.known[var.name_hint]


def scheduled_by_default(kernels: Kernels, machine: AnyMachine) -> dict[str, tirx.PrimFunc]:
    """Each kernel by the default schedule of its kind."""
    if isinstance(machine, Machine):
        return {name: default_schedule(kernel, machine.vectors).mod["main"] for name, kernel in kernels.kernels.items()}
    return {name: gpu.default_schedule(kernel, machine.target) for name, kernel in kernels.kernels.items()}


def build(kernels: Kernels, scheduled: Mapping[str, tirx.PrimFunc], machine: AnyMachine) -> relax.VMExecutable:
    """Compile functions and scheduled kernels for the machine."""
    module = tvm.IRModule(dict(kernels.module.functions_items()))
    for name, kernel in scheduled.items():
        module[module.get_global_var(name)] = kernel.with_attr("tirx.is_scheduled", True)
    steps = [
        transform.RewriteDataflowReshape(),
        transform.ToNonDataflow(),
        transform.RemovePurityChecking(),
        transform.CallTIRRewrite(),
        transform.StaticPlanBlockMemory(),
        transform.LowerAllocTensor(),
        transform.KillAfterLastUse(),
        transform.LowerRuntimeBuiltin(),
        transform.ComputePrimValue(),
        transform.VMShapeLower(),
        transform.AttachGlobalSymbol(),
    ]
    with machine.target, silent_stderr():
        return tvm.compile(module, machine.target, relax_pipeline=tvm.transform.Sequential(steps))


def shared_object(executable: relax.VMExecutable, link: Any) -> bytes:
    """The executable as the bytes of a shared library."""
    with tempfile.TemporaryDirectory(prefix="exitify-") as folder, silent_stderr():
        path = Path(folder) / "library.so"
        executable.export_library(str(path), fcompile=link)
        return path.read_bytes()


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Without what TVM and LLVM write there themselves; Python's own errors are raised, not written."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
