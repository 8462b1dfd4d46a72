"""Version of the installed package."""

from __future__ import annotations

from importlib import metadata

PACKAGE = "slipstream-serving"


def package_version() -> str:
    """Version of the installed package; ``source`` in a checkout that is not installed."""
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return "source"
