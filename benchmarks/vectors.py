"""Three choices behind the eigensolver, each beside what was not taken.

    python -m benchmarks.vectors --json docs/results/vectors.json [--quick]

layout      A Krylov vector as one flat tensor, into whose slices a product's parts are written, or as a list of
            tensors (`torch._foreach_*`; dots tensor by tensor, added up on the device): the vector arithmetic of a
            solve of four products, with a diagonal P. Milliseconds of processor time, medians, in turns.
several     Products to the k largest eigenvalues at a residual of 1e-3: one vector at a time with a search orthogonal
            to what was found (`safe_lr.lanczos.several`), or a block of k vectors (block Lanczos, fully
            reorthogonalised, stopped by the same residuals as soon as they hold, and never checked for what it missed).
start       Products and error of a cold measurement at the scheduler's tolerance from the gradient, from the momentum
            and from the difference of the two, each with a random vector of equal norm.

The last two measure the MLP of `benchmarks/networks.py`, young (3 updates) and trained, plain and as Adam sees it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.curvature import TOL, truth
from benchmarks.networks import TASKS, Point
from benchmarks.results import command_line, markdown, save
from safe_lr.closures import leave_no_trace
from safe_lr.deflation import several
from safe_lr.eigenproblem import COLD_MATVECS, COLD_SETTLED
from safe_lr.lanczos import Matvec, lanczos, start_vector
from safe_lr.operators import exact_hessian
from safe_lr.preconditioners import Adam

PRODUCTS = 4  # of a cold solve
RANKS = (2, 4, 8)
TO = 1e-3


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """One vector of them all."""
    return torch.cat([t.reshape(-1) for t in tensors])


def solve_flat(made: Sequence[Tensor], roots: Sequence[Tensor]) -> None:
    """The arithmetic beside the products, `made` being what each of them returns."""
    sizes = [t.numel() for t in made]
    basis = [torch.ones(sum(sizes)).div_(sum(sizes) ** 0.5)]
    for _ in range(PRODUCTS):
        parts = [p.view(r.shape) * r for p, r in zip(basis[-1].split(sizes), roots, strict=True)]
        del parts
        w = torch.empty_like(basis[0])
        for piece, h, r in zip(w.split(sizes), made, roots, strict=True):
            piece.view(h.shape).copy_(h * r)
        alpha = torch.dot(w, basis[-1])
        for q in basis * 2:
            w.addcmul_(q, torch.dot(q, w), value=-1)
        _, b = torch.stack([alpha, torch.linalg.vector_norm(w)]).tolist()
        basis.append(w.div_(b))


def solve_lists(made: Sequence[Tensor], roots: Sequence[Tensor]) -> None:
    """The same on lists."""

    def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        return torch.stack([torch.dot(x.view(-1), y.view(-1)) for x, y in zip(a, b, strict=True)]).sum()

    size = sum(t.numel() for t in made)
    basis = [torch._foreach_div([torch.ones_like(t) for t in made], size**0.5)]
    for _ in range(PRODUCTS):
        parts = torch._foreach_mul(basis[-1], roots)
        del parts
        w = torch._foreach_mul(made, roots)
        alpha = dot(w, basis[-1])
        for q in basis * 2:
            torch._foreach_sub_(w, torch._foreach_mul(q, dot(q, w)))
        _, b = torch.stack([alpha, torch.stack(torch._foreach_norm(w)).norm()]).tolist()
        torch._foreach_div_(w, b)
        basis.append(w)


def layouts(quick: bool) -> list[dict[str, Any]]:
    """Milliseconds of either layout, by network."""
    shapes = {name: [p.shape for p in make(quick).point.params] for name, make in TASKS.items()}
    shapes["300 tensors"] = [torch.Size(s) for _ in range(150) for s in ((64, 64), (64,))]
    if not quick:
        shapes["20 M in 8 tensors"] = [torch.Size(s) for _ in range(4) for s in ((2236, 2236), (2236,))]
    rows = []
    for name, listed in shapes.items():
        made, roots = [torch.randn(s) for s in listed], [torch.rand(s) + 0.5 for s in listed]
        taken: dict[str, list[float]] = {"flat": [], "lists": []}
        for _ in range(3 if quick else 5):
            for label, solve in (("flat", solve_flat), ("lists", solve_lists)):
                started = time.process_time()
                solve(made, roots)
                taken[label].append(1e3 * (time.process_time() - started))
        rows.append({"network": name, "tensors": len(listed), "parameters": sum(t.numel() for t in made)})
        rows[-1] |= {label: statistics.median(values) for label, values in taken.items()}
    return rows


def block(matvec: Matvec, v0: Tensor, k: int, *, most: int = 400) -> tuple[Tensor, int]:
    """The k largest eigenvalues by block Lanczos, rising, and the products until their residuals hold."""
    generator = torch.Generator().manual_seed(0)
    new = torch.cat([v0[:, None], torch.randn(len(v0), k - 1, generator=generator, dtype=v0.dtype)], 1)
    basis = images = v0.new_zeros(len(v0), 0)
    while True:
        for _ in range(2):
            new = torch.linalg.qr(new - basis @ (basis.T @ new))[0]
        basis = torch.cat([basis, new], 1)
        images = torch.cat([images, torch.stack([matvec(v) for v in new.T], 1)], 1)
        values, vectors = torch.linalg.eigh((basis.T @ images + images.T @ basis) / 2)
        values, vectors = values[-k:], vectors[:, -k:]
        residuals = torch.linalg.vector_norm(images @ vectors - (basis @ vectors) * values, dim=0)
        if (residuals <= TO * values.abs()).all() or basis.shape[1] >= most:
            return values, basis.shape[1]
        new = images[:, -k:]


def operators(points: dict[str, Point]) -> Iterator[tuple[str, Point, bool, Matvec, dict[str, Tensor]]]:
    """Each point's Hessian as a matvec, plain and preconditioned, with the directions that are free there."""
    for at, point in points.items():
        params, adam = point.params, Adam()
        with leave_no_trace(params) as untouched:
            untouched.differentiate_twice()
            curvature = exact_hessian(untouched.call(point.loss), params)
            states = [point.optimizer.state[p] for p in params]
            group = point.optimizer.param_groups[0]
            p = flat([adam.diagonal(group, s, g) for s, g in zip(states, curvature.gradient, strict=True)])
            gradient, momentum = flat(curvature.gradient), flat([s["exp_avg"] for s in states])
            sizes = [x.numel() for x in params]
            for preconditioned in (False, True):
                root = p.rsqrt() if preconditioned else torch.ones_like(p)

                def matvec(v: Tensor, root: Tensor = root, product: Any = curvature.product) -> Tensor:
                    parts = zip((root * v).split(sizes), params, strict=True)  # noqa: B023  (used at once)
                    return root * flat(product([part.view(x.shape) for part, x in parts]))

                starts = {"gradient": gradient, "momentum": momentum, "difference": gradient - momentum}
                yield at, point, preconditioned, matvec, {n: root * v for n, v in starts.items()}


