"""`safe-lr measure`: how large an lr could be for a user's model, and what that says about theirs."""

from __future__ import annotations

import argparse
import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from safe_lr.commands.parsers import NEGATIVE, add_command, add_json, as_json

if TYPE_CHECKING:
    from safe_lr.measurement import Measurement

_ABOUT = """Imports MODULE:FUNCTION, calls it, and measures what it returns: (optimizer, closure), (model, optimizer,
closure), or a mapping with these keys. The closure returns the loss of a batch with its graph, and calls no backward().

It prints the curvature, every limit on lr, and what they say about the lr that the optimizer has. Exit status 1: that
lr is beyond the limit, or nothing could be measured."""

_COARSE = 0.5  # residual of the measurement before `--after`, which only asks whether there can be one
_YOUNG = (
    "the optimizer has made no update yet, and it is adaptive: its limit grows up to ten-thousandfold in the first "
    "updates. --after 20 measures then"
)


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "measure",
        _run,
        brief="measure the largest stable lr of your model",
        about=_ABOUT,
        examples=("measure train:make", "measure examples/quickstart.py:make --after 20 --bound coherence --json"),
    )
    parser.add_argument("target", metavar="MODULE:FUNCTION", help="what returns optimizer and closure")
    parser.add_argument("--bound", choices=("momentum", "coherence", "lemma1"), default="momentum")
    parser.add_argument(
        "--curvature", choices=("hessian", "gauss-newton", "fisher", "empirical-fisher"), default="hessian"
    )
    parser.add_argument("--tol", type=float, default=1e-3, help="relative residual of the eigenvalues (default .001)")
    parser.add_argument(
        "--after", type=int, default=0, metavar="N", help="make N protected updates on the closure's batch first"
    )
    add_json(parser)


def _run(args: argparse.Namespace) -> int:
    if args.after < 0:
        raise ValueError(f"--after {args.after} is negative: give a number of updates")
    quiet = contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext()
    with quiet:  # what the user's code prints is not the answer
        optimizer, found = _measured(args)
    members = optimizer if isinstance(optimizer, list | tuple) else [optimizer]
    lr = max(float(group["lr"]) for member in members for group in member.param_groups)
    word, text = verdict(lr, found.lr_limit, args.bound) if found.failure is None else ("failed", found.failure)
    young = _YOUNG if word != "failed" and any(map(_is_young, members)) else None
    notes = [note for note in (found.note, young) if note is not None]
    if args.json:
        fields = {name: value for name, value in asdict(found).items() if name != "vectors"}
        fields["note"] = "; ".join(notes) or None
        print(as_json({"lr": lr, "verdict": word, "explanation": text, "updates": args.after, **fields}))
    else:
        _print(found, lr, args.bound)
        print(f"verdict: {word}: {text}")
        for note in notes:
            print(f"note: {note}")
    return NEGATIVE if word in ("beyond", "failed") else 0


def _is_young(optimizer: Any) -> bool:
    """Whether it divides by second moments, and has none yet. Gradient descent's P is 1 from the first update on."""
    from safe_lr.ensemble import unwrapped
    from safe_lr.preconditioners import preconditioner_of

    optimizer = unwrapped(optimizer)
    return not optimizer.state and bool(preconditioner_of(optimizer).second_moments)


def _measured(args: argparse.Namespace) -> tuple[Any, Measurement]:
    """Calls the user's function; returns its optimizer, and what was measured.

    Raises:
        ValueError: The user's code failed (its traceback is printed), or returned something else.
    """
    from safe_lr.measurement import measure
    from safe_lr.sweeps import load_function

    make = load_function(args.target)
    with _users_own(args.target):
        made = make()
    optimizer, closure = _parts(made, args.target)
    settings = {"bound": args.bound, "curvature": args.curvature}
    try:
        if args.after:  # what cannot be measured now is not trained with either
            found = measure(optimizer, closure, tol=_COARSE, **settings)
            if found.failure is not None:
                return optimizer, found
            with _users_own(f"an update of {args.target}"):
                _protected_updates(optimizer, closure, args.after, settings)
        return optimizer, measure(optimizer, closure, tol=args.tol, **settings)
    except TypeError as error:
        raise ValueError(f"{args.target}: {error}") from error


@contextlib.contextmanager
def _users_own(what: str) -> Iterator[None]:
    """Turns what the user's code raises into our error: a status of 1 would be a verdict. Its traceback is printed."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        raise ValueError(f"{what} raised {type(error).__name__}: {error}") from error


def verdict(lr: float, lr_limit: float, bound: str) -> tuple[str, str]:
    """Returns what a limit says about an lr: `clear`, `close` or `beyond`, and a sentence.

    Example:
        >>> verdict(0.1, 0.5, "momentum")[0], verdict(0.4, 0.5, "momentum")[0], verdict(1.0, 0.5, "momentum")[0]
        ('clear', 'close', 'beyond')
    """
    used = lr / lr_limit
    where = f"lr {lr:.3g} is {used:.3g} times the {bound} limit {lr_limit:.3g}"
    if used > 1:
        return "beyond", f"{where}; linear theory says that it amplifies the sharpest direction"
    if used > 0.5:
        return "close", f"{where}; curvature need not grow much to pass it"
    return "clear", f"{where}"


def _print(found: Any, lr: float, bound: str) -> None:
    def text(value: float | None) -> str:
        return "not known" if value is None else f"{value:.6g}"

    rows = [
        ("loss", found.loss),
        ("lambda_max", found.lambda_max),
        ("p_min", found.p_min),
        ("p_min_all", found.p_min_all),
        ("gamma", found.gamma),
        ("lr", lr),
        *((f"limit {name}" + " (chosen)" * (name == bound), value) for name, value in found.limits.items()),
    ]
    for name, value in rows:
        print(f"{name:<28}{text(value)}")
    print(f"{'cost':<28}{found.num_matvecs} products, {found.cost:.3g} gradient evaluations, {found.seconds:.2g} s")


def _parts(returned: Any, target: str) -> tuple[Any, Callable[[], Any]]:
    """Optimizer and closure from what the user's function returned."""
    if isinstance(returned, Mapping):
        missing = {"optimizer", "closure"} - set(returned)
        if not missing:
            return returned["optimizer"], returned["closure"]
    elif isinstance(returned, tuple) and len(returned) in (2, 3):
        return returned[-2], returned[-1]
    raise ValueError(
        f"{target} returned {type(returned).__name__}: return (optimizer, closure), (model, optimizer, closure), or a "
        "mapping with these keys"
    )


def _loss(returned: Any, curvature: str) -> Any:
    """The loss to train on, from what a closure returns for that curvature."""
    if curvature in ("gauss-newton", "fisher"):
        outputs, loss_of_outputs = returned
        return loss_of_outputs(outputs)
    return returned.mean()  # per-example losses with the empirical Fisher, else the loss itself


def _protected_updates(optimizer: Any, closure: Callable[[], Any], updates: int, settings: dict[str, Any]) -> None:
    from safe_lr.guard import CoherenceGuard

    members = optimizer if isinstance(optimizer, list | tuple) else [optimizer]
    guard = CoherenceGuard(optimizer, loggers=None, credit=1e6, **settings)
    for _ in range(updates):
        for member in members:
            member.zero_grad()
        _loss(closure(), settings["curvature"]).backward()
        guard.observe(closure)
        for member in members:
            member.step()
    for member in members:
        member.zero_grad()
    guard.close()
