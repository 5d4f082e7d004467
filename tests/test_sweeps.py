"""Sweeps: configs against W&B's own judgement, ceilings against tasks whose answer is known, searches that repeat."""

from __future__ import annotations

import importlib.util
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from safe_lr import CoherenceScheduler
from safe_lr.sweeps import (
    Trial,
    arguments,
    best,
    clip_to_stable,
    command_line,
    dump_config,
    load_config,
    load_function,
    program_of,
    prune,
    search,
    stable_ceiling,
    sweep_config,
    unsafe,
    violations,
)
from safe_lr.sweeps.spaces import LOCAL, Interval, space

ENGINES = [
    pytest.param(name, marks=pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is missing"))
    for name in ("sweeps", "optuna")
] + ["built-in"]

FINE: dict[str, Any] = {
    "method": "random",
    "metric": {"name": "val_loss", "goal": "minimize"},
    "parameters": {"lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1.0}, "n": {"values": [1, 2]}},
}


# ---- configs


def test_the_default_sweeps_what_has_no_unit() -> None:
    config = sweep_config(program="train.py", runs=12)
    assert set(config["parameters"]) == {"safe_lr.margin", "safe_lr.follow_limit"}
    assert config["parameters"]["safe_lr.follow_limit"] == {"value": True}
    margin = config["parameters"]["safe_lr.margin"]
    assert isinstance(margin["min"], float) and isinstance(margin["max"], float)
    assert margin["max"] == 1.0
    assert config["command"][-1] == "${args_no_boolean_flags}"
    assert config["run_cap"] == 12
    scheduler = CoherenceScheduler(sgd(nn.Linear(1, 1)), loggers=None, **arguments({"safe_lr.margin": margin["max"]}))
    scheduler.close()


def test_a_range_has_floats_on_both_sides() -> None:
    config = sweep_config(lr=(1e-3, 1), beta1=(0, 0.95), method="random")
    for name in ("lr", "beta1"):
        assert all(type(config["parameters"][name][side]) is float for side in ("min", "max"))
    assert config["parameters"]["lr"]["distribution"] == "log_uniform_values"
    assert config["parameters"]["beta1"]["distribution"] == "uniform"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": (1.0, 0.1)}, "parameters.lr: min 1.0 is not below max 0.1"),
        ({"lr": (0.0, 0.1)}, "needs a range above 0"),
        ({"lr": (0.1, 0.2, 0.3)}, "pair of numbers"),
        ({"lr": (0.1, 1.0), "follow_limit": True}, "lr has no effect with follow_limit=True"),
        ({"lr": (0.1, 1.0), "method": "grid"}, "a grid cannot go over a range of floats"),
        ({"bound": []}, "parameters.safe_lr.bound: values are"),
        ({"method": "annealing"}, "method: 'annealing' is not one of"),
        ({"goal": "min"}, "metric.goal: 'min'"),
        ({"runs": 0}, "run_cap: 0"),
        ({"metric": ""}, "metric: {'name': '', 'goal': 'minimize'} has no name"),
        ({"lr": [0.1, -0.1]}, "parameters.lr: [0.1, -0.1] needs a range above 0"),
        ({"beta1": [0.9, 1.5]}, "parameters.beta1: [0.9, 1.5] is not inside [0, 1)"),
        ({"beta2": (0.9, 1)}, "parameters.beta2: (0.9, 1) is not inside [0, 1)"),
        ({"method": "grid"}, "there is nothing to sweep: give lists, margin=[0.1, 0.3]"),
        ({"margin": (0.1, 2.0)}, "parameters.safe_lr.margin: margin must be a number in (0, 1]"),
        ({"bound": ["momentum", "lemma2"]}, "parameters.safe_lr.bound: bound must be one of"),
        ({"more": {"x": {"distribution": "lognormal"}}}, "parameters.x: distribution 'lognormal' is not one of"),
        ({"more": {"safe_lr.margni": {"value": 1}}}, "CoherenceScheduler has no argument 'margni'"),
    ],
)
def test_what_would_be_rejected_is_named_before_anything_runs(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        sweep_config(**settings)
    assert message in str(raised.value)


def changed(**changes: Any) -> dict[str, Any]:
    config = {**FINE, **changes}
    return {key: value for key, value in config.items() if value is not ...}


def one(**spec: Any) -> dict[str, Any]:
    return changed(parameters={"lr": spec})


BAD: list[tuple[dict[str, Any], str]] = [
    (one(min=1.0, max=0.1), "parameters.lr"),
    (one(min=1.0, max=1.0), "parameters.lr"),
    (one(distribution="log_uniform_values", max=1.0), "parameters.lr: min is missing"),
    (one(distribution="log_uniform_values", min=0.0, max=1.0), "parameters.lr"),
    (one(distribution="log_uniform", min=-3.0, max=1.0), "parameters.lr: log_uniform takes exponents"),
    (one(values=[]), "parameters.lr"),
    (one(value=1, values=[1]), "parameters.lr"),
    (one(), "parameters.lr: it says neither"),
    (one(values=[1, 2], probabilities=[1.0]), "parameters.lr"),
    (one(values=[1, 2], probabilities=[0.5, 0.3]), "parameters.lr"),
    (one(values=[1, 2], probabilities=["a", "b"]), "parameters.lr: probabilities are ['a', 'b']"),
    (one(values=[1, 2], probabilities=3), "parameters.lr: probabilities are 3"),
    (one(distribution="normal", mu="a", sigma=1), "parameters.lr: mu is 'a', not a number"),
    (one(distribution="q_uniform", min=0.0, max=1.0, q=-1), "parameters.lr: q is -1, not a number above 0"),
    (changed(early_terminate={"type": "x"}), "early_terminate: "),
    (changed(early_terminate={"type": "hyperband"}), "early_terminate: hyperband needs min_iter"),
    (changed(parameters={}), "parameters: "),
    (changed(parameters=...), "parameters: "),
    (changed(parameters={"a b": {"value": 1}}), "parameters.a b"),
    (changed(parameters={"lr": [1, 2]}), "parameters.lr"),
    (changed(method=...), "method: None"),
    (changed(method="annealing"), "method: "),
    (changed(metric={"goal": "minimize"}), "metric: "),
    (changed(metric={"name": "v", "goal": "min"}), "metric.goal"),
    (changed(program=3), "program: "),
    (changed(command="x"), "command: "),
    (changed(run_cap=0), "run_cap: "),
    (changed(progam="train.py"), "progam: "),
]


@pytest.mark.parametrize(("config", "start"), BAD, ids=[start for _, start in BAD])
def test_our_own_checks_name_the_key(config: dict[str, Any], start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safe_lr.sweeps.checks._wandbs_own", lambda config: [])
    found = violations(config)
    assert len(found) == 1
    assert found[0].startswith(start)


def test_wandb_trips_over_what_looks_fine() -> None:
    text = "method: random\nparameters: {lr: {min: 1e-3, max: 1}}\n"
    pytest.importorskip("yaml")
    config = __import__("yaml").safe_load(text)
    assert violations(config) == [
        "parameters.lr: min is the text '1e-3': YAML reads 1e-3 as text, write 1.0e-3 or 0.001"
    ]
    assert "an integer and a float" in violations(one(min=0.001, max=1))[0]
    assert violations("lr") == ["the config is str, not a mapping of keys such as method and parameters"]


def test_a_config_goes_through_yaml_unchanged(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    config = sweep_config(lr=(1e-5, 1e-1), bound=["momentum", "coherence"], program="train.py")
    (tmp_path / "sweep.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "sweep.yaml") == config
    (tmp_path / "sweep.json").write_text(json.dumps(config))
    assert load_config(tmp_path / "sweep.json") == config
    (tmp_path / "bad.yaml").write_text("method: [")
    with pytest.raises(ValueError, match="bad.yaml is not YAML"):
        load_config(tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_text("method: random\nparameters: {lr: {min: 1.0, max: 0.1}}")
    with pytest.raises(ValueError, match="bad.yaml would be rejected: parameters.lr: min 1.0 is not below max 0.1"):
        load_config(tmp_path / "bad.yaml")


def test_arguments_of_a_run() -> None:
    assert arguments({"lr": 0.1, "safe_lr.margin": 0.3, "safe_lr.bound": None}) == {"margin": 0.3}
    with pytest.raises(ValueError, match="no argument 'margni' \\(safe_lr.margni"):
        arguments({"safe_lr.margni": 1})


def test_an_agents_command_line() -> None:
    pytest.importorskip("wandb")
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    params = {"lr": 0.25, "safe_lr.follow_limit": True, "flag": False, "safe_lr.margin": 0.5}
    theirs = create_sweep_command_args({"args": {key: {"value": value} for key, value in params.items()}})
    macros = [name for name in theirs if name != "args_dict"]
    assert len(macros) == 7
    for name in macros:
        assert command_line({"command": [f"${{{name}}}"]}, params) == theirs[name], name
    with pytest.raises(ValueError, match="'\\$\\{arsg\\}' is not known here"):
        command_line({"command": ["${arsg}"]}, {})
    with pytest.raises(ValueError, match="program: the config names none"):
        program_of(FINE)


# ---- what cannot train


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1.0)


def slope() -> nn.Module:
    return nn.Linear(2, 1, bias=False)


def quadratic(model: nn.Module) -> Callable[[], torch.Tensor]:
    """2 w1^2 + w2^2 / 2: H = diag(4, 1), so that gradient descent diverges from lr 2 / 4 on, exactly."""
    return lambda: (torch.tensor([2.0, 0.5]) * model.weight**2).sum()


def test_the_ceiling_of_a_quadratic_is_known() -> None:
    found = stable_ceiling(slope, quadratic, optimizer_factory=sgd, highest=1e3)
    assert found.lr_limit == pytest.approx(0.5, rel=1e-2)
    assert found.lr == pytest.approx(8 * found.lr_limit)
    assert found.trained_at is None
    assert stable_ceiling(slope, quadratic, optimizer_factory=sgd, highest=0.49).lr is None
    one = stable_ceiling(slope, quadratic, optimizer_factory=sgd, highest=1e3, multiple=1.05)
    assert one.lr == pytest.approx(0.525, rel=1e-2)


def test_what_trains_is_not_cut_though_it_is_beyond_the_limit() -> None:
    """A kink makes the quadratic's slope bounded away from the origin: lrs far beyond the linear limit still train."""

    def huber(model: nn.Module) -> Callable[[], torch.Tensor]:
        return lambda: nn.functional.huber_loss(100 * model.weight, torch.zeros(1, 2), delta=1.0)

    def far() -> nn.Module:
        model = slope()
        nn.init.constant_(model.weight, 0.005)  # inside the parabola: H = 10^4 / 2, lr_limit = 4e-4
        model.weight.data[0, 1] = 50.0  # outside: a constant slope of 50, which an lr of .02 takes 50 updates to follow
        return model

    found = stable_ceiling(far, huber, optimizer_factory=sgd, highest=1e3)
    assert found.lr_limit == pytest.approx(4e-4, rel=0.05)
    assert found.trained_at is not None and found.trained_at >= 8 * found.lr_limit
    assert found.lr is not None and found.lr == pytest.approx(4 * found.trained_at)


@pytest.fixture(scope="module")
def task() -> tuple[Callable[[], nn.Module], Callable[[nn.Module], Iterator[Callable[[], torch.Tensor]]]]:
    """A teacher's outputs, endless batches of 32."""
    teacher = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).requires_grad_(False)

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))

    def closures(made: nn.Module) -> Iterator[Callable[[], torch.Tensor]]:
        stream = torch.Generator().manual_seed(1)
        while True:
            x = torch.randn(32, 8, generator=stream)
            yield lambda x=x: nn.functional.mse_loss(made(x), teacher(x))

    return model, closures


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1.0)


