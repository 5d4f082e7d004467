"""Evaluating the user's closure without leaving a trace."""

from __future__ import annotations

import contextlib
import functools
import inspect
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_pre_hook

Closure = Callable[[], Tensor]


class ClosureError(TypeError):
    """A closure that cannot be measured: it must return the scalar loss, with its graph, and call no backward()."""


@dataclass(frozen=True)
class RandomState:
    """The global random streams of Python, NumPy and torch (the CPU's and those of the given devices)."""

    python: Any
    numpy: Any
    torch_cpu: Tensor
    torch_devices: dict[torch.device, Tensor]

    @classmethod
    def capture(cls, devices: Sequence[torch.device] = ()) -> RandomState:
        """Returns the streams as they stand."""
        states = {d: torch.get_device_module(d).get_rng_state(d) for d in dict.fromkeys(devices) if d.type != "cpu"}
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), states)

    def restore(self) -> None:
        """Puts the streams back to where they stood."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch_cpu)
        for device, state in self.torch_devices.items():
            torch.get_device_module(device).set_rng_state(state, device)


class _ModuleState:
    """One module's attributes (train/eval mode and caches among them), buffers and parameters' gradients."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = dict(vars(module))
        self.buffers = dict(module._buffers.items())
        tensors = [*self.buffers.values(), *(a for a in self.attributes.values() if isinstance(a, Tensor))]
        self.values = [(t, t.detach().clone()) for t in tensors if t is not None]
        own = [(name, a) for name, a in self.attributes.items() if name not in _TORCHS]
        self.lists = [(a, list(a)) for _, a in own if type(a) is list]
        self.dicts = [(a, dict(a)) for _, a in own if type(a) is dict]
        self.parameters = [_ParameterState(p) for p in module._parameters.values() if p is not None]

    def restore(self) -> None:
        for parameter in self.parameters:
            parameter.restore()
        attributes = vars(self.module)
        for name in attributes.keys() - self.attributes.keys():
            del attributes[name]
        attributes.update(self.attributes)
        if not isinstance(self.module, torch.jit.ScriptModule):  # there the names are fixed
            self.module._buffers.clear()
            self.module._buffers.update(self.buffers)
        for held, items in self.lists:
            held[:] = items
        for mapping, content in self.dicts:
            mapping.clear()
            mapping.update(content)
        for tensor, value in self.values:
            _write_back(tensor, value)


_TORCHS = frozenset(vars(nn.Module()))
"""Attributes that torch keeps on every module: its own dicts of parameters, buffers, children and hooks."""


class _ParameterState:
    """A parameter's gradient, `requires_grad` and tensor hooks; gradient and hooks are set aside meanwhile.

    A hook that scales the gradient would be applied twice in a Hessian product, and it is the user's to count calls.
    """

    def __init__(self, parameter: Tensor) -> None:
        self.parameter, self.grad, self.requires_grad = parameter, parameter.grad, parameter.requires_grad
        self.hooks = parameter._backward_hooks
        parameter.grad = None
        if self.hooks:
            parameter._backward_hooks = None

    def restore(self) -> None:
        self.parameter.grad = self.grad
        if self.parameter.requires_grad != self.requires_grad:
            self.parameter.requires_grad_(self.requires_grad)
        if self.hooks:
            self.parameter._backward_hooks = self.hooks


def _write_back(tensor: Tensor, value: Tensor) -> None:
    # Through .data, so that a graph the user holds does not see a new version; and only where something changed.
    if tensor.shape != value.shape:
        tensor.data = value
    elif not torch.equal(tensor.detach(), value):
        tensor.data.copy_(value)


