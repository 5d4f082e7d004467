"""How to measure: the settings, checked when made, and what each way of making products costs."""

from __future__ import annotations

from dataclasses import dataclass

from safe_lr.eigenproblem import BOUNDS, MIN_MATVECS
from safe_lr.operators import CURVATURES, DIFFERENCES

HVPS = ("auto", "exact", "lean", *DIFFERENCES)

# In gradient evaluations, medians of four networks from an MLP to a 5 M transformer (docs/performance.md).
COST_OF_GRAPH = 1.0
COST_OF_PRODUCT = 2.0
COST_OF_LEAN_PRODUCT = 3.0
COST_OF_ONE_SIDED_PRODUCT = 1.0
COST_OF_LOSS = 1 / 2  # with what makes the step and puts everything back; a bare forward pass takes .35-.45


@dataclass(frozen=True)
class Settings:
    """How to measure. Checked when made.

    Attributes:
        bound: `lemma1` (2 p_min / lambda_max, Eq. 20-21), `coherence` (2 / gamma, Eq. 17) or `momentum` (c / gamma,
            Sec. 3.9).
        curvature: `hessian`, `gauss-newton`, `fisher` (labels sampled from the model) or `empirical-fisher`.
        hvp: `exact` (double backward on one retained graph), `lean` (the graph built anew for each product),
            `finite-difference` (central, two gradients a product), `one-sided` (one gradient a product), or `auto`:
            one-sided where `tol` is a hundredth or more, the loss's graph is smooth (torch's own operations, no
            autocast, all of it computed in the closure; kinks of ReLU, max-pooling and their like are taken out first)
            and they are cheaper (300,000 numbers in the graph, a gradient of some two milliseconds on one core; or an
            LSTM whose kernel is fused, as on the CPU: its second derivative takes 4-7 gradients a product); else
            exact, lean where memory runs out, central differences where nothing else works. Where differences fail
            their check, products are exact after all, and stay so in a run. Exact products check the first measurement
            of a run and every fourth that the budget allows: take `exact` where a term that the closure detaches comes
            in later.
        tol: Relative residual at which the eigen-solver stops.
        max_matvecs: Largest number of products for one measurement.
        max_basis: Largest number of Krylov vectors kept at a time; None keeps all (one a product).
        cautious: Whether the limits come from `value + residual` (the scheduler) or from the value itself.
        smallest: Whether H's smallest eigenvalue is found too, from the Krylov space of its largest.

    Raises:
        ValueError: A choice that does not exist (the message lists the choices), or a number out of range.
    """

    bound: str = "momentum"
    curvature: str = "hessian"
    hvp: str = "auto"
    tol: float = 1e-3
    max_matvecs: int = 500
    max_basis: int | None = None
    cautious: bool = False
    smallest: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("bound", BOUNDS), ("curvature", CURVATURES), ("hvp", HVPS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {getattr(self, name)!r}")
        if not isinstance(self.tol, (int, float)):
            raise TypeError(f"tol must be a number in (0, 1), got {self.tol!r}")
        if not 0 < self.tol < 1:
            raise ValueError(f"tol must lie in (0, 1), got {self.tol!r}")
        if not isinstance(self.max_matvecs, int):
            raise TypeError(f"max_matvecs must be an integer, got {self.max_matvecs!r}")
        if self.curvature != "hessian" and self.hvp in DIFFERENCES:
            raise ValueError(f"hvp={self.hvp!r} is for curvature='hessian', got curvature={self.curvature!r}")
        if self.max_basis is not None and (not isinstance(self.max_basis, int) or self.max_basis < 2):
            raise ValueError(f"max_basis must be an integer of at least 2 (vectors), or None; got {self.max_basis!r}")
        if self.smallest and self.max_basis == 2:
            raise ValueError("smallest=True needs a max_basis of at least 3, for a restart keeps both ends; got 2")
        if self.max_matvecs < self.least_matvecs:
            raise ValueError(
                f"max_matvecs must be at least {self.least_matvecs} under bound={self.bound!r}, for fewer products "
                f"tell no eigenvalue; got {self.max_matvecs!r}"
            )

    @property
    def least_cost(self) -> float:
        """Gradient evaluations of the cheapest measurement: a graph, the least products, a trial step.

        Lemma 1 needs lambda_max beside gamma.
        """
        product = COST_OF_ONE_SIDED_PRODUCT if self.hvp == "one-sided" else COST_OF_PRODUCT
        return COST_OF_GRAPH + product * self.least_matvecs + COST_OF_LOSS

    @property
    def least_matvecs(self) -> int:
        """Fewest products that tell what the bound needs, the check of a difference included."""
        return least_matvecs(self.bound, self.hvp)


def least_matvecs(bound: str, hvp: str) -> int:
    """Returns the fewest products that tell what a bound needs: differences are checked with one more per eigenvalue.

    Example:
        >>> least_matvecs("momentum", "exact"), least_matvecs("lemma1", "one-sided")
        (3, 8)
    """
    return (MIN_MATVECS + (hvp in DIFFERENCES)) * (1 + (bound == "lemma1"))