def final_loss(task: Any, lr: float, steps: int = 200) -> float:
    torch.manual_seed(0)
    model = task[0]()
    optimizer = adam(model)
    optimizer.param_groups[0]["lr"] = lr
    losses = []
    for _, closure in zip(range(steps), task[1](model)):  # noqa: B905 (the second has no end)
        optimizer.zero_grad()
        loss = closure()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20 / losses[0]


def test_an_adaptive_optimizers_limit_at_initialisation_would_cut_what_trains(task: Any) -> None:
    from safe_lr import measure

    found = stable_ceiling(*task, optimizer_factory=adam, highest=1e4)
    torch.manual_seed(0)
    model = task[0]()
    at_start = measure(adam(model), next(task[1](model))).lr_limit
    good = min((1e-3, 3e-3, 1e-2, 3e-2, 1e-1), key=lambda lr: final_loss(task, lr))
    assert found.lr is not None
    assert at_start < good < found.lr, "the best lr is above the first limit, and kept"
    assert found.lr > 20 * at_start
    assert final_loss(task, good) < 0.1
    assert final_loss(task, found.lr) > 1, "what is cut does not train, in a longer run either"
    assert final_loss(task, 10 * found.lr) > 1


def test_a_ceiling_leaves_the_callers_streams_alone(task: Any) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = stable_ceiling(*task, optimizer_factory=adam, highest=1e4, steps=12)
    assert torch.rand(1) == expected
    assert stable_ceiling(*task, optimizer_factory=adam, highest=1e4, steps=12) == first


