"""Every kind of kernel against ONNX Runtime and against what the machine can do at most.

    OMP_NUM_THREADS=1 python -m benchmarks.kernels --output kernels        # two to four minutes
    OMP_NUM_THREADS=1 python -m benchmarks.kernels --only depthwise --seconds 0.3

Each row is one operator, with its bias and activation where networks have them, at a shape of one of eight networks: an ONNX model of its own,
run by ONNX Runtime, and lowered, scheduled without tuning and compiled as a segment is. Of both only the operator's kernels are timed, with what
they read in the layout in which a network hands it on: ONNX Runtime's model is optimised first, then its conversions to blocks of channels and
back are cut off; of ours the kernels are called one by one, those that convert left out. A call of a kernel that does nothing is subtracted.
Weights are cold: as many copies are used in turn as exceed the cache of a core. Both run in turn in one process; medians, of a thread its own time.

A row's roof is the least time in which the machine could do it: its multiply-adds at the peak of a core, or its bytes, each read or written once,
from the caches that hold them, whichever takes longer. Winograd's convolutions need fewer multiply-adds than are counted and may exceed it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import tvm
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tvm import relax
from tvm.relax.frontend.onnx import from_onnx

from benchmarks import peaks
from exitify.lower import library
from exitify.lower.library import Kernels
from exitify.lower.lift_constants import lift_constants
from exitify.lower.processors import Machine, machine_of
from exitify.plan import Cost, Segment
from exitify.targets import load_target

Array = NDArray[Any]
CONVERSIONS = ("into_blocks", "out_of_blocks", "channels_last", "ReorderInput", "ReorderOutput")
BEFORE = "before"
"""What names of values begin with that the operator is given, and whose kernels are not timed."""
COLD = 4 << 20
"""Bytes of weights that are read before the same ones come again."""
COPIES = 16
"""Most copies: of small weights all lie in the caches of a network, too."""


@dataclass(frozen=True)
class Node:
    """An ONNX node: what it computes from the value before it, and from weights or further inputs of these shapes."""

    kind: str
    weights: tuple[tuple[int, ...], ...] = ()
    attributes: tuple[tuple[str, Any], ...] = ()
    inputs: tuple[tuple[int, ...], ...] = ()
    residual: bool = False


@dataclass(frozen=True)
class Case:
    """One row of the table.

    network: Where such a shape comes from. nodes: In a row. before: How many of them only bring the value into its layout.
    macs: Multiply-adds.
    """

    kind: str
    name: str
    network: str
    image: tuple[int, ...]
    nodes: tuple[Node, ...]
    macs: float = 0.0
    before: int = 0


@dataclass(frozen=True)
class Row:
    """What was measured: seconds, medians, with their 10th and 90th percentile. roof: Least seconds, by the machine's peaks."""

    kind: str
    name: str
    network: str
    macs: float
    bytes: float
    roof: float
    ours: tuple[float, float, float]
    onnxruntime: tuple[float, float, float]
    ratio: float
    kernels: tuple[str, ...]
    error: float


# --- what is measured


