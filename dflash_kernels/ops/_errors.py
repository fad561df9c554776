"""Errors of the Python face: the library raises RuntimeError only, users expect ValueError for a bad argument."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def dflash_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Turn the library's `dflash::<op>: <argument> must ...` into ValueError; other errors pass."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            message = str(error).splitlines()[0] if str(error) else ""
            if message.startswith("dflash::") and " must " in message:
                raise ValueError(message) from None
            raise

    return wrapper
