"""Start-up compiles every kernel that any round needs: a batch size or a draft length must not need
one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys


def test_one_kernel_serves_all_batch_sizes_and_draft_lengths():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.specops.compiled_kernels"]

    found = subprocess.run(command, env=environment, capture_output=True, text=True)

    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout) == {
        # drafting, verification, and laws of drafts that came without
        "_split_rows": 3,
        "_join_rows": 3,
        "_finish": 1,
        # drafts with a law, and without
        "_judge": 2,
        "_stop": 2,
        "_emit": 2,
        "_overlap": 1,
        # whether anybody adjusts or not
        "_adjust_part": 1,
        "_count_tokens": 1,
        # drafted by a network, and given
        "_open_round": 2,
        # greedy, sampled with and without log q
        "_close_round": 3,
        # logits of few rows, which are float32, and of many
        "_best_of_part": 2,
        # whole and reduced vocabulary
        "_join_best": 2,
        # one row tile
        "_attend_pages": 1,
        "_join_pages": 1,
        # rows of a request side by side, and rows of a step
        "_places": 2,
        # rows that were drafted, of one step
        "_norm_pair": 1,
        "_rope_and_write": 1,
        "_number_rows": 1,
        "_pack_rows": 1,
    }