def cases() -> Iterator[Case]:
    """All rows, kind by kind."""
    yield from (_convolution("1x1", *sizes) for sizes in POINTWISE)
    yield from (_convolution("1x1, one pixel", *sizes) for sizes in GATES)
    yield from (_convolution("3x3, Winograd", *sizes) for sizes in SQUARE)
    yield from (_convolution("3x3, stride 2", *sizes) for sizes in STRIDED)
    yield from (_convolution("other kernels", *sizes) for sizes in LARGE)
    yield from (_convolution("grouped", *sizes) for sizes in GROUPED)
    yield from (_convolution("depthwise", *sizes) for sizes in DEPTHWISE)
    for network, channels, size in (("resnet18", 64, 112), ("densenet121", 256, 28)):
        node = Node("MaxPool", attributes=(("kernel_shape", (3, 3)), ("strides", (2, 2)), ("pads", (1, 1, 1, 1))))
        yield _in_blocks("pooling", f"max 3x3/2, {channels} @ {size}", network, (1, channels, size, size), node)
        node = Node("AveragePool", attributes=(("kernel_shape", (2, 2)), ("strides", (2, 2))))
        yield _in_blocks("pooling", f"average 2x2/2, {channels} @ {size}", "densenet121", (1, channels, size, size), node)
    for network, channels, size in (("resnet50", 2048, 7), ("efficientnet_b0", 144, 56), ("efficientnet_b0", 672, 14), ("mobilenet_v2", 1280, 7)):
        node = Node("ReduceMean", attributes=(("axes", (2, 3)),))
        yield _in_blocks("mean", f"{channels} @ {size}", network, (1, channels, size, size), node)
    for network, channels, size in (("efficientnet_b0", 144, 56), ("efficientnet_b0", 672, 14), ("efficientnet_b0", 1152, 7)):
        node = Node("Mul", inputs=((1, channels, 1, 1),))
        yield _in_blocks("gated multiply", f"{channels} @ {size}", network, (1, channels, size, size), node)
    yield from _one_by_one()
    for network, lead, depth, columns in PRODUCTS:
        rows = math.prod(lead)
        nodes = (Node("MatMul", ((depth, columns),)), Node("Add", ((columns,),)))
        name = f"{rows} x {depth} to {columns}"
        yield Case("product" if rows > 1 else "product, one row", name, network, (*lead, depth), nodes, rows * depth * columns)
    yield Case(
        "product", "197 x 384 to 1536, GELU", "vit_small", (1, 197, 384),
        (Node("MatMul", ((384, 1536),)), Node("Add", ((1536,),)), Node("Gelu")), 197 * 384 * 1536,
    )  # fmt: skip
    for network, windows, rows, depth in ATTENTION:
        size = f"{math.prod(windows)} x {rows} x {depth}"
        macs = math.prod(windows) * rows * rows * depth
        yield Case("attention products", f"Q K, {size}", network, (*windows, rows, depth), (Node("MatMul", inputs=((*windows, depth, rows),)),), macs)
        yield Case("attention products", f"P V, {size}", network, (*windows, rows, rows), (Node("MatMul", inputs=((*windows, rows, depth),)),), macs)
        yield Case(
            "softmax", f"{math.prod(windows) * rows} x {rows}", network, (*windows, rows, rows), (Node("Softmax", attributes=(("axis", -1),)),)
        )
    for network, rows, depth in (("vit_small", 197, 384), ("swin_t", 3136, 96), ("convnext_tiny", 784, 192), ("swin_t", 49, 768)):
        node = Node("LayerNormalization", ((depth,), (depth,)), (("axis", -1), ("epsilon", 1e-5)))
        yield Case("layer norm", f"{rows} x {depth}", network, (1, rows, depth), (node,))


