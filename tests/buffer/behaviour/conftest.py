"""Every test here runs on every kind of buffer; see ``oracles.places``."""

import os

import pytest

from oracles.forked import Forked
from oracles.places import PLACES, STORES, close_servers
from oracles.support import REPOSITORY


@pytest.fixture(scope="session")
def servers():
    """Ends the servers that tests have started."""
    yield
    close_servers()


def pytest_generate_tests(metafunc):
    """Stores of versions alone are for the tests of versions."""
    if "place" in metafunc.fixturenames:
        is_of_versions = "weights" in metafunc.module.__name__
        names = [*PLACES, *(STORES if is_of_versions else ())]
        metafunc.parametrize("place", names, indirect=True)


@pytest.fixture
def place(request, tmp_path, servers):
    """This test's own buffer."""
    made = (PLACES | STORES)[request.param](tmp_path)
    if (lack := made.lacks.get(request.node.originalname)) is not None:
        pytest.skip(lack)
    return made


@pytest.fixture
def open_buffer(place):
    """Open this test's buffer; a second call opens the same one again, as a restart would."""
    return place.open


@pytest.fixture
def other_process(place):
    """A place that processes can share; skips the test on others."""
    if not place.for_processes:
        pytest.skip("this buffer lives in one process")
    return place


@pytest.fixture
def fork_python(tmp_path):
    """Run ``python -c`` in a process of its own; returns it and a function that reads its output.
    It is killed at the end if it still runs."""
    started = []

    def fork(code, *arguments):
        output = tmp_path / f"output-{len(started)}"
        path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
        env = {**os.environ, "PYTHONPATH": path}
        process = Forked(["-c", code, *map(str, arguments)], env, tmp_path, output)
        started.append(process)
        return process, lambda: output.read_text()

    yield fork
    for process in started:
        process.kill()
