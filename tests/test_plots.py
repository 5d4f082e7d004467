"""The theory's pictures: what they draw is checked against closed forms, and the rings against the real optimizer."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import SGD, Adam

from safe_lr.plots import stability_region, transition_spectrum
from safe_lr.preconditioners import known
from safe_lr.stability import UpdateRule, lr_limit
from tests.conftest import ROOT

pytest.importorskip("matplotlib")

GD, ADAM, HEAVY = UpdateRule(), UpdateRule(0.9, 1.0, 0.0), UpdateRule(0.9, 10.0, 0.0)
SCALES = np.array([0.01, 0.1, 0.5, 2.0, 100.0])


def lines(ax: Any) -> dict[str, np.ndarray]:
    return {line.get_label(): np.asarray(line.get_ydata()) for line in ax.lines}


def test_region_of_a_diagonal_hessian_is_equation_22() -> None:
    lam, p = [1.0, 4.0, 0.5], [1.0, 3.0, 0.2]
    drawn = lines(stability_region(GD, lam, p, scaled=1, scales=SCALES))
    expected = [min(2 * 1.0 / 1.0, 2 * s * 3.0 / 4.0, 2 * 0.2 / 0.5) for s in SCALES]
    assert drawn["limit of the update rule"] == pytest.approx(expected)
    assert "no momentum (Eq. 17)" not in drawn  # it is the same
    lemma1 = [2 * min(1.0, 3.0 * s, 0.2) / 4.0 for s in SCALES]
    assert drawn["Lemma 1"] == pytest.approx(lemma1)


def test_region_of_any_hessian_takes_the_eigenvalues_of_the_product() -> None:
    """Not lambda_i / p_i, which is right only where H and P commute; Lemma 1 is below all the same."""
    h, p = np.array([[2.0, 1.8], [1.8, 3.0]]), np.array([1.0, 1.0])
    drawn = lines(stability_region(ADAM, h, p, scales=SCALES))
    gamma = [np.linalg.eigvals(h / (p * [s, 1.0])[:, None]).real.max() for s in SCALES]
    assert drawn["limit of the update rule"] == pytest.approx(38 / np.array(gamma))
    assert drawn["no momentum (Eq. 17)"] == pytest.approx(2 / np.array(gamma))
    assert (drawn["Lemma 1"] <= drawn["no momentum (Eq. 17)"]).all()
    paired = [max(a / s, b) for s in SCALES for a, b in [np.linalg.eigvalsh(h)]]  # Eq. 13 with eigenvalues and entries
    assert max(abs(np.array(paired) / gamma - 1)) > 0.1


def test_region_with_decay_and_with_directions_that_curve_down() -> None:
    drawn = lines(stability_region(ADAM, [-1.0, 4.0], [1.0, 1.0], scales=SCALES, weight_decay=0.2))
    assert drawn["limit of the update rule"] == pytest.approx(np.full(5, 2 / (4 / 19 + 0.2)))


def test_measured_points_are_laid_over_and_inside_the_picture() -> None:
    ax = stability_region(GD, [1.0], [1.0], measured=[(0.1, 0.2), (1.0, 900.0)])
    assert lines(ax)["real optimizer, measured"].tolist() == [0.2, 900.0]
    assert ax.get_ylim()[1] > 900
    assert [text.get_text() for text in ax.get_legend().get_texts()][-1] == "real optimizer, measured"


@pytest.mark.parametrize(
    ("curvature", "p", "message"),
    [
        ([1.0, 2.0], [1.0], r"got \(2,\) and \(1,\)"),
        (np.ones((2, 3)), [1.0, 1.0], r"got \(2, 3\) and \(2,\)"),
        ([1.0], [0.0], r"positive; got \[0.0\]"),
        ([0.0, -1.0], [1.0, 1.0], "needs a positive eigenvalue"),
    ],
)
def test_what_cannot_be_drawn_is_named(curvature: Any, p: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stability_region(GD, curvature, p)


@pytest.mark.parametrize("rule", [GD, ADAM, HEAVY], ids=str)
def test_spectrum_is_inside_below_the_limit_and_outside_above(rule: UpdateRule) -> None:
    ax = transition_spectrum(rule, eigenvalue=3.0)
    radii = {str(line.get_label()): np.hypot(*line.get_data()) for line in ax.lines}
    assert radii["lr below the limit"].max() <= 1 + 1e-9
    outermost = radii["lr above it"].reshape(-1, 2).max(axis=1)
    assert (outermost > 1).all() and len(outermost) > 10
    ring = next(line for line in ax.lines if line.get_label() == "at the limit")
    assert np.asarray(ring.get_xdata()) == pytest.approx([-1.0])
    assert np.asarray(ring.get_ydata()) == pytest.approx([0.0])
    assert np.sort(ax.lines[3].get_xdata()) == pytest.approx([rule.decay, 1.0])  # where all begins


def test_spectrum_of_a_rule_that_has_no_limit_needs_lrs() -> None:
    nothing = UpdateRule(0.9, 0.0, 0.0)
    with pytest.raises(ValueError, match="the limit of this rule is inf"):
        transition_spectrum(nothing)
    ax = transition_spectrum(nothing, lrs=[0.0, 1.0, 2.0])
    assert ax.get_title() == "no lr is unstable"
    assert transition_spectrum(GD, eigenvalue=-1.0, lrs=[0.1]).get_title() == "every lr is unstable"


def test_pictures_can_be_saved(tmp_path: Any) -> None:
    for name, ax in (("region", stability_region(ADAM, [1.0, 4.0], [1.0, 1.0])), ("z", transition_spectrum(HEAVY))):
        ax.figure.savefig(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_theory_plots", ROOT / "docs" / "make_theory_plots.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("panel", range(4))
def test_rings_of_the_documentation_lie_on_the_limit(script: ModuleType, panel: int) -> None:
    """What the script measures at a scale that is not in the figure is safe_lr's limit to .1 %."""
    _, make, curvature, weight_decay = script.PANELS[panel]
    hessian = torch.tensor(curvature, dtype=torch.float64)
    hessian = torch.diag(hessian) if hessian.ndim == 1 else hessian
    p = torch.tensor([0.3, 1.0], dtype=torch.float64)
    actual = script.measured_boundary(make, hessian, p)
    gamma = float(torch.linalg.eigvals(hessian / p[:, None]).real.max())
    rule = GD if panel == 0 else ADAM
    assert actual == pytest.approx(float(lr_limit(rule, gamma, weight_decay)), rel=1e-3)