POINTWISE = (
    ("resnet50", 64, 256, 56, 1, 1, 1, ""),
    ("resnet50", 256, 64, 56, 1, 1, 1, "Relu"),
    ("resnet50", 512, 128, 28, 1, 1, 1, "Relu"),
    ("resnet50", 256, 1024, 14, 1, 1, 1, "residual"),
    ("resnet50", 2048, 512, 7, 1, 1, 1, "Relu"),
    ("resnet50", 256, 512, 56, 1, 2, 1, ""),
    ("resnet50", 1024, 2048, 14, 1, 2, 1, ""),
    ("mobilenet_v2", 16, 96, 112, 1, 1, 1, "Relu"),
    ("mobilenet_v2", 144, 24, 56, 1, 1, 1, ""),
    ("mobilenet_v2", 576, 96, 14, 1, 1, 1, ""),
    ("mobilenet_v2", 160, 960, 7, 1, 1, 1, "Relu"),
    ("mobilenet_v3_small", 40, 240, 14, 1, 1, 1, "HardSwish"),
    ("efficientnet_b0", 112, 672, 14, 1, 1, 1, "SiLU"),
    ("efficientnet_b0", 1152, 192, 7, 1, 1, 1, ""),
)
"""Network, channels, filters, size of the image, of the kernel, stride, groups, and what follows the bias."""
GATES = (("efficientnet_b0", 672, 28, 1, 1, 1, 1, "SiLU"), ("efficientnet_b0", 28, 672, 1, 1, 1, 1, "Sigmoid"))
SQUARE = (
    ("resnet18", 64, 64, 56, 3, 1, 1, "Relu"),
    ("resnet18", 128, 128, 28, 3, 1, 1, "Relu"),
    ("resnet18", 256, 256, 14, 3, 1, 1, "Relu"),
    ("resnet18", 512, 512, 7, 3, 1, 1, "Relu"),
)
STRIDED = (
    ("mobilenet_v2", 3, 32, 224, 3, 2, 1, "Relu"),
    ("resnet18", 64, 128, 56, 3, 2, 1, "Relu"),
    ("resnet50", 256, 256, 28, 3, 2, 1, "Relu"),
    ("resnet18", 256, 512, 14, 3, 2, 1, "Relu"),
)
LARGE = (
    ("resnet18", 3, 64, 224, 7, 2, 1, "Relu"),
    ("googlenet", 24, 64, 28, 5, 1, 1, "Relu"),
    ("swin_t", 3, 96, 224, 4, 4, 1, ""),
    ("vit_small", 3, 384, 224, 16, 16, 1, ""),
    ("convnext_tiny", 192, 384, 28, 2, 2, 1, ""),
)
GROUPED = (("resnext50_32x4d", 128, 128, 56, 3, 1, 32, "Relu"), ("regnet_y_400mf", 208, 208, 14, 3, 1, 26, "Relu"))
DEPTHWISE = (
    ("efficientnet_b0", 32, 32, 112, 3, 1, 32, "SiLU"),
    ("mobilenet_v2", 144, 144, 56, 3, 1, 144, "Relu"),
    ("mobilenet_v2", 384, 384, 14, 3, 1, 384, "Relu"),
    ("mobilenet_v2", 960, 960, 7, 3, 1, 960, "Relu"),
    ("mobilenet_v2", 96, 96, 112, 3, 2, 96, "Relu"),
    ("mobilenet_v2", 576, 576, 14, 3, 2, 576, "Relu"),
    ("efficientnet_b0", 240, 240, 28, 5, 1, 240, "SiLU"),
    ("efficientnet_b0", 672, 672, 14, 5, 1, 672, "SiLU"),
    ("efficientnet_b0", 1152, 1152, 7, 5, 1, 1152, "SiLU"),
    ("efficientnet_b0", 144, 144, 56, 5, 2, 144, "SiLU"),
    ("mobilenet_v3_small", 288, 288, 14, 5, 2, 288, "HardSwish"),
    ("convnext_tiny", 96, 96, 56, 7, 1, 96, ""),
    ("convnext_tiny", 384, 384, 14, 7, 1, 384, ""),
    ("convnext_tiny", 768, 768, 7, 7, 1, 768, ""),
)
PRODUCTS = (
    ("resnet50", (1,), 2048, 1000),
    ("mobilenet_v3_small", (1,), 576, 1024),
    ("swin_t", (1, 49), 768, 3072),
    ("swin_t", (1, 49), 3072, 768),
    ("swin_t", (4, 49), 384, 1152),
    ("convnext_tiny", (1, 14, 14), 384, 1536),
    ("convnext_tiny", (1, 14, 14), 1536, 384),
    ("vit_small", (1, 197), 384, 1152),
    ("vit_small", (1, 197), 1536, 384),
    ("swin_t", (1, 28, 28), 192, 768),
    ("convnext_tiny", (1, 56, 56), 96, 384),
    ("convnext_tiny", (1, 56, 56), 384, 96),
)
"""Network, leading sizes, values summed up, columns."""
ATTENTION = (("vit_small", (1, 6), 197, 64), ("swin_t", (64, 3), 49, 32), ("swin_t", (1, 24), 49, 32))
"""Network, windows and heads, rows, depth of a head."""