@pytest.mark.parametrize("kind", ["log_uniform_values", "uniform"])
def test_a_range_is_cut_at_the_ceiling(kind: str) -> None:
    config = one(distribution=kind, min=1e-3, max=100.0)
    before = json.dumps(config)
    clipped = clip_to_stable(config, slope, quadratic, optimizer_factory=sgd)
    assert json.dumps(config) == before
    assert clipped["parameters"]["lr"]["max"] == pytest.approx(4.0, rel=1e-2)
    assert clipped["parameters"]["lr"]["min"] == 1e-3
    assert violations(clipped) == []
    assert "lr cut from 100 to below 4: a bare run at lr 4 fails within 50 updates" in clipped["description"]


def test_a_program_that_is_not_there_is_said_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"program: there is no file 'gone\.py' in "):
        program_of({"program": "gone.py"}, folder=tmp_path)


def test_a_command_without_a_program_tells_what_it_said(tmp_path: Path) -> None:
    command = ["${interpreter}", "-c", "raise SystemExit('no data')"]
    with pytest.raises(RuntimeError, match="the command ended with status 1: no data"):
        program_of({"command": command}, folder=tmp_path)({})


def test_values_are_dropped_and_weights_still_add_up() -> None:
    config = one(values=[0.1, 1.0, 10.0], probabilities=[0.2, 0.2, 0.6])
    clipped = clip_to_stable(config, slope, quadratic, optimizer_factory=sgd)
    assert clipped["parameters"]["lr"] == {"values": [0.1, 1.0], "probabilities": [0.5, 0.5]}


