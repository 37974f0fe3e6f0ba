"""What torch's tracers suggest when dynamic dimensions were asked for that a model does not allow."""

from __future__ import annotations

import re
from typing import Any

from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes


def narrowed(error: Exception, shapes: Any) -> Any:
    """Dynamic shapes with the ranges that the model demands; None when a dimension would have to be constant."""
    message = str(getattr(error, "msg", ""))
    _, found, fixes = message.partition("Suggested fixes:")
    if not found or re.search(r"^\s*\w+ = \d+\s*$", fixes, re.MULTILINE):
        return None
    try:
        return refine_dynamic_shapes_from_suggested_fixes(message, shapes)
    except Exception:  # a suggestion that torch itself cannot read: the first error says more
        return None