def _convolution(kind: str, network: str, channels: int, filters: int, size: int, kernel: int, stride: int, groups: int, behind: str) -> Case:
    border = 0 if kernel == stride else kernel // 2
    out = (size + 2 * border - kernel) // stride + 1
    attributes = (("strides", (stride, stride)), ("pads", (border,) * 4), ("group", groups), ("kernel_shape", (kernel, kernel)))
    node = Node("Conv", ((filters, channels // groups, kernel, kernel), (filters,)), attributes)
    macs = out * out * filters * channels // groups * kernel * kernel
    nodes = {"": (), "residual": (Node("Add", residual=True), Node("Relu")), "SiLU": (Node("SiLU"),)}.get(behind, (Node(behind),))
    sizes = f"{channels}" if groups == channels > 1 else f"{channels} to {filters}"
    name = f"{kernel}x{kernel}{f'/{stride}' if stride > 1 else ''}, {sizes} @ {size}{f', {groups} groups' if 1 < groups < channels else ''}"
    return Case(kind, f"{name}{f', {behind}' if behind else ''}", network, (1, channels, size, size), (node, *nodes), macs)


def _in_blocks(kind: str, name: str, network: str, image: tuple[int, ...], *nodes: Node) -> Case:
    """What is in blocks of channels only behind a convolution; and behind a pooling, so that it does not join that."""
    channels = image[1]
    first = Node("Conv", ((channels, channels, 1, 1),), (("kernel_shape", (1, 1)),))
    second = Node("MaxPool", attributes=(("kernel_shape", (1, 1)),))
    return Case(kind, name, network, image, (first, second, *nodes), before=2)


def _one_by_one() -> Iterator[Case]:
    for network, shape, kind in (
        ("resnet50", (1, 256, 56, 56), "add, ReLU"),
        ("efficientnet_b0", (1, 96, 112, 112), "SiLU"),
        ("efficientnet_b0", (1, 1152, 7, 7), "SiLU"),
        ("mobilenet_v3_small", (1, 16, 112, 112), "HardSwish"),
        ("vit_small", (1, 197, 1536), "Gelu"),
        ("convnext_tiny", (1, 3136, 384), "Gelu"),
    ):
        nodes = (Node("Add", inputs=(shape,)), Node("Relu")) if kind == "add, ReLU" else (Node(kind),)
        name = f"{kind}, {' x '.join(map(str, shape[1:]))}"
        yield _in_blocks("element-wise", name, network, shape, *nodes) if len(shape) == 4 else Case("element-wise", name, network, shape, nodes)


# --- models


@dataclass(frozen=True)
class Model:
    """A case as ONNX. weights, inputs: By name, the inputs in order."""

    proto: onnx.ModelProto
    weights: dict[str, Array]
    inputs: dict[str, Array]


def model_of(case: Case) -> Model:
    """The nodes in a row."""
    draw = np.random.default_rng(0)
    weights: dict[str, Array] = {}
    inputs = {"x": draw.standard_normal(case.image, np.float32)}
    nodes: list[onnx.NodeProto] = []
    value = "x"
    for i, node in enumerate(case.nodes):
        read = [value]
        for shape in node.weights:
            scale = 1 / math.sqrt(math.prod(shape[1:]) if len(shape) > 2 else shape[0])
            weights[f"w{len(weights)}"] = (scale * draw.standard_normal(shape, np.float32)).astype(np.float32)
            read.append(f"w{len(weights) - 1}")
        shapes = [_out_shape(nodes, case.image, weights)] if node.residual else list(node.inputs)
        for shape in shapes:
            name = f"x{len(inputs)}"
            inputs[name] = draw.standard_normal(shape, np.float32)
            read.append(f"{BEFORE}_{name}" if node.residual else name)
            if node.residual:
                nodes.insert(0, helper.make_node("MaxPool", [name], [read[-1]], kernel_shape=(1, 1)))
        made = f"{BEFORE}{i}" if i < case.before else f"y{i}"
        attributes = dict(node.attributes)
        if node.kind == "SiLU":
            nodes += [helper.make_node("Sigmoid", read, [f"s{i}"]), helper.make_node("Mul", [*read, f"s{i}"], [made])]
        elif node.kind == "ReduceMean":
            weights[f"w{len(weights)}"] = np.array(attributes["axes"], np.int64)
            nodes.append(helper.make_node("ReduceMean", [*read, f"w{len(weights) - 1}"], [made], keepdims=1))
        else:
            nodes.append(helper.make_node(node.kind, read, [made], **attributes))
        value = made
    return Model(_proto(nodes, inputs, weights, [value]), weights, inputs)


def _proto(nodes: Sequence[onnx.NodeProto], inputs: dict[str, Array], weights: dict[str, Array], outputs: Sequence[str]) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "case",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def _out_shape(nodes: Sequence[onnx.NodeProto], image: tuple[int, ...], weights: dict[str, Array]) -> tuple[int, ...]:
    """The shape of what these nodes give."""
    proto = _proto(nodes, {"x": np.empty(image, np.float32)}, weights, [nodes[-1].output[0]])
    return tuple(size.dim_value for size in proto.graph.output[0].type.tensor_type.shape.dim)


# --- ONNX Runtime


def options(threads: int, optimised: str = "") -> onnxruntime.SessionOptions:
    made = onnxruntime.SessionOptions()
    made.intra_op_num_threads, made.inter_op_num_threads, made.log_severity_level = threads, 1, 3
    if optimised:
        made.optimized_model_filepath = optimised
    return made


def cut(model: Model, threads: int, folder: Path) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """The model as ONNX Runtime optimises it, without conversions and what is before the operator; and its inputs in the layout it has there."""
    path = folder / "optimised.onnx"
    onnxruntime.InferenceSession(model.proto.SerializeToString(), options(threads, str(path)), providers=["CPUExecutionProvider"])
    proto = onnx.load(path)
    path.unlink()
    kept = [node for node in proto.graph.node if node.op_type not in CONVERSIONS and not node.name.startswith(BEFORE)]
    constants = {tensor.name for tensor in proto.graph.initializer}
    made = {name for node in kept for name in node.output}
    inputs = list(dict.fromkeys(name for node in kept for name in node.input if name and name not in made and name not in constants))
    read = {name for node in kept for name in node.input}
    outputs = [name for node in kept for name in node.output if name and name not in read]
    arrays = _values(proto, [*inputs, *outputs], model, threads)
    del proto.graph.node[:], proto.graph.input[:], proto.graph.output[:], proto.graph.value_info[:]
    proto.graph.node.extend(kept)
    unread = [tensor for tensor in proto.graph.initializer if tensor.name not in read]
    for tensor in unread:
        proto.graph.initializer.remove(tensor)
    proto.graph.input.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, arrays[name].shape) for name in inputs)
    proto.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, arrays[name].shape) for name in outputs)
    return proto, {name: arrays[name] for name in inputs}


