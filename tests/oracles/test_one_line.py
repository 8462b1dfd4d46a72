"""The copy with one addition runs its own code, and the addition is exactly one line."""

import pytest

from oracles.one_line import run_in, with_addition
from oracles.support import REPOSITORY


def test_a_copy_runs_the_new_file_and_differs_by_one_line(tmp_path):
    root = with_addition(
        tmp_path,
        "buffer/greeting.py",
        "WORD = 'hello'\n",
        "buffer/__init__.py",
        "# more",
        after='"""',
    )
    code = "import buffer.greeting, sys; print(buffer.__file__, buffer.greeting.WORD, sys.argv[1])"
    done = run_in(root, code, "world")

    assert done.stdout == f"{root}/buffer/__init__.py hello world\n", done.stderr
    before = (REPOSITORY / "buffer" / "__init__.py").read_text()
    assert (root / "buffer" / "__init__.py").read_text() == before + "# more\n"


def test_a_marker_that_is_missing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="on exactly one line, has 0"):
        with_addition(
            tmp_path, "buffer/new.py", "", "buffer/__init__.py", "# more", after="no such text"
        )


def test_an_existing_file_is_not_replaced(tmp_path):
    with pytest.raises(ValueError, match="exists already"):
        with_addition(tmp_path, "buffer/cli.py", "", "buffer/__init__.py", "# more", after='"""')


def test_an_addition_of_two_lines_is_refused(tmp_path):
    with pytest.raises(ValueError, match="an addition is one line"):
        with_addition(
            tmp_path, "buffer/new.py", "", "buffer/__init__.py", "# one\n# two", after='"""'
        )
