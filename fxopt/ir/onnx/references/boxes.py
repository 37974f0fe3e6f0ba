"""NonMaxSuppression: boxes that do not overlap a better one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxopt.ir.onnx.foreign import Array, host_data
from fxopt.ir.onnx.lane import to_scalar
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()


def corners(boxes: Array, center_point_box: int) -> tuple[Array, Array]:
    """The lower and upper corners [N, 2] of boxes [N, 4], given as two corners or as centre and size."""
    if center_point_box:
        half = boxes[:, 2:] / 2
        return boxes[:, :2] - half, boxes[:, :2] + half
    return np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])


def overlaps(one: int, others: Array, low: Array, high: Array) -> Array:
    """Intersection over union of one box with others; 0 where an area is."""
    sides = np.minimum(high[one], high[others]) - np.maximum(low[one], low[others])
    common = np.where((sides > 0).all(-1), sides.prod(-1), 0)
    area, areas = (high[one] - low[one]).prod(), (high[others] - low[others]).prod(-1)
    union = area + areas - common
    valid = (common > 0) & (area > 0) & (areas > 0) & (union > 0)
    result: Array = np.where(valid, common / np.where(valid, union, 1), 0)
    return result


def select(scores: Array, low: Array, high: Array, most: int, iou_limit: Any, score_limit: Any) -> list[int]:
    """The boxes that stay, best first; of equal scores the first box."""
    order = np.argsort(-scores, kind="stable")
    if score_limit is not None:
        order = order[scores[order] > score_limit]
    kept: list[int] = []
    while order.size and len(kept) < most:
        best, order = int(order[0]), order[1:]
        kept.append(best)
        order = order[overlaps(best, order, low, high) <= iou_limit]
    return kept


@operators.reference("NonMaxSuppression", raw=True)
def non_max_suppression(
    call: Call,
    boxes: Any,
    scores: Any,
    max_output_boxes_per_class: Any = None,
    iou_threshold: Any = None,
    score_threshold: Any = None,
    center_point_box: int = 0,
) -> Tensor:
    """(batch, class, box) of every box that stays, [selected, 3], for boxes [B, N, 4] and scores [B, C, N]."""
    all_boxes, all_scores = host_data(boxes), host_data(scores)
    most = 0 if max_output_boxes_per_class is None else int(to_scalar(host_data(max_output_boxes_per_class)))
    iou = all_boxes.dtype.type(0 if iou_threshold is None else to_scalar(host_data(iou_threshold)))
    limit = None if score_threshold is None else all_scores.dtype.type(to_scalar(host_data(score_threshold)))
    selected: list[tuple[int, int, int]] = []
    for batch, (batch_boxes, batch_scores) in enumerate(zip(all_boxes, all_scores, strict=True)):
        low, high = corners(batch_boxes, center_point_box)
        for label, class_scores in enumerate(batch_scores):
            selected += [(batch, label, box) for box in select(class_scores, low, high, most, iou, limit)]
    device = boxes.device if isinstance(boxes, Tensor) else None
    return torch.tensor(selected, dtype=torch.int64, device=device).reshape(-1, 3)
