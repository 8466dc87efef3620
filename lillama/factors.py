"""Modules that hold low-rank factors in place of a dense weight.

`LowRankLinear` computes y = A (B x) + b with A (d_out x r) and B (r x d_in). `PivotedLinear` holds r
rows of the same rank-r matrix and the coefficients of the other rows in them: r^2 numbers fewer
(DESIGN 6; PIFA, arXiv 2501.19090). Both offer `weight`, which multiplies the factors back. Stacked experts are in
experts.py. The functions below tell the kinds of weights apart; nobody else needs to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lillama.contract import Weight
from lillama.errors import LillamaError
from lillama.experts import PROJECTIONS, LowRankExperts, dense_weight, is_fused, replaced_parameters


class LowRankLinear(nn.Module):
    """A linear map through `rank` dimensions. The bias stays on the output side."""

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.A = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.register_parameter("bias", nn.Parameter(self.A.new_empty(out_features)) if bias else None)

    @property
    def weight(self) -> Tensor:
        """A @ B (d_out x d_in). Some architectures read a projection's weight directly (DESIGN 9)."""
        return self.A @ self.B

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.B), self.A, self.bias)

    def set_factors(self, A: Tensor, B: Tensor) -> None:
        """Take over A (d_out x r) and B (r x d_in), cast to this module's dtype."""
        with torch.no_grad():
            self.A.copy_(A)
            self.B.copy_(B)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"