def _values(proto: onnx.ModelProto, names: Sequence[str], model: Model, threads: int) -> dict[str, Array]:
    """What values of the optimised model are, for the model's inputs."""
    whole = onnx.ModelProto()
    whole.CopyFrom(proto)
    given = {value.name for value in whole.graph.input}
    known = {value.name for value in whole.graph.output}
    whole.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names if name not in known and name not in given)
    session = onnxruntime.InferenceSession(whole.SerializeToString(), options(threads), providers=["CPUExecutionProvider"])
    wanted = [name for name in names if name not in given]
    return {**model.inputs, **dict(zip(wanted, session.run(wanted, model.inputs)))}


def bound_sessions(proto: onnx.ModelProto, inputs: dict[str, Array], threads: int, copies: int) -> list[Callable[[], Any]]:
    """As many sessions, each with weights of its own, over the same inputs and outputs."""
    given = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items()}
    results: dict[str, Any] = {}
    runs = []
    for _ in range(copies):
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options(threads), providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        for name, value in given.items():
            binding.bind_ortvalue_input(name, value)
        for output in session.get_outputs():
            if output.name not in results:
                results[output.name] = onnxruntime.OrtValue.ortvalue_from_shape_and_type(output.shape, np.float32)
            binding.bind_ortvalue_output(output.name, results[output.name])
        runs.append(lambda session=session, binding=binding: session.run_with_iobinding(binding))
    return runs


# --- ours


@dataclass(frozen=True)
class Call:
    """A kernel, what it takes, and what it writes. is_timed: Whether it is the operator's."""

    name: str
    function: Any
    arguments: list[Any]
    weights: list[int]
    is_timed: bool