def test_nothing_below_8_times_the_limit_is_cut_though_it_was_seen_to_fail() -> None:
    for spec in ({"values": [1.0, 3.0]}, {"min": 1.0, "max": 3.9}):  # the limit is .5
        clipped = clip_to_stable(one(**spec), slope, quadratic, optimizer_factory=sgd)
        assert clipped.pop("description") == (
            f"lr: a bare run at lr {spec.get('max', 3.0):.3g} fails within 50 updates, but all of it is below 8 times "
            "the largest limit met in a protected one, 0.5: nothing is cut."
        )
        assert clipped == one(**spec)
    found = stable_ceiling(slope, quadratic, optimizer_factory=sgd, highest=3.9)
    assert found.lr is None and found.lr_limit == pytest.approx(0.5, rel=1e-2)
    assert found.reason.endswith("below 8 times the largest limit met in a protected one, 0.5: nothing is cut")


def test_what_a_clip_has_nothing_to_do_with() -> None:
    margin = sweep_config()
    assert clip_to_stable(margin, slope, quadratic, optimizer_factory=sgd) == margin
    safe = one(values=[0.01, 0.1])
    assert clip_to_stable(safe, slope, quadratic, optimizer_factory=sgd) == safe
    for config, message in (
        (one(values=[10.0, 20.0]), "parameters.lr: nothing between 10 and 20 can train"),
        (one(min=1, max=20), "min and max are integers"),
        (one(distribution="normal"), "cannot draw from 'normal'"),
        (changed(parameters={"rate": {"value": 1.0}}), "sweeps rate, not 'lr'"),
        (one(min=1.0, max=0.1), "would be rejected"),
    ):
        with pytest.raises(ValueError, match=message):
            clip_to_stable(config, slope, quadratic, optimizer_factory=sgd)
    with pytest.raises(ValueError, match="steps=1 at least 4"):
        stable_ceiling(slope, quadratic, optimizer_factory=sgd, highest=1.0, steps=1)


