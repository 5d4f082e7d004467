"""The smallest whole program: a plain training loop, an lr that is far too high, and safe_lr."""

import torch
from torch import nn

from safe_lr import CoherenceScheduler

torch.manual_seed(0)
x = torch.randn(256, 8)
y = torch.sin(x @ torch.randn(8, 1))
model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=1.0)  # .01 would be about right
scheduler = CoherenceScheduler(optimizer)


def loss_of(batch: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(model(x[batch]), y[batch])


for step in range(300):
    batch = torch.randint(256, (64,))
    loss = loss_of(batch)
    loss.backward()
    scheduler.observe(lambda batch=batch: loss_of(batch))  # evaluated only when a measurement is due
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    if step % 50 == 0:
        print(f"step {step:3d}  loss {loss.item():.4f}  lr {scheduler.get_last_lr()[0]:.4f} of 1.0")

scheduler.close()
print(scheduler.summary())
