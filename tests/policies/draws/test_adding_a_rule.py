"""A new rule of drawing takes one file and one line in the catalog; settings then select it."""

from __future__ import annotations

import json

from oracles.one_line import run_in, with_addition

NEWEST = '''
"""The newest traces, whatever else there is."""

import numpy as np


def draw(pool, settings, random):
    return np.argsort(pool.age_N)
'''
LINE = '    "newest": Entry("policies.draws.newest:draw"),'

PLAY = """
import json, sys
from pathlib import Path

import numpy as np
import policies
from configs.load import load_settings
from policies.draws.catalog import draw_rule
from policies.draws.interface import Pool

assert Path(policies.__file__).is_relative_to(Path.cwd()), policies.__file__

trainer = load_settings((), sys.argv[1:], {}).trainer
ages, same = np.array([2, 0, 1]), np.zeros(3, dtype=np.int64)
pool = Pool(ages, same, same + 1, same == 0, 0, same, same, np.full(3, np.nan))
order = draw_rule(trainer.draw)(pool, trainer, np.random.default_rng(0))
print(json.dumps(order.tolist()))
"""


def test_a_rule_is_one_file_and_one_catalog_line(tmp_path):
    root = with_addition(
        tmp_path,
        "policies/draws/newest.py",
        NEWEST,
        "policies/draws/catalog.py",
        LINE,
        after='    "turns": ',
    )

    done = run_in(root, PLAY, "trainer.draw=newest")

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [1, 2, 0]
    other = run_in(root, PLAY, "trainer.draw=newer")
    assert other.returncode == 1
    assert "trainer.draw 'newer' is unknown; known: " in other.stderr
    assert "did you mean 'newest'?" in other.stderr
