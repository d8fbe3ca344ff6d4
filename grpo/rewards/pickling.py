"""Pickle a reward function by value, with everything that it uses from modules that are not installed."""

from __future__ import annotations

import copyreg
import functools
import site
import sys
import sysconfig
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TypeAlias

import cloudpickle

from grpo.suggest import one_line
from grpo.types import UserError

Returned: TypeAlias = float | Mapping[str, float] | Sequence[float | None] | None
RewardFunction: TypeAlias = Callable[..., Returned | Awaitable[Returned]]

MAX_BYTES = 1 << 25
"""Maximum size of a pickled function. More than this is data, which belongs in a file."""
INSTALLED = (
    *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    *site.getsitepackages(),
    *site.getsitepackages([sys.base_prefix]),
    site.getusersitepackages(),
    str(Path(__file__).parents[1]),
)
"""Folders whose modules every worker can import, this package among them."""
Cached: TypeAlias = functools._lru_cache_wrapper


def pickled(function: RewardFunction, where: str) -> bytes:
    """Return the function by value. Raises UserError naming what cannot be pickled."""
    try:
        with by_value():
            content = cloudpickle.dumps(function)
    except Exception as error:  # whatever the values of the user raise
        raise UserError(
            f"{where} cannot be sent to the reward workers: {one_line(error, 200)}; create it inside the "
            "function, or put the function into a file and give its path"
        ) from error
    if len(content) > MAX_BYTES:
        raise UserError(
            f"{where} uses {len(content) >> 20} MiB of data, and at most {MAX_BYTES >> 20} MiB are sent to the reward "
            "workers; read it from a file inside the function"
        )
    assert isinstance(content, bytes)
    return content


@contextmanager
def by_value() -> Iterator[None]:
    """Make cloudpickle pickle the content of modules that are not installed: a worker may not find them.

    This includes functions with functools.lru_cache, which pickle would import.
    """
    before = cloudpickle.list_registry_pickle_by_value()
    local = [
        module
        for name, module in list(sys.modules.items())
        if type(module) is ModuleType
        and name == module.__name__ != "__main__"
        and name not in before
        and not is_installed(module)
    ]
    for module in local:
        cloudpickle.register_pickle_by_value(module)
    copyreg.pickle(Cached, reduce_cached)
    try:
        yield
    finally:
        del copyreg.dispatch_table[Cached]
        for module in local:
            cloudpickle.unregister_pickle_by_value(module)


def reduce_cached(function: Cached[Returned]) -> str | tuple[Callable[..., Cached[Returned]], tuple[RewardFunction]]:
    """Return how to pickle a cached function: by its name if a worker can import it, else with an empty cache."""
    if not is_local(function.__wrapped__):
        return function.__qualname__
    return functools.lru_cache(**function.cache_parameters()), (function.__wrapped__,)


def is_local(value: RewardFunction | type) -> bool:
    """Return whether `value` is from a module that a worker may not find."""
    module = sys.modules.get(value.__module__ or "")
    return module is None or not is_installed(module)


def is_installed(module: ModuleType) -> bool:
    """Return whether a worker can import the module."""
    file = getattr(module, "__file__", None)
    if module.__name__ == "__main__":
        return False
    return not isinstance(file, str) or any(Path(file).is_relative_to(place) for place in INSTALLED)