def our_calls(model: Model, case: Case, machine: Machine) -> tuple[list[Call], Array]:
    """The kernels in order, run once; and what they computed."""
    with warnings.catch_warnings(), library.silent_stderr():
        warnings.simplefilter("ignore")
        module = from_onnx(model.proto)
        module, _ = library._fused(module, Segment("trunk_case", "trunk", (), (), (), (), Cost()), machine)
        main, constants = lift_constants(module["main"])
        kernels = Kernels(module, {}, {})
        scheduled = library.scheduled_by_default(kernels, machine)
        built = tvm.compile(
            tvm.IRModule({name: kernel.with_attr("global_symbol", name) for name, kernel in scheduled.items()}), target=machine.target
        )
    inputs = dict(zip((value.name for value in model.proto.graph.input), main.params))
    values: dict[Any, Any] = {inputs[name]: tvm.runtime.tensor(array) for name, array in model.inputs.items()}
    weights = list(main.params[len(model.inputs) :])
    values.update(zip(weights, (tvm.runtime.tensor(np.ascontiguousarray(array)) for array in constants)))
    calls: list[Call] = []
    left = sum(node.output[0].startswith(BEFORE) for node in model.proto.graph.node)
    for block in main.body.blocks:
        for binding in block.bindings:
            value = binding.value
            if isinstance(value, relax.Call):
                name, given = value.args[0].name_hint, list(value.args[1].fields)
                result = tvm.runtime.empty([int(size) for size in value.ty.shape], str(value.ty.dtype))
                arguments = [*(values[one] if isinstance(one, relax.Var) else one.value for one in given), result]
                converts = name.startswith(CONVERSIONS)
                is_timed = not converts and left == 0
                left -= not converts and left > 0
                calls.append(Call(name, built[name], arguments, [i for i, one in enumerate(given) if one in weights], is_timed))
                calls[-1].function(*arguments)
                values[binding.var] = result
            else:
                values[binding.var] = [values[one] for one in value.fields] if isinstance(value, relax.Tuple) else values[value]
    found = values[main.body.body]
    return calls, (found[0] if isinstance(found, list) else found).numpy()


def bound_calls(calls: Sequence[Call], copies: int) -> list[Callable[[], Any]]:
    """As many runs of the kernels that are timed, each with weights of its own."""
    runs = []
    for _ in range(copies):
        bound = []
        for call in calls:
            if call.is_timed:
                bound.append((call.function, [tvm.runtime.tensor(a.numpy()) if i in call.weights else a for i, a in enumerate(call.arguments)]))

        def run(bound: Any = tuple(bound)) -> None:
            for function, arguments in bound:
                function(*arguments)

        runs.append(run)
    return runs


# --- timing


