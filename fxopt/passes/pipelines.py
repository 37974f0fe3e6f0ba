"""The order of the passes: order is the compiler."""

from __future__ import annotations

from collections.abc import Sequence

from fxopt.errors import InvalidOption
from fxopt.passes.avoid_slow_fusions import AvoidSlowFusions
from fxopt.passes.base import ExactPass, LossyPass
from fxopt.passes.eliminate_dead_code import EliminateDeadCode
from fxopt.passes.fold_batch_norm import FoldBatchNorm
from fxopt.passes.fold_constants import FoldConstants
from fxopt.passes.fold_linear_scale import FoldLinearScale
from fxopt.passes.fold_norm_scale import FoldNormScale
from fxopt.passes.fuse_attention_heads import FuseAttentionHeads
from fxopt.passes.merge_common_subexpressions import MergeCommonSubexpressions
from fxopt.passes.quantize_between import QuantizeBetween
from fxopt.passes.quantize_embedding import QuantizeEmbedding
from fxopt.passes.quantize_linear import QuantizeLinear
from fxopt.passes.remove_identities import RemoveIdentities


def exact_pipeline() -> list[ExactPass]:
    """What always runs, to a fix point."""
    return [
        RemoveIdentities(),
        FoldConstants(),
        FoldBatchNorm(),  # after constants: scales may be computed
        FoldNormScale(),
        MergeCommonSubexpressions(),
        EliminateDeadCode(),
    ]


def spelling_pipeline() -> list[ExactPass]:
    """What writes the graph as the backend likes it; after everything that recognises operators."""
    return [FuseAttentionHeads(), AvoidSlowFusions()]


def tidying_pipeline() -> list[ExactPass]:
    """What cleans up behind lossy passes; run once, before the result is verified and measured."""
    return [
        FoldNormScale(),  # factors that smoothing put behind norms
        FoldLinearScale(),  # and behind linears
        QuantizeBetween(),  # what is left in floats between 8-bit operators
    ]


def lossy_passes() -> list[LossyPass]:
    """What the planner may choose from, in the order of application."""
    return [
        QuantizeLinear(),
        QuantizeLinear(bits=4),  # where a linear waits for its weights
        QuantizeEmbedding(),
    ]


def stages(passes: Sequence[LossyPass]) -> list[list[LossyPass]]:
    """Lossy passes that are planned together, by turns: those that come after others see what these made."""
    names = {step.name for step in passes}
    found: list[list[LossyPass]] = []
    left = list(passes)
    while left:
        waiting = {step.name for step in left}
        ready = [step for step in left if not waiting.intersection(step.after) - {step.name}]
        if not ready:
            raise InvalidOption(f"the passes {sorted(names)} must each come after another one of them")
        found.append(ready)
        left = [step for step in left if step not in ready]
    return found
