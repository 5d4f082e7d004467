"""Beside the W&B loggers of Lightning and Hugging Face, with the real packages and a server on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from safe_lr import CoherenceScheduler
from safe_lr.loggers.names import METRICS
from tests.wandb_server import Run, WandbServer

wandb = pytest.importorskip("wandb")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # the trainers warn of their own settings

EPOCHS, BATCHES = 5, 32
STEPS = EPOCHS * BATCHES
ENDS = [BATCHES * epoch - 1 for epoch in range(1, EPOCHS + 1)]
THEIRS = list(range(4, STEPS, 5))  # both log every fifth step


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    wandb.teardown()
    with WandbServer() as found:
        for name, value in found.environment().items():
            monkeypatch.setenv(name, value)
        for name, value in {"DIR": str(tmp_path), "CONSOLE": "off", "SILENT": "true", "PROJECT": "p"}.items():
            monkeypatch.setenv(f"WANDB_{name}", value)
        yield found
        assert found.unknown == []
        wandb.teardown()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))


def data() -> tuple[torch.Tensor, torch.Tensor]:
    stream = torch.Generator().manual_seed(1)
    return torch.randn(8 * BATCHES, 8, generator=stream), torch.randint(3, (8 * BATCHES,), generator=stream)


def check(run: Run) -> None:
    """Our rows are there and in order, on their own axis; the metrics that W&B was told of have it as theirs."""
    ours = [row for row in run.history if "safe_lr/lr" in row]
    steps = [row["safe_lr/step"] for row in ours]
    assert steps == sorted(set(steps)) and steps[-1] == STEPS - 1
    assert len(steps) >= len([step for step in THEIRS if step < 100])  # all of the first hundred steps that they commit
    assert all(row["safe_lr/lr"] <= row["safe_lr/lr_desired"] for row in ours)
    names = [metric.get("1", "") for metric in run.metrics]  # a trainer's pattern has no name
    axis = names.index("safe_lr/step") + 1  # they refer to each other by position
    axes = {name: metric.get("5") for name, metric in zip(names, run.metrics, strict=True) if "safe_lr/" in name}
    assert axes.pop("safe_lr/step") is None
    assert set(axes) >= {f"safe_lr/{name}" for name in METRICS}  # and Hugging Face's second group, without decay
    assert set(axes.values()) == {axis}
    assert run.settings["safe_lr_resolved"]["optimizer"]
    assert run.summary["safe_lr_summary"]["steps"] == STEPS
    assert run.state == "finished"


def test_lightning(server: WandbServer, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.loggers import WandbLogger

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), lr=1.0)
            self.safe = CoherenceScheduler(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.safe, "interval": "step"}}

        def loss(self, batch: Any) -> torch.Tensor:
            x, y = batch
            return nn.functional.cross_entropy(self.net(x), y)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            self.safe.observe(lambda: self.loss(batch))
            loss = self.loss(batch)
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_loss", self.loss(batch))

        def on_train_end(self) -> None:
            self.safe.close()

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=8)
    logger = WandbLogger(project="p", save_dir=tmp_path)
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    lightning.Trainer(max_epochs=EPOCHS, logger=logger, log_every_n_steps=5, accelerator="cpu", **quiet).fit(
        Module(), loader, loader
    )
    name = logger.experiment.id
    wandb.finish()
    run = server.run(name)
    assert [row["trainer/global_step"] for row in run.history if "train_loss" in row] == THEIRS
    assert [row["trainer/global_step"] for row in run.history if "val_loss" in row] == ENDS
    check(run)


def test_hugging_face(server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.net(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    class Trainer(transformers.Trainer):  # type: ignore[misc, name-defined]
        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            if self.lr_scheduler is None:
                optimizer = optimizer or self.optimizer
                self.lr_scheduler = CoherenceScheduler(
                    optimizer, super().create_scheduler(num_training_steps, optimizer)
                )
            return self.lr_scheduler

        def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
            if model.training:
                self.lr_scheduler.observe(lambda: model(**inputs)["loss"])
            return super().compute_loss(model, inputs, return_outputs, **more)

    class Close(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_train_end(self, *given: Any, lr_scheduler: Any = None, **more: Any) -> None:
            lr_scheduler.close()

    examples = [{"x": x, "labels": y} for x, y in zip(*data(), strict=True)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=8,
        learning_rate=1.0,
        logging_steps=5,
        eval_strategy="epoch",
        report_to=["wandb"],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    given = {"args": arguments, "train_dataset": examples, "eval_dataset": examples[:64], "callbacks": [Close()]}
    Trainer(model=Classifier(), **given).train()
    name = wandb.run.id
    wandb.finish()
    run = server.run(name)
    assert [row["train/global_step"] for row in run.history if "train/loss" in row] == [step + 1 for step in THEIRS]
    assert [row["train/global_step"] for row in run.history if "eval/loss" in row] == [end + 1 for end in ENDS]
    check(run)