def in_turn(*several: Sequence[Callable[[], Any]], seconds: float, threads: int) -> list[NDArray[np.float64]]:
    """Seconds a call of each, all copies of one after the other in each round.

    Of one thread they are its own: what else the machine does while it waits does not count.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    times: list[list[float]] = [[] for _ in several]
    for runs in several:
        for run in runs:
            run()
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends or len(times[0]) < 9:
        for runs, found in zip(several, times):
            many = 0
            started = clock()
            while many == 0 or clock() - started < 3e-4:
                for run in runs:
                    run()
                many += len(runs)
            found.append((clock() - started) / many)
    return [np.array(found) for found in times]


def overheads(machine: Machine, threads: int) -> tuple[float, float]:
    """Seconds of a call of one of our kernels, and of a session, that do next to nothing."""
    case = Case("element-wise", "nothing", "", (1, 1), (Node("Relu"),))
    model = model_of(case)
    calls, _ = our_calls(model, case, machine)
    ours, theirs = in_turn(bound_calls(calls, 4), bound_sessions(model.proto, model.inputs, threads, 4), seconds=0.5, threads=threads)
    return float(np.median(ours)), float(np.median(theirs))


def measured(case: Case, machine: Machine, most: peaks.Peaks, threads: int, seconds: float, idle: tuple[float, float], folder: Path) -> Row:
    """The case's row."""
    model = model_of(case)
    calls, answer = our_calls(model, case, machine)
    proto, inputs = cut(model, threads, folder)
    session = onnxruntime.InferenceSession(model.proto.SerializeToString(), options(threads), providers=["CPUExecutionProvider"])
    expected = session.run(None, model.inputs)[0]
    read = {name for node in own_nodes(model) for name in node.input}
    weight_bytes = sum(array.nbytes for name, array in model.weights.items() if name in read)
    copies = min(COPIES, COLD // max(1, weight_bytes) + 1)
    times = in_turn(bound_calls(calls, copies), bound_sessions(proto, inputs, threads, copies), seconds=seconds, threads=threads)
    timed = [call for call in calls if call.is_timed]
    ours = times[0] - idle[0] * len(timed)
    theirs = times[1] - idle[1]
    moved = 4.0 * (expected.size + sum(math.prod(shape) for shape in read_shapes(model)))
    held = weight_bytes * copies
    slowest = max(
        case.macs / (most.macs * threads),
        (most.seconds_for(moved) + weight_bytes / most.bandwidth(held)) / threads,
    )
    return Row(
        case.kind, case.name, case.network, case.macs, moved + weight_bytes, slowest, _spread(ours), _spread(theirs),
        float(np.median(np.maximum(ours, 1e-8)) / np.median(np.maximum(theirs, 1e-8))), tuple(call.name for call in timed),
        float(np.abs(answer - expected).max() / np.abs(expected).max()),
    )  # fmt: skip


def own_nodes(model: Model) -> list[onnx.NodeProto]:
    """The operator's nodes."""
    return [node for node in model.proto.graph.node if not node.output[0].startswith(BEFORE)]


def read_shapes(model: Model) -> list[tuple[int, ...]]:
    """The shapes of what the operator reads beside its weights; what lies between its nodes stays in registers."""
    nodes = own_nodes(model)
    made = {name for node in nodes for name in node.output}
    known = {value.name: tuple(size.dim_value for size in value.type.tensor_type.shape.dim) for value in model.proto.graph.value_info}
    known.update({name: array.shape for name, array in model.inputs.items()})
    read = dict.fromkeys(name for node in nodes for name in node.input if name not in made and name not in model.weights)
    return [known[name] for name in read]


def _spread(times: NDArray[np.float64]) -> tuple[float, float, float]:
    low, middle, high = np.maximum(np.percentile(times, (10, 50, 90)), 1e-8)
    return float(middle), float(low), float(high)


# --- what is shown


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| kind | shape | from | ours, µs (10 % to 90 %) | ONNX Runtime, µs | ours / ONNX Runtime | ours | of the roof | ONNX Runtime of the roof |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        speed = f"{row.macs / row.ours[0] / 1e9:.1f} GMAC/s" if row.macs else f"{row.bytes / row.ours[0] / 1e9:.1f} GB/s"
        cells = (
            row.kind, row.name, row.network, _microseconds(row.ours), _microseconds(row.onnxruntime), f"{row.ratio:.2f}",
            speed, f"{row.roof / row.ours[0]:.0%}", f"{row.roof / row.onnxruntime[0]:.0%}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> str:
    """A line a kind: the geometric mean of the ratios, the worst, and the share of the roof."""
    lines = ["| kind | rows | ours / ONNX Runtime, mean | worst | of the roof, mean |", "|---|---|---|---|---|"]
    for kind in dict.fromkeys(row.kind for row in rows):
        own = [row for row in rows if row.kind == kind]
        worst = max(own, key=lambda row: row.ratio)
        ratio, share = (math.exp(float(np.mean(np.log(values)))) for values in ([row.ratio for row in own], [row.roof / row.ours[0] for row in own]))
        lines.append(f"| {kind} | {len(own)} | {ratio:.2f} | {worst.ratio:.2f} ({worst.name}) | {share:.0%} |")
    return "\n".join(lines)


def _microseconds(times: tuple[float, float, float]) -> str:
    middle, low, high = (f"{1e6 * value:.3g}" if value < 1e-3 else f"{1e6 * value:.0f}" for value in times)
    return f"{middle} ({low} to {high})"


def draw(rows: Sequence[Row], most: peaks.Peaks, threads: int, path: Path) -> None:
    """The roofline: multiply-adds a byte against multiply-adds a second, ours and ONNX Runtime's joined by a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row.macs]
    kinds = list(dict.fromkeys(row.kind for row in rows))
    colours = dict(zip(kinds, pyplot.get_cmap("tab10").colors))  # type: ignore[attr-defined]
    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    most_intense = 2 * max(row.macs / row.bytes for row in rows)
    least_intense = 0.5 * min(row.macs / row.bytes for row in rows)
    across = np.geomspace(least_intense, most_intense, 200)
    for (size, speed), dashes in zip(most.levels, ("-", "--", "-.", ":")):
        roof = np.minimum(most.macs, across * speed) * threads / 1e9
        axes.plot(across, roof, dashes, color="0.55", linewidth=1, label=f"from {peaks.called(size)}, {speed * threads / 1e9:.0f} GB/s")
    for row in rows:
        at = row.macs / row.bytes
        ours, theirs = row.macs / row.ours[0] / 1e9, row.macs / row.onnxruntime[0] / 1e9
        axes.plot([at, at], [theirs, ours], color=colours[row.kind], linewidth=0.8, alpha=0.6)
        axes.plot(at, theirs, "o", color=colours[row.kind], markerfacecolor="white", markersize=5)
        axes.plot(at, ours, "o", color=colours[row.kind], markersize=6)
    for kind in kinds:
        axes.plot([], [], "o", color=colours[kind], label=kind)
    axes.plot([], [], "o", color="0.3", label="filled: ours")
    axes.plot([], [], "o", color="0.3", markerfacecolor="white", label="open: ONNX Runtime")
    axes.set(xscale="log", yscale="log", xlim=(least_intense, most_intense))
    axes.set_ylim(bottom=0.5 * min(row.macs / max(row.ours[0], row.onnxruntime[0]) for row in rows) / 1e9)
    axes.set_xlabel("multiply-adds a byte (activations and weights, each once)")
    axes.set_ylabel(f"G multiply-adds a second, {threads} thread{'s' if threads > 1 else ''}")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
    axes.grid(visible=True, which="major", color="0.9", linewidth=0.6)
    for ending in ("svg", "png"):
        figure.savefig(path.with_suffix(f".{ending}"), dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="Of timing, a row.")
    parser.add_argument("--only", default="", help="Kinds that have this in their name.")
    parser.add_argument("--output", type=Path, help="Folder for kernels.md, kernels.json, kernels.svg and kernels.png.")
    chosen = parser.parse_args()
    os.environ.update(TVM_NUM_THREADS=str(chosen.threads), TVM_BIND_THREADS="0")
    machine = machine_of(load_target("host"))
    folder = chosen.output or Path()
    folder.mkdir(parents=True, exist_ok=True)
    most = peaks.measure(machine)
    idle = overheads(machine, chosen.threads)
    speeds = ", ".join(f"{speed / 1e9:.0f} GB/s from {peaks.called(size)}" for size, speed in most.levels)
    said = [
        f"One thread's peak: {most.macs / 1e9:.0f} G multiply-adds/s; {speeds}.",
        f"Subtracted, µs a call: ours {1e6 * idle[0]:.2f} a kernel, ONNX Runtime {1e6 * idle[1]:.2f} a session. {chosen.threads} thread(s).",
    ]
    print(*said, sep="\n", flush=True)
    rows = []
    for case in cases():
        if chosen.only not in case.kind:
            continue
        row = measured(case, machine, most, chosen.threads, chosen.seconds, idle, folder)
        rows.append(row)
        text = f"{1e6 * row.ours[0]:9.1f} {1e6 * row.onnxruntime[0]:9.1f} µs {row.ratio:6.2f} {row.roof / row.ours[0]:5.0%} of the roof"
        print(f"{row.kind:20s} {row.name:44s} {text}  {' '.join(row.kernels)}  {row.error:.0e}", flush=True)
    print("", summary(rows), sep="\n")
    if chosen.output:
        (folder / "kernels.md").write_text("\n".join([*said, "", summary(rows), "", table(rows), ""]), encoding="utf-8")
        record = {"machine": machine.tuned_on, "threads": chosen.threads, "peaks": asdict(most), "idle": idle, "rows": [asdict(row) for row in rows]}
        (folder / "kernels.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if any(row.macs for row in rows):
            draw(rows, most, chosen.threads, folder / "kernels")


if __name__ == "__main__":
    main()
