"""The replaceable parts of the method, by name or by the dotted path of a user's own.

A built-in part is a file: ``loss.reward: mixed`` is the function ``mixed`` of
``quietstar/rewards/mixed.py``. A user's own is ``module:name``, as in ``my_rewards:brevity``, found
wherever Python finds modules and in the working directory.
"""

import contextlib
import contextvars
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import traceback
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from quietstar.errors import UserError, reason_of


class Kind(NamedTuple):
    """One kind of replaceable part.

    Attributes:
        package: Package whose modules are the built-in parts.
        method: Method of a class, named as its module in CamelCase; None for functions.
        parameters: Parameters of the function or method, ``self`` not counted.
        base: Class that it must be derived from, as ``module.Class``; None for any.
    """

    package: str
    method: str | None
    parameters: tuple[str, ...]
    base: str | None = None


KINDS = {
    "loss.reward": Kind("quietstar.rewards", None, ("thoughts", "scores")),
    "loss.objective": Kind(
        "quietstar.objectives", "weigh", ("reward", "scores"), "quietstar.objectives.Objective"
    ),
    "thoughts.sampler": Kind(
        "quietstar.sampling.samplers", "sample", ("model", "texts", "positions", "spec")
    ),
}
"""Config key -> what may be named there."""
TRUST_REMEDY = (
    "If you trust it: --trust-remote-code, or in training --model.trust_remote_code true."
)

NEVER_TRUSTED = "Of a judge none runs: give a model whose architecture transformers has."


def choices(key: str) -> list[str]:
    """List the built-in parts that a config key may name."""
    spec = importlib.util.find_spec(KINDS[key].package)  # without importing it, and torch
    assert spec is not None, KINDS[key].package
    paths = spec.submodule_search_locations
    return sorted(m.name for m in pkgutil.iter_modules(paths) if m.name[0] != "_")


def weighted_parts(name: str) -> list[tuple[float, str]]:
    """Split a sum such as ``0.2*my_rewards:brevity + thought`` into weights and names.

    Raises:
        UserError: A weight is no number.
    """
    parts = []
    for term in name.split("+"):
        weight, star, part = term.rpartition("*")
        try:
            parts.append((float(weight) if star else 1.0, part.strip()))
        except ValueError:
            raise UserError(
                f"loss.reward ({name}): {weight.strip()!r} must be a number, as in "
                "0.2*my_rewards:brevity + my_rewards:correct. Correct it."
            ) from None
    return parts


def reads_texts(function: Any) -> bool:
    """Tell whether a reward is a function of texts, with TRL's signature, and not of tensors."""
    try:
        return "completions" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def check(key: str, name: str) -> None:
    """Refuse a name that stands for nothing, as `find` does; a built-in part is not imported.

    Nor is one of the user's own while nothing is trusted: to read a run's config, only its
    objective has to be known.
    """
    known, kind_has_settings = choices(key), KINDS[key].base is not None
    if key == "loss.reward" and ("+" in name or "*" in name):
        for _, part in weighted_parts(name):
            check(key, part)
    elif ":" in name:
        if code_is_trusted() or kind_has_settings:
            find(key, name)
    elif name not in known:
        near = get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"{key} ({name}): there is none of this name{hint} (built in: {', '.join(known)}; one "
            "of your own is written module:name)"
        )