def solves(quick: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of `several` and of `start`."""
    torch.manual_seed(0)
    task = TASKS["mlp"](quick)
    points = {}
    for at, updates in (("young", 3), ("trained", task.steps)):
        task.train(updates)
        points[at] = task.point.copy()
    ranks: list[dict[str, Any]] = []
    starts: list[dict[str, Any]] = []
    for at, point, preconditioned, matvec, directions in operators(points):
        where = {"at": at, "preconditioned": preconditioned}
        right = truth(point, preconditioned)
        for name, direction in directions.items():
            cases = []
            for seed in range(2 if quick else 5):
                v0 = start_vector(direction, seed, direction)
                found = lanczos(matvec, v0, tol=TOL, min_matvecs=COLD_MATVECS, settled=COLD_SETTLED)
                cases.append((found.num_matvecs, abs(found.value / right - 1), found.upper >= right))
            products, errors, above = zip(*cases, strict=True)
            mean = statistics.mean(products)
            starts.append({**where, "start": name, "products": mean, "worst_error": max(errors), "above": sum(above)})
        v0 = start_vector(directions["gradient"], 0, directions["gradient"])
        for k in RANKS[:1] if quick else RANKS:
            found_k = several(matvec, v0, k, tol=TO)
            ranks.append({**where, "k": k, "one by one": found_k[0].num_matvecs, "block": block(matvec, v0, k)[1]})
    return ranks, starts


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    cells = [[f"{x:.3g}" if isinstance(x, float) else f"{x}" for x in row.values()] for row in rows]
    return markdown(list(rows[0]), cells)


def main() -> None:
    """Measures, prints and saves."""
    args = command_line(__doc__.splitlines()[0], "tiny networks").parse_args()
    torch.set_num_threads(1)
    ranks, starts = solves(args.quick)
    result = {"torch": torch.__version__, "quick": args.quick}
    result |= {"several": ranks, "start": starts, "layout": layouts(args.quick)}
    save(result, args.json)
    print(*(table(result[name]) for name in ("layout", "several", "start")), sep="\n\n")


if __name__ == "__main__":
    main()
