"""Start-up compiles every kernel that any round needs, so no batch size or draft length may need
its own specialisation."""

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
        # drafting, verification, and drafts without laws
        "_split_rows": 3,
        "_join_rows": 3,
        # delta drafts, dense drafts, and dense drafts of which some are certain
        "_judge": 3,
        "_stop": 3,
        "_emit": 3,
        "_overlap": 2,
        # with and without biases and penalties
        "_adjust_part": 1,
        "_count_tokens": 1,
        # with finished texts for few and for many requests, and without
        "_find_matches": 3,
        # with and without finished texts
        "_take_drafts": 2,
        # batches up to 32 and to 256, drafts up to 8 and to 16
        "_cut": 4,
        "_pack": 1,
        # whole rows and parts
        "_confidence_of_part": 2,
        "_join_confidence": 1,
        # neural drafts and given ones
        "_open_round": 2,
        # greedy, sampled with and without log q
        "_close_round": 3,
        # float32 logits of few rows, and logits of many
        "_best_of_part": 2,
        # whole and reduced vocabulary
        "_join_best": 2,
        # one row tile
        "_attend_pages": 1,
        "_join_pages": 1,
        # rows by request and rows by step
        "_places": 2,
        # draft rows of one step
        "_norm_pair": 1,
        "_rope_and_write": 1,
        "_number_rows": 1,
        "_pack_rows": 1,
    }
