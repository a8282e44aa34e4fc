"""jaxtyping's array types for the modules that also work without PyTorch and without jaxtyping.

Annotations are never evaluated there; only type checkers need the real types: mypy, and the tests, which import
jaxtyping before anything of the package. Elsewhere they are plain arrays.
"""

import sys
from typing import TYPE_CHECKING, Any

import numpy as np

__all__ = ["Bool", "Float32", "Float64", "Int32", "Int64", "Integer", "UInt", "UInt8", "UInt16"]

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Bool, Float32, Float64, Int32, Int64, Integer, UInt, UInt8, UInt16
else:

    class _Array:
        def __class_getitem__(cls, array_and_shape: Any) -> type[np.ndarray]:
            return np.ndarray

    Bool = Float32 = Float64 = Int32 = Int64 = Integer = UInt = UInt8 = UInt16 = _Array