class Untouched:
    """What `leave_no_trace` yields: evaluates closures and trial steps, always from the same random state.

    Attributes:
        remember: Takes in a module that is to be put back, although no closure may name or call it.
        reset: Puts back the modules met so far, as they will be at the end.
        differentiate_twice: From then on what is evaluated can be: attention runs on its math kernel.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        values: Sequence[Tensor],
        rng: RandomState,
        remember: Callable[[nn.Module], None],
        reset: Callable[[], None],
        differentiate_twice: Callable[[], None],
    ) -> None:
        self._params, self._values, self._rng = params, values, rng
        self.remember, self.reset, self.differentiate_twice = remember, reset, differentiate_twice
        self._called: list[Callable[[], Any]] = []

    def call(self, closure: Callable[[], Any]) -> Any:
        """Returns what the closure returns, evaluated from the random state at entry.

        Raises:
            ClosureError: It called `backward()`.
        """
        self._rng.restore()
        if not any(closure is known for known in self._called):
            self._called.append(closure)
            for module in modules_in(closure):
                self.remember(module)
        returned = closure()
        if any(p.grad is not None for p in self._params):
            raise ClosureError(
                "the closure called backward(); it must only return the loss, with its graph: "
                "lambda: criterion(model(x), y)"
            )
        return returned

    @contextlib.contextmanager
    def moved(self, steps: Sequence[Tensor | None], length: float = 1.0) -> Iterator[None]:
        """Adds `length` times `steps` to the parameters meanwhile."""
        try:
            for parameter, step in zip(self._params, steps, strict=True):
                if step is not None:
                    parameter.data.add_(step, alpha=length)
            yield
        finally:
            for parameter, value, step in zip(self._params, self._values, steps, strict=True):
                if step is not None and parameter.shape == value.shape:
                    parameter.data.copy_(value)  # it has changed, no need to look
                else:
                    _write_back(parameter, value)


def as_loss(returned: Any) -> Tensor:
    """Returns a closure's loss as a scalar with its graph.

    Raises:
        ClosureError: It is something other than one real number with a graph.
    """
    if not isinstance(returned, Tensor):
        got = type(returned).__name__
        hint = {"NoneType": "did it forget to return?", "float": "drop .item()", "int": "drop .item()"}
        mend = hint.get(got, "return the loss alone")
        raise ClosureError(f"the closure must return the loss as a tensor, got {got}; {mend}")
    if returned.numel() != 1 or not returned.is_floating_point():
        raise ClosureError(
            f"the closure must return one real number, got shape {tuple(returned.shape)}, {returned.dtype}; reduce it: "
            "loss.mean()"
        )
    if not returned.requires_grad:
        raise ClosureError(
            "the closure returned a detached loss (it has no graph); compute it from the parameters, outside "
            "no_grad() and without .detach()"
        )
    return returned.reshape(())


def modules_in(closure: Callable[..., object]) -> list[nn.Module]:
    """Returns the modules that a closure names: among its free variables, the globals it uses, what it is bound to, and
    one level deep inside those (a trainer's `self.model`, a list of models).

    Example:
        >>> model = nn.Linear(2, 1)
        >>> modules_in(lambda: model(torch.ones(2)))
        [Linear(in_features=2, out_features=1, bias=True)]
        >>> holder = {"model": model}
        >>> modules_in(lambda: holder["model"](torch.ones(2)))
        [Linear(in_features=2, out_features=1, bias=True)]
    """
    closure = inspect.unwrap(closure)
    found: list[object] = [closure, getattr(closure, "__self__", None)]
    if isinstance(closure, functools.partial):
        found += [*closure.args, *closure.keywords.values()]
        closure = closure.func
    if inspect.isfunction(closure) or inspect.ismethod(closure):
        names = inspect.getclosurevars(closure)
        found += [*names.nonlocals.values(), *names.globals.values()]
    found += [inner for item in list(found) for inner in _inside(item)]
    return list(dict.fromkeys(item for item in found if isinstance(item, nn.Module)))


def _inside(item: object) -> list[object]:
    if isinstance(item, dict):
        return list(item.values())
    if isinstance(item, (list, tuple)):
        return list(item)
    if isinstance(item, (nn.Module, type)) or inspect.ismodule(item) or inspect.isroutine(item):
        return []
    return list(getattr(item, "__dict__", {}).values())


@contextlib.contextmanager
def leave_no_trace(params: Sequence[Tensor]) -> Iterator[Untouched]:
    """Lets closures be evaluated inside, and puts everything back, bit for bit, also when one raises in the middle.

    Put back are the parameters, their `.grad` (the very same tensors) and `requires_grad`; of every module that a
    closure names or calls: buffers (BatchNorm's statistics), attributes (train/eval mode, hidden states and caches kept
    on `self`: tensors, lists, dicts), gradients; and the global random streams of Python, NumPy and torch. Modules are
    found in the closure's variables and by a forward pre-hook, so the model need not be handed over. The parameters'
    tensor hooks (`register_hook`) are set aside meanwhile. In effect:

        before = snapshot(); [p.grad = None for p in params]
        try: yield
        finally: restore(before)

    Gradients are recorded inside, whatever the mode outside. Compiled modules run eagerly, and scaled-dot-product
    attention on its math kernel once `differentiate_twice` was called: neither can be differentiated twice else.

    Out of reach: generator objects and iterators that the closure itself advances (a data loader's, say): draw the
    batch outside and let the closure use it.

    Args:
        params: The parameters, each once. Costs one copy of them.

    Yields:
        An `Untouched`, which evaluates closures under the random state at entry: a dropout mask is the same each time.

    Example:
        >>> layer = nn.BatchNorm1d(2)
        >>> with leave_no_trace(list(layer.parameters())) as untouched:
        ...     loss = untouched.call(lambda: layer(torch.randn(8, 2)).square().mean())
        >>> int(layer.num_batches_tracked)
        0
    """
    rng = RandomState.capture([p.device for p in params])
    values = [p.detach().clone() for p in params]
    modules: dict[nn.Module, _ModuleState] = {}
    twice = False

    def remember(module: nn.Module, args: object = None) -> None:
        if module in modules:
            return  # with its children; one that it is given later is met when it is called
        for child in module.modules():
            if child not in modules:
                modules[child] = state = _ModuleState(child)
                back.callback(state.restore)

    def reset() -> None:
        for state in modules.values():
            state.restore()

    def differentiate_twice() -> None:
        nonlocal twice
        if not twice:
            twice = True
            back.enter_context(sdpa_kernel(SDPBackend.MATH))

    with contextlib.ExitStack() as back:  # undoes all of it, last first, also when one part fails
        back.callback(rng.restore)
        for parameter, value in zip(params, values, strict=True):
            back.callback(_ParameterState(parameter).restore)
            back.callback(_write_back, parameter, value)
        handle = register_module_forward_pre_hook(remember)
        back.callback(handle.remove)
        back.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*when there are global hooks on modules.*")  # our own pre-hook
        back.enter_context(torch.inference_mode(False))
        back.enter_context(torch.enable_grad())
        back.enter_context(torch.compiler.set_stance("force_eager"))
        yield Untouched(params, values, rng, remember, reset, differentiate_twice)