# ---- pruning


class Run:
    """What prune() touches of a W&B run."""

    def __init__(self, error: Exception | None = None) -> None:
        self.tags: tuple[str, ...] | None = ("mine",)
        self.summary: dict[str, Any] = {}
        self.ended: list[int] = []
        self.error = error

    def finish(self, exit_code: int) -> None:
        if self.error is not None:
            raise self.error
        self.ended.append(exit_code)


def trained(lr: float, steps: int) -> CoherenceScheduler:
    torch.manual_seed(0)
    model = slope()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    scheduler = CoherenceScheduler(optimizer, margin=0.5, loggers=None)
    for _ in range(steps):
        optimizer.zero_grad()
        quadratic(model)().backward()
        scheduler.observe(quadratic(model))
        optimizer.step()
        scheduler.step()
    return scheduler


def test_an_unsafe_point_ends_normally_with_tag_summary_and_reason() -> None:
    run, scheduler = Run(), trained(100.0, 25)
    reason = prune(run, scheduler)
    assert reason == "step 25: lr 100 is 400 times the cap 0.25"  # .5 * 2 / 4
    assert run.tags == ("mine", "safe_lr-unsafe")
    assert run.summary == {"safe_lr_pruned": reason, "safe_lr_pruned_step": 25}
    assert run.ended == [0]
    assert scheduler.optimizer.param_groups[0]["lr"] == 100.0, "the scheduler is closed"


def test_a_safe_point_and_a_young_one_go_on() -> None:
    for lr, steps in ((0.1, 25), (1.0, 25), (100.0, 10)):
        run, scheduler = Run(), trained(lr, steps)
        assert prune(run, scheduler) is None
        assert run.tags == ("mine",) and run.ended == []
        scheduler.close()
    scheduler = trained(1.0, 25)
    assert unsafe(scheduler, factor=2.0) == "step 25: lr 1 is 4 times the cap 0.25"
    with pytest.raises(ValueError, match="factor=0.5 must be at least 1"):
        unsafe(scheduler, factor=0.5)
    scheduler.close()


def test_nothing_that_wandb_raises_comes_out_but_a_stop_request() -> None:
    with pytest.warns(RuntimeWarning, match="could not be told that the run was pruned \\(OSError: gone\\)"):
        assert prune(Run(OSError("gone")), trained(100.0, 25))
    with pytest.raises(Exception) as raised:
        prune(Run(Exception()), trained(100.0, 25))
    assert type(raised.value) is Exception
    assert prune(None, trained(100.0, 25))


# ---- searching here


def bowl(params: dict[str, Any]) -> float:
    return (math.log10(params["lr"]) + 2) ** 2 + params.get("n", 1)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["random", "bayes"])
