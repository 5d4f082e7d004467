"""What is said of sweep configs, many of them, beside what W&B's own client, schema and search say."""

from __future__ import annotations

import datetime
import json
import random
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_sweeps import BAD, FINE, changed, one

from safe_lr.__main__ import main
from safe_lr.sweeps import load_config, search, sweep_config, violations
from safe_lr.sweeps.checks import wandbs_search
from safe_lr.sweeps.spaces import FORMS

needs_wandbs_search = pytest.mark.skipif(
    wandbs_search() is None, reason="W&B's package sweeps is missing: `make check` installs it"
)
DAY = datetime.date(2024, 1, 1)
ODD = [0, 1, -1, 2.0, -2.5, True, None, "1e-3", "x", [], {}, float("inf"), float("nan"), DAY]


# ---- named, whatever is installed


def nested(**spec: Any) -> dict[str, Any]:
    return one(parameters={"rate": spec})


NAMED: list[tuple[dict[str, Any], str]] = [
    (
        one(values=[DAY]),
        "parameters.lr.values: 2024-01-01 is of type date, which W&B cannot keep: put quotes around it",
    ),
    (one(value={"begin": datetime.datetime(2024, 1, 1)}), "parameters.lr.value.begin: 2024-01-01 00:00:00 is of type"),
    (one(values={1, 2}), "parameters.lr.values: {1, 2} is of type set"),
    (one(min=np.int64(1), max=3), "parameters.lr.min: 1 is of type int64, which W&B cannot keep: write text, a number"),
    (one(value={(1, 2): 3}), "parameters.lr.value.(1, 2): the key is of type tuple"),
    (changed(name=DAY), "name: 2024-01-01 is of type date"),
    (changed(parameters={True: {"value": 1}}), "parameters.True: YAML reads on, off, yes and no as true and false"),
    (nested(min=1.0, max=0.1), "parameters.lr.parameters.rate: min 1.0 is not below max 0.1"),
    (nested(values=[]), "parameters.lr.parameters.rate: values are []"),
    (nested(min="1e-3", max=1.0), "parameters.lr.parameters.rate: min is the text '1e-3'"),
    (nested(parameters={}), "parameters.lr.parameters.rate.parameters: there is none to sweep"),
    (one(parameters=3), "parameters.lr.parameters: there is none to sweep"),
    (one(parameters={"rate": 3}), "parameters.lr.parameters.rate: 3 is not a mapping"),
    (one(parameters={"a b": {"value": 1}}), "parameters.lr.parameters.a b: a name begins"),
    (one(parameters={"rate": {"value": 1}}, value=1), "parameters.lr: value stand beside nested parameters"),
    (changed(method="grid", parameters={"lr": {"parameters": {"rate": {"min": 0.1, "max": 1.0}}}}), "parameters.lr."),
    (
        changed(parameters={"safe_lr": {"parameters": {"margni": {"value": 1}}}}),
        "parameters.safe_lr.parameters.margni: ",
    ),
    (one(min=0.1, max=1.0, q=0.1), "parameters.lr: q does not belong to uniform, which takes min, max"),
    (one(distribution="uniform", values=[1]), "parameters.lr: min is missing"),
    (changed(method="bayes", parameters={"lr": {"value": 1}}), "parameters: bayes needs one that is not constant"),
    (changed(scheduler={"engine": "optuna"}), "scheduler.engine: optuna goes with method custom, not random"),
    (changed(metrics=[{"name": "a"}, {"name": "b"}]), "metrics: it stands beside metric"),
    (changed(controller={"type": "x"}), "controller: "),
    (changed(early_terminate={"type": "hyperband", "min_iter": 3, "eta": 1}), "early_terminate.eta: 1 is not a number"),
    (changed(metric={"name": "v", "impute": "x"}), "metric.impute: 'x' is not one of latest, best, worst"),
]


