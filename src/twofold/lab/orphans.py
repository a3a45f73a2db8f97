"""Processes that end with the one that started them, however that ends."""

import os
import threading
import time


def end_with(parent: int) -> None:
    """End this process, from a thread of its own, as soon as `parent` is not its parent any more.

    Without this, what a killed command has started would go on, and keep the next one waiting for its runs.
    """
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