def test_a_search_repeats_and_stays_in_its_space(engine: str, method: str) -> None:
    config = changed(method=method)
    random.seed(1)
    np.random.seed(1)
    states = random.getstate(), np.random.get_state()[1].tolist()
    trials = search(config, bowl, runs=8, seed=5, engine=engine)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states
    again = search(config, bowl, runs=8, seed=5, engine=engine)
    assert [trial.params for trial in trials] == [trial.params for trial in again]
    assert [trial.params for trial in trials] != [t.params for t in search(config, bowl, runs=8, seed=6, engine=engine)]
    assert all(1e-4 <= trial.params["lr"] <= 1.0 and trial.params["n"] in (1, 2) for trial in trials)
    assert all(type(trial.params["lr"]) is float and type(trial.params["n"]) is int for trial in trials)
    winner = best(trials)
    assert winner is not None and winner.value == min(bowl(trial.params) for trial in trials)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_grid_is_gone_through_once(engine: str) -> None:
    config = changed(method="grid", parameters={"lr": {"values": [0.1, 1.0]}, "n": {"values": [1, 2, 3]}})
    trials = search(config, bowl, engine=engine)
    points = [(trial.params["lr"], trial.params["n"]) for trial in trials]
    assert sorted(points) == [(lr, n) for lr in (0.1, 1.0) for n in (1, 2, 3)]


STEPS = {
    "layers": {"min": 1, "max": 3},
    "batch": {"distribution": "q_uniform", "min": 16, "max": 64, "q": 16},
    "rate": {"distribution": "q_uniform", "min": 0.0, "max": 0.3, "q": 0.1},
}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_grid_over_steps_is_wandbs(engine: str) -> None:
    """By its own search, numpy.arange: integers to the end, steps without it, of the kind that q is of."""
    points = [trial.params for trial in search(changed(method="grid", parameters=STEPS), lambda p: 0.0, engine=engine)]
    for name, expected in (("layers", [1, 2, 3]), ("batch", [16, 32, 48]), ("rate", [0.0, 0.1, 0.2])):
        assert sorted({point[name] for point in points}) == [pytest.approx(value) for value in expected]
        assert {type(point[name]) for point in points} == {type(expected[0])}
    assert len(points) == 27