class _Permute(torch.autograd.Function):
    """x[..., order], whose gradient is a second gather: autograd's own would scatter, element by element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(-1, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(-1, inverse), None, None


class PivotedLinear(nn.Module):
    """A rank-r linear map kept as r of its rows (B) and the coefficients (C) of the others in them.

    `pivots` holds the row numbers of B's rows; the rows of C follow in rising order of the rest.
    """

    pivots: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.B = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.C = nn.Parameter(torch.empty(out_features - rank, rank, device=device, dtype=dtype))
        self.register_parameter("bias", nn.Parameter(self.B.new_empty(out_features)) if bias else None)
        self.register_buffer("pivots", torch.arange(rank, device=device))
        self._orders: tuple[Tensor, Tensor, Tensor] | None = None  # derived from pivots on first use

    def _order(self) -> tuple[Tensor, Tensor]:
        """(order, inverse): cat(pivot rows, others)[order] is the output in its own order."""
        if self._orders is None or self._orders[2] is not self.pivots:
            rest = torch.ones(self.out_features, dtype=torch.bool, device=self.pivots.device)
            rest[self.pivots] = False
            inverse = torch.cat([self.pivots, rest.nonzero().squeeze(1)])
            self._orders = (inverse.argsort(), inverse, self.pivots)
        return self._orders[:2]

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._orders = None  # the pivots were overwritten in place

    @property
    def weight(self) -> Tensor:
        """The matrix (d_out x d_in) itself."""
        return torch.cat([self.B, self.C @ self.B])[self._order()[0]]

    def forward(self, x: Tensor) -> Tensor:
        pivots = F.linear(x, self.B)
        y: Tensor = _Permute.apply(torch.cat([pivots, F.linear(pivots, self.C)], -1), *self._order())
        return y if self.bias is None else y + self.bias

    def set_factors(self, A: Tensor, B: Tensor) -> None:
        """Store A @ B, with pivot rows chosen by column-pivoted QR of A^T, in float64.

        The pivots are then well spread, which keeps the coefficients small enough for bfloat16.
        """
        import scipy.linalg

        r = self.rank
        A64, B64 = A.detach().double().cpu(), B.detach().double().cpu()
        _, R, order = scipy.linalg.qr(A64.T.numpy(), mode="economic", pivoting=True)
        diagonal = abs(R.diagonal())
        if diagonal.min() <= diagonal.max() * 1e-12:
            # A of deficient rank has no r independent rows; the least-norm coefficients still serve.
            coefficients = scipy.linalg.lstsq(R[:, :r], R[:, r:])[0].T
        else:
            coefficients = scipy.linalg.solve_triangular(R[:, :r], R[:, r:]).T
        pivots, rest = torch.from_numpy(order[:r].copy()).long(), torch.from_numpy(order[r:].copy())
        with torch.no_grad():
            self.pivots.copy_(pivots)
            self.B.copy_(A64[pivots] @ B64)
            self.C.copy_(torch.from_numpy(coefficients)[rest.argsort()])
        self._orders = None

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"


STORAGES: dict[tuple[str, str], type[nn.Module]] = {
    ("linear", "factors"): LowRankLinear,
    ("linear", "pivoted"): PivotedLinear,
    ("experts", "factors"): LowRankExperts,
}


def module_of(name: str, kind: str) -> str:
    """The module that is replaced for the weight `name`: a projection of experts is not one of its own."""
    return name.rpartition(".")[0] if kind == "experts" else name


def dense(root: nn.Module, name: str, kind: str) -> Tensor:
    """The dense weight `name` below `root`: d_out x d_in, or copies x d_out x d_in for experts."""
    module = root.get_submodule(module_of(name, kind))
    if kind == "experts":
        return dense_weight(module, name.rpartition(".")[2])
    return cast(nn.Linear, module).weight.detach()


def leaving(root: nn.Module, weights: Sequence[tuple[str, str]]) -> list[nn.Parameter]:
    """The dense parameters below `root` of which nothing is left when `weights` (name, kind) are replaced."""
    names = [f"{name}.weight" for name, kind in weights if kind != "experts"]
    for owner in {module_of(name, kind) for name, kind in weights if kind == "experts"}:
        projections = [n.rpartition(".")[2] for n, kind in weights if module_of(n, kind) == owner and kind == "experts"]
        names += [f"{owner}.{parameter}" for parameter in replaced_parameters(projections)]
    return [root.get_parameter(name) for name in names]


def replace(root: nn.Module, name: str, *, kind: str, storage: str, rank: int, device: Any = None) -> nn.Module:
    """Put an empty factor module of the same shape, bias and dtype in place of `root.name`.

    `device` is that of the factors (default: the old weight's). Returns the new module; the old bias is carried over
    (shared, not copied). Of a module of experts, one projection is replaced per call. Raises LillamaError when the
    module is not of the kind the plan says.
    """
    where = module_of(name, kind)
    old = root.get_submodule(where)
    if (kind, storage) not in STORAGES:
        raise LillamaError(f"no '{storage}' storage exists for a weight of kind '{kind}'", where=name)
    parent, _, child = where.rpartition(".")
    if kind == "experts":
        projection = name.rpartition(".")[2]
        if not isinstance(old, LowRankExperts):
            if not is_fused(old) or projection not in PROJECTIONS:
                raise LillamaError(f"the plan has {kind} here, the model a {type(old).__name__}", where=name)
            old = LowRankExperts(old).train(old.training)
            setattr(root.get_submodule(parent), child, old)
        old.factorise(projection, rank, device)
        return old
    if not isinstance(old, nn.Linear):
        raise LillamaError(f"the plan has a {kind} here, the model a {type(old).__name__}", where=name)
    new = STORAGES[kind, storage](
        old.in_features, old.out_features, rank, old.bias is not None, device or old.weight.device, old.weight.dtype
    )
    new.bias = old.bias
    setattr(root.get_submodule(parent), child, new)
    return new.train(old.training)


def set_factors(root: nn.Module, name: str, kind: str, A: Tensor, B: Tensor) -> None:
    """Give the replaced weight `name` below `root` the factors A and B."""
    module: Any = root.get_submodule(module_of(name, kind))
    if kind == "experts":
        module.set_factors(name.rpartition(".")[2], A, B)
    else:
        module.set_factors(A, B)


def is_factorised(module: nn.Module) -> bool:
    """Whether `module` is one of ours."""
    return isinstance(module, tuple(STORAGES.values()))


def kind_of(module: nn.Module) -> str | None:
    """The kind of weight that `module` holds factors of; None: it is not one of ours."""
    return next((kind for (kind, _), cls in STORAGES.items() if isinstance(module, cls)), None)


def is_factor(root: nn.Module, name: str) -> bool:
    """Whether the parameter `name` below `root` is a factor: not a bias, and no projection that stays dense."""
    owner, _, leaf = name.rpartition(".")
    return is_factorised(root.get_submodule(owner)) and leaf.rpartition("_")[2] in ("A", "B", "C")


def markers(module_name: str, kind: str) -> dict[str, Tensor]:
    """The tensor stored beside the factors of a module under a name of the dense module's.

    Without lillama imported, transformers would fill dense weights with random numbers and only warn; the wrong
    shape of this tensor makes it fail instead. That of experts has three dimensions, so that the fused parameter it
    stands for can still be split as the hub's format splits it.
    """
    if kind == "experts":
        return {f"{module_name}.down_proj": torch.empty(1, 0, 0)}
    return {f"{module_name}.weight": torch.empty(0)}


def dense_names(name: str, kind: str) -> list[str]:
    """Parameters that the model loses when the weight `name` is replaced; a checkpoint's are to be ignored."""
    module = module_of(name, kind)
    return [f"{module}.gate_up_proj", f"{module}.down_proj"] if kind == "experts" else [f"{module}.weight"]


def check_storage(weights: Iterable[Weight], storage: str) -> None:
    """LillamaError unless every weight can be kept in `storage`."""
    for weight in weights:
        if (weight.kind, storage) not in STORAGES:
            known = sorted(s for kind, s in STORAGES if kind == weight.kind)
            raise LillamaError(
                f"'{weight.name}' ({weight.kind}) cannot be kept in {storage} storage",
                where="compress.storage",
                hint=f"Use {' or '.join(known)}, or list it under compress.skip." if known else None,
            )


def to_dense(module: Any) -> nn.Module:
    """The dense module that computes what a factor module computes."""
    return module.to_dense() if isinstance(module, LowRankExperts) else to_linear(module)


def to_linear(module: Any) -> nn.Linear:
    """The dense `nn.Linear` that computes what a factor module computes."""
    weight = module.weight.detach()
    linear = nn.Linear(
        module.in_features, module.out_features, module.bias is not None, device="meta", dtype=weight.dtype
    )
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = module.bias
    return linear


def store_as(root: nn.Module, name: str, kind: str, storage: str) -> None:
    """Keep the replaced weight `name` below `root`, which holds two factors, in another storage."""
    if storage == "factors":
        return
    parent, _, child = name.rpartition(".")
    module = cast(LowRankLinear, root.get_submodule(name))
    new = STORAGES[kind, storage](
        module.in_features, module.out_features, module.rank, module.bias is not None,
        module.A.device, module.A.dtype,
    )  # fmt: skip
    new.set_factors(module.A, module.B)  # type: ignore[operator]
    new.bias = module.bias  # type: ignore[assignment]
    setattr(root.get_submodule(parent), child, new)
