"""A GPU's TF32, as training allows it, and what must not be computed in it."""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class ForbidTF32(TorchDispatchMode):
    """Raise where TF32 is allowed in a product of matrices in float32."""

    num_products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm"):
            self.num_products += 1
            is_double = result.dtype == torch.float64
            assert is_double or not torch.backends.cuda.matmul.allow_tf32, f"{func} in TF32"
        return result


@contextmanager
def products_in_float32():
    """Allow TF32, and raise where a product of matrices would be computed in it."""
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with ForbidTF32() as guard:
            yield guard
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
