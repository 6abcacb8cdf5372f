"""JSON that every parser reads: Python's own writes NaN and Infinity, which JSON does not have."""

import json
import math
from typing import Any


def dumps(value: Any, indent: int | None = None) -> str:
    """JSON of a value, with null in place of every number that is not finite and text of what JSON has no form for."""
    return json.dumps(_finite(value), indent=indent, default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