def test_committed_measurements_lie_on_the_limit() -> None:
    record = json.loads((ROOT / "docs" / "figures" / "stability_region.json").read_text())
    assert record["worst_relative_error"] < 1e-3
    assert len(record["panels"]) == 4


@pytest.mark.parametrize(
    ("make", "c"),
    [
        (lambda x, lr: SGD(x, lr), 2.0),
        (lambda x, lr: SGD(x, lr, momentum=0.9), 3.8),
        (lambda x, lr: Adam(x, lr, betas=(0.9, 1 - 1e-12), eps=0), 38.0),
    ],
    ids=["SGD", "heavy ball", "Adam"],
)
def test_script_measures_known_constants(script: ModuleType, make: Any, c: float) -> None:
    one = torch.ones(1, dtype=torch.float64)
    assert script.measured_boundary(make, one[:, None], one, (math.log10(c) - 0.5, math.log10(c) + 0.4)) == (
        pytest.approx(c, rel=1e-3)
    )


def theory_page() -> str:
    return (ROOT / "docs" / "theory.md").read_text()


def test_the_theory_page_names_tests_that_exist() -> None:
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", theory_page())
    assert len(named) > 20
    for path, name in named:
        assert f"\ndef {name}(" in (ROOT / path).read_text(), f"{path} has no {name}"
    assert theory_page().count("tests/") == len(named)  # and none is written otherwise


def test_the_theory_pages_table_has_every_optimizer_and_its_class() -> None:
    table = re.findall(r"^\| (\w+)[^|]*\| (exact|local scale|none)[^|]*\|", theory_page(), flags=re.MULTILINE)
    described = {name: kind if kind != "none" else "trial" for name, kind in table}
    refused = {"Rprop", "LBFGS"}
    shipped = {name: model.kind for name, model in known().items() if "safe_lr" in type(model).__module__}
    assert {name: kind for name, kind in described.items() if name not in refused} == shipped
    assert {name for name in vars(torch.optim) if isinstance(getattr(torch.optim, name), type)} - {"Optimizer"} <= set(
        described
    )
