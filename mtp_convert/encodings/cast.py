"""Change of element type on raw bytes, rounding as torch does."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mtp_convert.encodings.dtype import BY_TORCH_NAME, DType

Bytes = npt.NDArray[np.uint8]


def cast(raw: Bytes, dtype: DType, to: str) -> Bytes:
    """The same values as `to` (a torch dtype name); `raw` is contiguous."""
    if dtype.torch_name == to:
        return raw
    import torch

    values = torch.from_numpy(raw).view(dtype.torch()).to(BY_TORCH_NAME[to].torch())
    result: Bytes = values.view(torch.uint8).numpy()
    return result
