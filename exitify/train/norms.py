"""Statistics for the second sets of norms, measured before anyone judges them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from exitify.errors import DataError, PlanError
from exitify.passes.cost import device_of
from exitify.program import SKIP_NORMS, Program, in_mode


def reestimate_norms(program: Program, batches: Iterable[torch.Tensor | tuple[torch.Tensor, ...] | list[torch.Tensor]]) -> int:
    """Measure, in place, means and variances of the second BatchNorm sets with all skip paths left out.

    A second set starts as a copy of the trained one, whose statistics are those of the whole network. Everything else is
    as in `eval()` and stays as it is. Norms without statistics (LayerNorm and others) have nothing to measure.

    Args:
        program: With skip paths.
        batches: Inputs `(N, ...)`, or tuples that begin with them, prepared and augmented as for training; a few thousand
            samples do.

    Returns:
        How many samples were used.

    Raises:
        PlanError: the program has no skip paths, or norms of a `.pt2` that stay as in `eval()`. DataError: no sample was given, or a single one.
    """
    if not program.plan.skips:
        raise PlanError("the network has no skip paths, and so one set of norms", 'exitify.transform(model, example, skips="auto")')
    switched = {name for path in program.plan.skips for name in path.norms}
    if any(node.name in switched and node.op == "call_function" and "batch_norm" in str(node.target) for node in program.graph.nodes):
        raise PlanError("norms of an exported network cannot be measured: they are fixed in eval()", "transform the module itself, not its .pt2")
    second = program._modules.get(SKIP_NORMS)
    norms = [module for module in second.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)] if second is not None else []
    norms = [norm for norm in norms if norm.track_running_stats]
    device, samples = device_of(program), 0
    momenta = [norm.momentum for norm in norms]
    with in_mode(program, training=False), torch.no_grad():
        try:
            for batch in batches:
                x = batch if isinstance(batch, torch.Tensor) else batch[0]
                if not samples:
                    for norm in norms:
                        norm.reset_running_stats()
                for norm in norms:
                    norm.train()
                    # The mean over all samples so far, whatever the batches' sizes.
                    norm.momentum = len(x) / (samples + len(x))
                program(x.to(device), skip="all", all_exits=False)
                samples += len(x)
        finally:
            for norm, momentum in zip(norms, momenta):
                norm.momentum = momentum
    if samples < 2:
        raise DataError(f"norms cannot be measured on {samples} samples", "give some batches of training inputs")
    return samples
