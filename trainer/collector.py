"""Python's garbage collector, which need not walk through the libraries. Imports no torch."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def frozen_imports() -> Iterator[None]:
    """Keeps all that is imported within from the garbage collector, for as long as the process lives.

    Collections during the imports find nothing, and later ones would visit 750,000 objects of the libraries.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
