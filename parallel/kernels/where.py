"""Where kernels run: on CUDA, and on the CPU under Triton's interpreter (`TRITON_INTERPRET=1`).

Every kernel of this folder stands behind a function that takes the plain version (plain.py) elsewhere.
Block sizes are fixed, chosen for an H100: the interpreter cannot tune, and a run should not.
"""

import triton
from torch import Tensor


def by_kernel(tensor: Tensor) -> bool:
    """Whether a kernel can run on this tensor."""
    return tensor.is_cuda or triton.knobs.runtime.interpret


def block(size: int, most: int, least: int = 1) -> int:
    """The power of two that covers `size`, between two bounds."""
    return max(least, min(most, triton.next_power_of_2(size)))