@pytest.mark.parametrize(("config", "start"), NAMED, ids=[start.partition(":")[0] for _, start in NAMED])
def test_dates_nested_parameters_and_the_rest_are_named(
    config: dict[str, Any], start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safe_lr.sweeps.checks._wandbs_own", lambda config: [])
    found = violations(config)
    assert len(found) == 1
    assert found[0].startswith(start)


def test_what_wandb_takes_is_not_named() -> None:
    for config in (
        one(distribution="log_uniform_values", min=0.0001, max=1),  # W&B asks for like ends only where it must guess
        one(distribution="uniform", min=0, max=1),
        one(parameters={"rate": {"min": 0.0001, "max": 1.0}, "deeper": {"parameters": {"x": {"values": [1, None]}}}}),
        one(value={"begin": "2024-01-01", "n": [1, {"2": None}]}),
        changed(metric={"name": "v", "target": 0.1, "impute_while_running": "best"}, controller={"type": "local"}),
        changed(early_terminate={"type": "hyperband", "s": 2, "max_iter": 27, "strict": True}),
        changed(method="custom", metric=..., metrics=[{"name": "a"}, {"name": "b"}]),
        changed(method="custom", parameters=..., scheduler={"engine": "ax", "source": "a.py", "search_space": "f"}),
        changed(parameters={"safe_lr": {"parameters": {"margin": {"min": 0.1, "max": 1.0}}}}),
    ):
        assert violations(config) == []


def test_a_yaml_file_with_a_date_or_without_sense_names_its_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("yaml")
    path = tmp_path / "sweep.yaml"
    for text, message in (
        (
            "method: random\nparameters: {since: {values: [2024-01-01]}}",
            "parameters.since.values: 2024-01-01 is of type",
        ),
        ("method: random\nparameters: {since: {value: 2024-13-01}}", "sweep.yaml is not YAML: month must be in 1..12"),
        ("method: random\non: {value: 1}\nparameters: {lr: {value: 1}}", "True: W&B knows no such key"),
        ("", "sweep.yaml is empty: write method and parameters"),
        ("- lr\n", "the config is list, not a mapping"),
        ("\x00", "sweep.yaml is not YAML"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError) as raised:
            load_config(path)
        assert message in str(raised.value)
        assert main(["sweep", "run", "--local", str(path)]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    for content in (b'{"method": ', b"\xff\xfe\xff"):
        (tmp_path / "sweep.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"sweep\.json is not JSON"):
            load_config(tmp_path / "sweep.json")


def test_a_local_search_names_what_only_wandb_runs() -> None:
    with pytest.raises(ValueError, match="method: custom is for a scheduler of your own"):
        search(changed(method="custom"), lambda params: 0.0)


def test_a_folder_of_the_users_is_not_taken_for_wandbs_search(tmp_path: Path, root: Path) -> None:
    """A namespace package: Python imports any folder of that name. Found first, it must neither be used nor trip us."""
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "__init__.py").write_text("")
    code = (
        "import sweeps; assert not hasattr(sweeps, 'next_run'); from safe_lr.sweeps import search\n"
        "config = {'method': 'random', 'metric': {'name': 'v'}, 'parameters': {'x': {'min': 0.0, 'max': 1.0}}}\n"
        "assert len(search(config, lambda params: params['x'], runs=2)) == 2\n"
        "try: search(config, print, engine='sweeps')\n"
        "except ImportError as error: assert \"needs the package 'sweeps'\" in str(error)\n"
        "else: raise SystemExit('no error')"
    )
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(root)!r}]\n{code}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- beside W&B's own judgement


def judged(config: dict[str, Any]) -> bool:
    """Whether `wandb.sweep` would send the config, and W&B's schema takes it."""
    sweeps, client = wandbs_search(), pytest.importorskip("wandb.apis.public.sweeps")
    try:  # an odd config makes either raise anything
        kept = json.loads(json.dumps(client._validate_config_and_fill_distribution(config)))
        return not sweeps.schema_violations_from_proposed_config(kept)
    except Exception:  # noqa: BLE001
        return False


def draws(config: dict[str, Any]) -> bool:
    """Whether W&B's search proposes a point, and one without a NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            run = wandbs_search().next_run(json.loads(json.dumps(config)), [], validate=False)
        except Exception:  # noqa: BLE001
            return False
    told = json.dumps(run.config, default=lambda value: value.item() if hasattr(value, "item") else str(value))
    return "NaN" not in told or "NaN" in json.dumps(config)


@needs_wandbs_search
def test_wandb_rejects_what_we_reject_and_takes_what_we_make() -> None:
    assert judged(FINE)
    assert not any(judged(config) for config, _ in BAD)
    for made in (sweep_config(), sweep_config(lr=(1e-4, 1.0), beta2=[0.99, 0.999], schedule=["cosine"])):
        assert judged(made)


class Configs:
    """Random configs, most of them with something wrong."""

    def __init__(self, seed: int) -> None:
        self.r = random.Random(seed)

    def often(self, share: float) -> bool:
        return self.r.random() < share

    def number(self) -> Any:
        return self.r.choice(ODD if self.often(0.15) else [0.1, 0.5, 1.0, 2.0, 1, 2, 5])

    def entry(self, key: str) -> Any:
        if key == "values":
            return self.r.choice([[1, 2], [0.1, 0.2], ["a", "b"], [True, False], [{"a": 1}, None], [], 3, "ab", [DAY]])
        if key == "probabilities":
            return self.r.choice([[0.5, 0.5], [0.25, 0.75], [0.5, 0.3], [1.0], ["a", "b"], [1.5, -0.5], 3, None])
        return self.r.choice(ODD) if key == "value" else self.number()

    def spec(self, depth: int) -> Any:
        if depth < 2 and self.often(0.15):
            return {"parameters": self.parameters(depth + 1), **({"value": 1} if self.often(0.1) else {})}
        if self.often(0.05):
            return self.r.choice([[1], 3, "x", None, {}])
        kind = self.r.choice(list(FORMS))
        needed, allowed = FORMS[kind]
        spec = {key: self.entry(key) for key in (*needed, *(key for key in allowed if self.often(0.5)))}
        if not needed or "_uniform" in kind or self.often(0.3):
            spec["distribution"] = kind if self.often(0.95) else self.r.choice(["log_uniform", "lognormal", None, 3])
        if self.often(0.06):
            spec.pop(self.r.choice(list(spec)))
        if self.often(0.06):
            spec[self.r.choice(["q", "mu", "foo", "min", "value", "values", "probabilities"])] = self.r.choice([1, 0.1])
        return spec

    def parameters(self, depth: int = 0) -> Any:
        names = ["lr", "a.b", "n-1", "_x"] + (["1x", "a b", ""] if self.often(0.05) else [])
        return {
            self.r.choice(names): self.spec(depth) for _ in range(self.r.choice([0] if self.often(0.03) else [1, 2]))
        }

    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = {"method": self.r.choice(["random", "random", "bayes", "grid", "custom"])}
        config["parameters"] = self.parameters()
        if config["method"] == "bayes":
            config["metric"] = {"name": "v", "goal": "minimize"}
        for key, values in TOP.items():
            if self.often(0.04):
                config[key] = self.r.choice(values)
        for key in ("method", "parameters"):
            if self.often(0.02):
                del config[key]
        return config


_BAND = {"type": "hyperband", "min_iter": 3}
TOP: dict[str, list[Any]] = {
    "method": ["x", None, [], 3],
    "metric": [
        *(None, "v", {"name": "v"}, {"goal": "minimize"}, {"name": 3}, {"name": "v", "goal": "min"}),
        *({"name": "v", "target": "x"}, {"name": "v", "impute_while_running": False}, {"name": "v", "foo": 1}),
    ],
    "metrics": [None, "x", [], [{"name": "a"}], [{"name": "a"}, {"name": "b"}], [{"name": "a"}, {"goal": "x"}]],
    "early_terminate": [
        *(None, "hyperband", _BAND, {"type": "hyperband"}, {"min_iter": 3}, {"type": ["a"]}, {**_BAND, "eta": 1}),
        *({**_BAND, "min_iter": 0}, {**_BAND, "min_iter": 1.5}, {**_BAND, "min_iter": 2.0}, {**_BAND, "strict": "yes"}),
        *({"type": "hyperband", "max_iter": 9}, {"type": "hyperband", "max_iter": 9, "s": 2}, {**_BAND, "foo": 1}),
    ],
    "controller": [None, "local", {}, {"type": "local"}, {"type": "cloud", "foo": 1}, {"type": "x"}],
    "scheduler": [
        *(None, "x", {}, {"engine": "wandb"}, {"engine": "x"}, {"engine": ["a"]}, {"engine": "ax", "optimizer": "f"}),
        *({"engine": "optuna", "source": "a.py", "search_space": "f"}, {"engine": "wandb", "foo": 1}, {"source": "a"}),
    ],
    **{name: ["x", None, 3] for name in ("name", "description", "program", "entity", "project", "job", "kind")},
    "command": [["a"], "a", None, []],
    "run_cap": [1, 0, -1, 2.5, 5.0, True, "3", None],
    "foo": [1],
}
REQUIRED = {"method", "metric", "parameters"}
NONSENSE = {"inf,", "nan,", "0,", "0.0,", "probabilities", "exponents"}
"""Words of what W&B does draw from, and gets nonsense: no ends, a width of 0, nested weights of any sum."""


@needs_wandbs_search
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(3))
def test_every_config_that_wandb_rejects_is_named_and_every_other_can_be_drawn_from(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What we accept W&B accepts, and its search draws from; what only we reject its search cannot draw from."""
    monkeypatch.setattr("safe_lr.sweeps.checks._wandbs_own", lambda config: [])
    random.seed(seed)
    np.random.seed(seed)
    made, accepted, ours_alone = Configs(seed), 0, 0
    for _ in range(500):
        config = made.config()
        found, runs = violations(config), config.get("method") != "custom" and "parameters" in config
        if not found:
            accepted += 1
            assert judged(config), config
            assert not runs or draws(config), config
            continue
        key = found[0].partition(":")[0].partition(".")[0]
        assert key in REQUIRED | set(config), (found, config)
        if judged(config) and runs and not NONSENSE & set(" ".join(found).split()):
            ours_alone += 1
            assert not any(draws(config) for _ in range(3)), (found, config)
    assert accepted > 50 and ours_alone > 10
