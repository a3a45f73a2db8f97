"""This process, and the others that torchrun started with it: run after run, each computed by all of them."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Here:
    """One run at a time, at once: whoever submits waits for it."""

    slots, isolated = 1, False

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        """Compute function(*arguments) in this process."""
        done: Future = Future()
        done.set_result(function(*arguments))
        return done

    def stop(self) -> None:
        """Nothing is being computed but in the caller itself."""