@pytest.mark.parametrize("engine", ENGINES)
def test_steps_of_integers_are_integers(engine: str) -> None:
    """A program's `type=int` does not read 32.0."""
    steps = {"batch": STEPS["batch"], "wide": {"distribution": "q_log_uniform_values", "min": 8, "max": 512, "q": 8}}
    for trial in search(changed(parameters=steps), lambda params: 0.0, runs=20, engine=engine):
        assert {type(value) for value in trial.params.values()} == {int}
        assert trial.params["batch"] % 16 == 0 and trial.params["wide"] % 8 == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_trials_that_fail_or_are_pruned_do_not_end_the_search(engine: str, tmp_path: Path) -> None:
    ends: list[Any] = [
        ValueError("no data"),
        math.nan,
        {"other": 1},
        {"safe_lr_pruned": "too high"},
        {"val_loss": 2},
        1.0,
    ]

    def train(params: dict[str, Any]) -> Any:
        end = ends[len(seen)]
        seen.append(params)
        if isinstance(end, Exception):
            raise end
        return end

    seen: list[dict[str, Any]] = []
    trials = search(FINE, train, runs=6, engine=engine, log_path=tmp_path / "made" / "trials.jsonl")
    assert [trial.status for trial in trials] == ["failed", "failed", "failed", "pruned", "finished", "finished"]
    assert [trial.reason for trial in trials[:4]] == [
        "ValueError: no data",
        "val_loss is nan",
        "it returned no number under 'val_loss'",
        "too high",
    ]
    lines = [json.loads(line) for line in (tmp_path / "made" / "trials.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == [trial.status for trial in trials]
    assert best(trials) is trials[5]
    assert best(trials, "maximize") is trials[4]
    assert best([]) is None


def test_a_stop_request_ends_a_search() -> None:
    def train(params: dict[str, Any]) -> float:
        raise Exception

    with pytest.raises(Exception) as raised:
        search(FINE, train, runs=2, engine="built-in")
    assert type(raised.value) is Exception


@pytest.mark.skipif(importlib.util.find_spec("sweeps") is None, reason="W&B's package sweeps is missing")
def test_wandbs_search_learns_from_what_it_is_told() -> None:
    """Of 24 trials of its Bayesian search the later half is better than the first, on a bowl; random draws are not."""
    trials = search(changed(method="bayes"), bowl, runs=24, engine="sweeps", seed=1)
    values = [trial.value or 0.0 for trial in trials]
    assert np.median(values[12:]) < np.median(values[:12])


def test_bad_searches() -> None:
    with pytest.raises(ValueError, match="engine='hyper' is not one of"):
        search(FINE, bowl, engine="hyper")
    with pytest.raises(ValueError, match="runs=0"):
        search(FINE, bowl, runs=0)
    with pytest.raises(ValueError, match="write opt.lr"):
        search(changed(parameters={"opt": {"parameters": {"lr": {"value": 1}}}}), bowl, engine="built-in")
    with pytest.warns(UserWarning, match="early_terminate is not applied: a local search ends programs"):
        search(changed(early_terminate={"type": "hyperband", "min_iter": 3}), bowl, runs=1, engine="built-in")
    for engine in ("sweeps", "optuna"):
        if importlib.util.find_spec(engine) is None:
            with pytest.raises(ImportError, match=f"engine='{engine}' needs the package"):
                search(FINE, bowl, engine=engine)


@pytest.mark.parametrize("kind", [name for name in LOCAL if "uniform" in name])
def test_draws_follow_their_distribution(kind: str) -> None:
    log, step = "log" in kind, 0.25 if kind.startswith("q_") else None
    low, high = (1.0, 9.0) if "int" not in kind else (1, 9)
    spec: dict[str, Any] = {"distribution": kind, "min": low, "max": high} | ({"q": step} if step else {})
    drawn = space("x", spec)
    assert isinstance(drawn, Interval)
    stream = random.Random(0)
    values = [drawn.draw(stream) for _ in range(4000)]
    assert low - 1e-9 <= min(values) <= max(values) <= high + 1e-9
    middle = 3.0 if log else 5.0
    assert sorted(values)[2000] == pytest.approx(middle, rel=0.08)
    if step:
        assert all(value % step == pytest.approx(0, abs=1e-9) for value in values)


# ---- programs


def test_a_program_is_run_as_an_agent_would(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import json, os, sys\nprint('epoch 1')\nprint(json.dumps({'val_loss': 0.5, 'argv': sys.argv[1:],"
        " 'mode': os.environ.get('WANDB_MODE')}))\nprint('bye')\nsys.exit('--bad' in sys.argv and 'it is bad')\n"
    )
    run = program_of({"program": "train.py"}, folder=tmp_path)
    figures = run({"lr": 0.1, "safe_lr.follow_limit": True, "off": False})
    assert figures["argv"] == ["--lr=0.1", "--safe_lr.follow_limit"]
    with pytest.raises(RuntimeError, match="train.py ended with status 1: it is bad"):
        run({"bad": True})


def test_functions_are_found_or_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_own_training.py").write_text("number = 3\ndef make(): return 1\nimport_error = True\n")
    (tmp_path / "needs_more.py").write_text("import surely_not_there\n")
    assert load_function("my_own_training:make")() == 1
    assert load_function(f"{tmp_path / 'my_own_training.py'}:make")() == 1
    for target, message in (
        ("make", "is not module:function"),
        ("nowhere_at_all:make", "there is no module 'nowhere_at_all'"),
        ("my_own_training:mkae", "has no 'mkae'"),
        ("my_own_training:number", "which is not a function"),
        ("needs_more:make", "needs surely_not_there, which is not installed"),
    ):
        with pytest.raises(ValueError, match=message):
            load_function(target)


def test_a_trial_is_plain_data() -> None:
    assert json.loads(json.dumps(Trial(0, {"lr": 0.1}, "failed", reason="x").__dict__))["reason"] == "x"
