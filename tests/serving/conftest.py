"""What tests of the server run under."""

from __future__ import annotations

import pytest

from drafters.suffix import compiled


@pytest.fixture(scope="session", autouse=True)
def the_search_is_compiled() -> None:
    """A server loads the search of its index in the background, and finds no match before it is
    there. Here it is: in this process, and on the disk for servers in others."""
    compiled.wait()
