"""Whether a matrix can be kept in a storage and a type without a number that is not finite."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lillama.base.finite import fits, is_finite
from lillama.lowrank import swap
from lillama.lowrank.storage import Factors, Storage, get_storage

MARGIN = 16  # numbers this far below the largest of the type are taken to stay below it, whatever the storage makes


def factors_fit(factors: Factors, storage: str, dtype: torch.dtype) -> bool:
    """Whether the matrix A B (or a stack of them) is finite once it is in `storage` and in `dtype`.

    Only where numbers come near the largest of the type are the tensors made to see.
    """
    A, B = factors
    if not is_finite(A, B):
        return False
    limit = torch.finfo(dtype).max / MARGIN
    rows, columns = (float(t.detach().norm(dim=dim).max()) for t, dim in ((A, -1), (B, -2)))
    if max(rows, columns, rows * columns) < limit:
        return True
    each = zip(A, B) if A.dim() == 3 else [(A, B)]
    return all(_fits_encoded(get_storage(storage), dtype, *both) for both in each)


def _fits_encoded(storage: Storage, dtype: torch.dtype, A: Tensor, B: Tensor) -> bool:
    tensors = storage.encode(A.float(), B.float())
    # As a module holds them, then as a checkpoint does.
    return all(fits(tensor, torch.float32) and fits(tensor, dtype) for tensor in tensors.values())


def rescaled(factors: Factors) -> Factors:
    """The same product to the last bit, each column of A about as large as its row of B, by powers of two."""
    A, B = factors
    a, b = A.abs().amax(-2).double(), B.abs().amax(-1).double()
    usable = (a > 0) & (b > 0)
    exponent = torch.where(usable, ((b / a.clamp_min(1e-300)).log2() / 2).round(), torch.zeros_like(a))
    scale = torch.exp2(exponent).to(A.dtype)
    return Factors(A * scale[..., None, :], B / scale[..., None])


def make_fit(root: nn.Module, name: str, kind: str, storage: str, dtype: torch.dtype) -> bool:
    """Whether the factors of the weight `name` below `root` fit, after they were rescaled where that helps."""
    factors = swap.factors(root, name, kind)
    if factors_fit(factors, storage, dtype):
        return True
    if not is_finite(*factors) or not factors_fit(better := rescaled(factors), storage, dtype):
        return False
    swap.set_factors(root, name, kind, *better)
    return True


def stored_fit(root: nn.Module, name: str, kind: str, dtype: torch.dtype) -> bool:
    """Whether the tensors of the weight `name` below `root`, as it is kept now, are finite in `dtype`."""
    return all(fits(tensor, dtype) for tensor in swap.held(root, name, kind).values())
