"""What each optimizer is: its preconditioner P, its update rule, and its coming step.

The only place that names optimizers. To add one, write one class (three or four short methods), register it, and add
one row to the tests' case table; CONTRIBUTING.md walks through it.
"""

import torch

from safe_lr.preconditioners.adaptive import (
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    RAdam,
    RMSprop,
    SparseAdam,
)
from safe_lr.preconditioners.base import Group, Preconditioner, State
from safe_lr.preconditioners.inferred import FromUpdate
from safe_lr.preconditioners.kronecker import SOAP, Shampoo
from safe_lr.preconditioners.momentum import ASGD, SGD
from safe_lr.preconditioners.registry import (
    decays,
    known,
    preconditioner_of,
    refuse,
    refused,
    register,
    register_by_name,
)
from safe_lr.preconditioners.scales import Adafactor, Muon
from safe_lr.preconditioners.schedule_free import AdamWScheduleFree, Prodigy, SGDScheduleFree
from safe_lr.preconditioners.signs import Lion

__all__ = [
    "FromUpdate",
    "Group",
    "Preconditioner",
    "State",
    "decays",
    "known",
    "preconditioner_of",
    "refused",
    "register",
    "register_by_name",
]

for _model in (SGD, ASGD, Adagrad, RMSprop, Adadelta, Adam, AdamW, Adamax, NAdam, RAdam, SparseAdam, Adafactor, Muon):
    if hasattr(torch.optim, _model.__name__):  # Muon came with torch 2.9
        register(getattr(torch.optim, _model.__name__), _model())

# By name, so that none of these packages needs to be there.
for _name, _adapter in {
    "schedulefree.AdamWScheduleFree": AdamWScheduleFree(),
    "schedulefree.SGDScheduleFree": SGDScheduleFree(),
    "prodigyopt.Prodigy": Prodigy(),
    "pytorch_optimizer.SOAP": SOAP(),
    "pytorch_optimizer.Shampoo": Shampoo(),
    "pytorch_optimizer.Lion": Lion(),
}.items():
    register_by_name(_name, _adapter)

refuse(
    torch.optim.Rprop,
    "each step's size is its own and only the gradient's sign counts, so neither lr (it sets the first sizes only) nor "
    "curvature decides. Use Adam or RMSprop for mini-batches.",
)
refuse(
    torch.optim.LBFGS,
    "it estimates the inverse Hessian itself, which makes lr = 1 right by design. Use line_search_fn='strong_wolfe'.",
)
