"""Undoes registrations of rules and methods, so that no other test sees them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from parse import registry


@contextmanager
def temporary_registrations() -> Iterator[None]:
    """Removes at its end the rules and methods that were registered inside."""
    registries: list[dict[str, Any]] = [registry.RULES, registry.METHODS]
    saved = [dict(entries) for entries in registries]
    try:
        yield
    finally:
        for entries, before in zip(registries, saved, strict=True):
            entries.clear()
            entries.update(before)
