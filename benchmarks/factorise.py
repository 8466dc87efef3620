"""Ways to the rank-r factors of one matrix: seconds, and the error against the best.

    python benchmarks/factorise.py                          # 14336 x 4096, rank 1024: one expert of Mixtral-8x7B
    python benchmarks/factorise.py --shape 3584 1024 --rank 256 --spectrum power

The error is ||W - A B|| / ||W - W_r|| - 1 for the best rank-r W_r, its norm from the float64 eigenvalues. A random
matrix (`flat`) has no gap in its spectrum, the hardest case for the randomised ones; `power` falls as 1/sqrt(i).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]


def exact(W: Tensor, rank: int, dtype: torch.dtype) -> Factors:
    U, S, Vh = torch.linalg.svd(W.to(dtype), full_matrices=False)
    return U[:, :rank] * S[:rank], Vh[:rank]


def gram(W: Tensor, rank: int, dtype: torch.dtype) -> Factors:
    """What `lillama.factorise.initialisers.svd` does."""
    W = W.to(dtype)
    if len(W) <= W.shape[1]:
        U = torch.linalg.eigh(W @ W.T)[1].flip(1)[:, :rank]
        return U, U.T @ W
    V = torch.linalg.eigh(W.T @ W)[1].flip(1)[:, :rank]
    return W @ V, V.T


def randomised(W: Tensor, rank: int, powers: int, extra: int = 64) -> Factors:
    """A range finder with power iterations (Halko, Martinsson, Tropp 2011, algorithm 4.4), float32."""
    W = W.float()
    wide = len(W) < W.shape[1]
    M = W.T if wide else W
    Q = torch.linalg.qr(M @ torch.randn(M.shape[1], rank + extra, device=W.device))[0]
    for _ in range(powers):
        Q = torch.linalg.qr(M.T @ Q)[0]
        Q = torch.linalg.qr(M @ Q)[0]
    small = Q.T @ M
    _, vectors = torch.linalg.eigh((small @ small.T).double())
    U = Q @ vectors.flip(1)[:, :rank].float()
    A, B = U, U.T @ M
    return (B.T, A.T) if wide else (A, B)


def lowrank(W: Tensor, rank: int) -> Factors:
    U, S, V = torch.svd_lowrank(W.float(), q=rank, niter=2)
    return U * S, V.T


def matrix(shape: list[int], spectrum: str, device: str) -> Tensor:
    W = torch.randn(*shape, device=device)
    if spectrum == "power":  # falling column scales, turned: singular values near 1/sqrt(i)
        scales = torch.arange(1, shape[1] + 1, device=device).rsqrt()
        W = (W * scales) @ torch.linalg.qr(torch.randn(shape[1], shape[1], device=device))[0]
    return W


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=[14336, 4096])
    parser.add_argument("--rank", type=int, default=1024)
    parser.add_argument("--spectrum", choices=["flat", "power"], default="flat")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--skip", nargs="*", default=[], help="rows to leave out, by the start of their names")
    options = parser.parse_args()
    torch.manual_seed(0)
    W, rank = matrix(options.shape, options.spectrum, options.device), options.rank
    small = W.double() if options.shape[0] <= options.shape[1] else W.double().T
    total = float(W.double().square().sum())
    best = float(torch.linalg.eigvalsh(small @ small.T).flip(0)[rank:].sum())
    del small
    ways: dict[str, Callable[[], Factors]] = {
        "eigh of the Gram, float64": lambda: gram(W, rank, torch.float64),
        "eigh of the Gram, float32": lambda: gram(W, rank, torch.float32),
        "randomised, 1 power iteration": lambda: randomised(W, rank, 1),
        "randomised, 2 power iterations": lambda: randomised(W, rank, 2),
        "torch.svd_lowrank, niter 2": lambda: lowrank(W, rank),
        "svd, float32": lambda: exact(W, rank, torch.float32),
        "svd, float64": lambda: exact(W, rank, torch.float64),
    }
    shape = " x ".join(map(str, options.shape))
    print(f"{shape}, rank {rank}, {options.spectrum} spectrum, {options.device}, {torch.get_num_threads()} threads")
    print(f"lost by the best rank-{rank} matrix: {(best / total) ** 0.5:.4f} of the norm")
    print(f"{'':32}{'seconds':>9}{'error over the best':>22}")
    for name, way in ways.items():
        if any(name.startswith(skip) for skip in options.skip):
            continue
        start = time.perf_counter()
        A, B = way()
        float(A[0, 0])  # waits for the device
        seconds = time.perf_counter() - start
        error = float((W.double() - A.double() @ B.double()).square().sum())
        print(f"{name:32}{seconds:9.1f}{(error / best) ** 0.5 - 1:22.2e}", flush=True)


if __name__ == "__main__":
    main()