def find(key: str, name: str) -> Any:
    """Import the part that ``name`` (of a built-in one, or ``module:name``) stands for.

    Raises:
        UserError: There is no such part, its module cannot be imported, or it cannot be called as
            such parts are.
    """
    kind = KINDS[key]
    if ":" not in name:
        check(key, name)
        words = name.split("_")
        attribute = name if kind.method is None else "".join(word.capitalize() for word in words)
        return getattr(importlib.import_module(f"{kind.package}.{name}"), attribute)
    module, _, attribute = name.partition(":")
    if (
        not re.fullmatch(r"\w+(\.\w+)*", module)
        or module.endswith(".py")
        or not attribute.isidentifier()
    ):
        raise UserError(
            f"{key} ({name}): a part of your own is written module:name, such as my_module:mine, "
            "without .py."
        )
    part = _import_part(key, name, module, attribute)
    called = part if kind.method is None else getattr(part, kind.method, None)
    wanted = f"{kind.method or attribute}({', '.join(kind.parameters)})"
    if not callable(called):
        raise UserError(f"{key} ({name}): it has no method {kind.method}. Define {wanted}.")
    if kind.base is not None:
        package, _, base = kind.base.rpartition(".")
        ancestor = getattr(importlib.import_module(package), base)
        if not (inspect.isclass(part) and issubclass(part, ancestor)):
            raise UserError(f"{key} ({name}): it must be a class derived from {kind.base}.")
        is_inherited = kind.method is not None and called is getattr(ancestor, kind.method)
        if is_inherited and getattr(part, "thinks", True):
            raise UserError(
                f"{key} ({name}): it has no method {kind.method} of its own. Define {wanted}."
            )
    # A method is looked up on its class, where self is a parameter too.
    is_method = kind.method is not None and inspect.isclass(part)
    try:
        signature = inspect.signature(called)
    except (TypeError, ValueError):  # of some functions in C nobody knows it
        raise UserError(
            f"{key} ({name}): its parameters are not known. Write a function that calls it."
        ) from None
    if key == "loss.reward" and reads_texts(called):
        return part
    try:
        signature.bind(*((None,) * is_method), *kind.parameters)
    except TypeError:
        raise UserError(
            f"{key} ({name}): its signature is {attribute}{signature}, but it is "
            f"called as {wanted}. Change its parameters."
        ) from None
    return part


@contextlib.contextmanager
def trusting(code: bool) -> Iterator[None]:
    """Read what lies in a folder, which may be anybody's: it may name code only if ``code`` is set.

    Where it is not, `find` takes only modules that are imported already, and a config that is
    loaded inside has ``model.trust_remote_code`` off.
    """
    token = _is_trusted.set(code)
    try:
        yield
    finally:
        _is_trusted.reset(token)


def code_is_trusted(of_a_run: bool = False) -> bool:
    """Tell whether what is read now may name code; what a run wrote may only inside `trusting`."""
    is_trusted = _is_trusted.get()
    return not of_a_run if is_trusted is None else is_trusted


_is_trusted = contextvars.ContextVar[bool | None]("code_is_trusted", default=None)


def _import_part(key: str, name: str, module: str, attribute: str) -> Any:
    """Import a module of the user's, which may do and raise anything, and take a name of it."""
    if not code_is_trusted() and module not in sys.modules:
        raise UserError(
            f"{key} ({name}): names code, which is not run because a file of a folder says so. "
            f"Name it on the command line or in a config of your own, import {module} first, or "
            "trust it: in training --model.trust_remote_code true, for a report --trust-code."
        )
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what it prints is no output of ours
            loaded = importlib.import_module(module)
            if hasattr(loaded, attribute):
                return getattr(loaded, attribute)
    except KeyboardInterrupt:  # Ctrl-C, or a signal
        raise
    except BaseException as problem:  # it may call sys.exit, too
        reason = f"{type(problem).__name__}: {problem}".splitlines()[0]
        raise UserError(
            f"{key} ({name}): the module {module} cannot be imported ({reason}). Put {module}.py "
            "into the working directory or on PYTHONPATH, and fix what fails in it."
        ) from problem
    where = getattr(loaded, "__file__", None) or module
    near = get_close_matches(attribute, vars(loaded), 1)
    hint = f"; did you mean {near[0]}?" if near else ". Define it, or correct the name."
    raise UserError(f"{key} ({name}): {where} defines no {attribute}{hint}")


@contextlib.contextmanager
def running(key: str, name: str) -> Iterator[None]:
    """Blame a part of the user's own for what it raises inside; a built-in one is left alone.

    Raises:
        UserError: In place of any exception but a full memory, with the line that raised it.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except (Exception, SystemExit) as problem:
        if ":" not in name or "OutOfMemory" in type(problem).__name__:
            raise
        file = getattr(sys.modules.get(name.partition(":")[0]), "__file__", None)
        frames = traceback.extract_tb(problem.__traceback__)
        lines = [f" in line {frame.lineno} of {file}" for frame in frames if frame.filename == file]
        raise UserError(
            f"{key} ({name}): it raised {type(problem).__name__} ({reason_of(problem)})"
            f"{lines[-1] if lines else ''}. Mend it."
        ) from problem
