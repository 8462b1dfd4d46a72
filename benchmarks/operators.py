"""Faults that users and operators of other servers reported: are they absent here?

    python -m benchmarks.operators              # all rows; about five minutes on two cores
    python -m benchmarks.operators --rows 3,8   # some of them, e.g. on a GPU

Each row is one kind of fault and the tests that show its absence, for the input that was reported
and for its neighbours. They run in a process of their own, and a row says how many of their cases
passed, failed and were skipped.

Writes ``operators.json`` and ``rows/operators.json`` in ``benchmarks/results``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.harness.results import (
    RESULTS,
    Out,
    Row,
    at_least,
    at_most,
    say,
    write_result,
    write_rows,
)
from oracles.support import REPOSITORY

SOURCE = "python -m benchmarks.operators"
FEWEST = 4
"""Cases of a row: the input that was reported and three neighbours."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind of fault."""

    name: str
    tests: dict[str, tuple[str, ...]]
    """File in ``tests`` -> names of tests; none: all of the file."""


FAULTS = {
    1: Fault(
        "the space between prompt and answer",
        {
            "serving/engine/test_text.py": (),
            "serving/http/test_text.py": (
                "test_the_space_after_the_prompt_is_kept",
                "test_the_space_of_a_text_that_begins_with_the_answer_is_not",
                "test_a_stream_says_what_the_answer_says",
                "test_every_alternative_is_reported",
            ),
            "serving/engine/test_vocabulary.py": ("test_no_two_tokens_have_one_name",),
        },
    ),
    2: Fault(
        "special tokens as stop strings, shown and skipped",
        {
            "serving/engine/test_detokenize.py": (),
            "serving/http/test_text.py": (
                "test_a_special_token_in_an_answer",
                "test_the_end_of_text_is_shown_only_on_demand",
            ),
        },
    ),
    3: Fault(
        "a target that computes NaN",
        {
            "serving/engine/test_unsound_rows.py": (),
            "serving/engine/test_answers_on_devices.py": (
                "test_a_poisoned_request_does_not_touch_its_neighbours",
            ),
            "serving/http/test_unsound_target.py": (),
        },
    ),
    4: Fault(
        "cached prompts of another tenant",
        {
            "serving/engine/test_prefix_cache.py": (),
            "serving/http/test_openai_client.py": (
                "test_a_prompt_seen_before_is_cached",
                "test_a_prompt_is_cached_for_its_own_tenant_and_salt_only",
                "test_a_salt_is_a_text_of_1_to_1024_characters",
            ),
        },
    ),
    5: Fault("two servers on one port", {"serving/http/test_port.py": ()}),
    6: Fault(
        "a disk that is full or cannot be written at start",
        {
            "serving/test_without_a_disk.py": (),
            "serving/http/test_server_file.py": (
                "test_a_disk_that_refuses_it_is_said_once_and_tried_again",
                "test_a_full_disk_leaves_no_half_file",
            ),
        },
    ),
    7: Fault(
        "a run folder that is shared or deleted while serving",
        {
            "serving/http/test_server_file.py": (),
            "buffer/test_deleted_log.py": (),
        },
    ),
    8: Fault(
        "log probabilities of accents, emoji and special tokens",
        {
            "serving/http/test_logprobs.py": (),
            "serving/engine/test_vocabulary.py": (),
            "serving/engine/test_answers_on_devices.py": (
                "test_offsets_and_values_are_those_of_the_tokens",
            ),
            "serving/http/test_text.py": (
                "test_offsets_point_at_the_tokens",
                "test_the_bytes_of_a_chat_are_its_text",
            ),
        },
    ),
    9: Fault(
        "a length that the target was not made for",
        {
            "serving/test_model_len.py": (),
            "targets/test_find.py": (
                "test_positions_are_those_of_the_config_after_scaling",
                "test_a_target_may_name_its_positions_otherwise_or_have_no_end",
            ),
        },
    ),
    10: Fault(
        "seeded answers that change with drafts, batch and restart",
        {
            "benchmarks/test_flips.py": (
                "test_seeded_answers_are_the_same_in_all_ways_and_after_a_restart",
                "test_a_dependence_on_k_is_counted_in_the_ways_that_have_it",
                "test_a_dependence_on_the_batch_is_counted",
                "test_one_answer_that_changes_once_is_one_flip",
            ),
            "serving/engine/test_same_as_plain.py": (),
            "serving/http/test_same_as_plain.py": (),
            "serving/engine/test_greedy_equality.py": (
                "test_a_seeded_request_answers_the_same_with_and_without_drafts",
            ),
            "specops/test_rng.py": (),
        },
    ),
    11: Fault(
        "a chat that fills the context",
        {
            "serving/http/test_text.py": (
                "test_a_chat_near_the_end_of_the_context",
                "test_a_completion_without_max_tokens_takes_what_fits",
            ),
            "serving/http/test_openai_client.py": (
                "test_chat_without_a_limit_fills_the_context",
                "test_no_completion_tokens_is_an_answer_too",
            ),
        },
    ),
    12: Fault(
        "a learning rate that blows up",
        {
            "trainer/test_loop.py": (
                "test_a_nan_gradient_never_reaches_a_bundle",
                "test_weights_that_went_wrong_are_restored_and_the_rate_is_halved",
                "test_an_absurd_learning_rate_publishes_nothing",
                "test_weights_that_are_published_already_are_no_new_version",
                "test_a_learning_rate_that_blows_up_never_publishes_a_version_again",
                "test_without_a_sound_checkpoint_broken_weights_are_those_of_the_version_again",
            ),
            "trainer/test_worth.py": ("test_no_two_published_versions_are_equal",),
            "trainer/test_gate.py": ("test_an_equal_candidate_does_not_pass_a_margin",),
        },
    ),
    13: Fault(
        "a damaged checkpoint",
        {
            "trainer/test_checkpoint.py": (),
            "trainer/test_loop.py": (
                "test_a_trainer_goes_on_from_the_older_checkpoint_if_the_newest_is_damaged",
                "test_what_a_damaged_checkpoint_alone_had_learnt_is_trained_on_again",
                "test_a_damaged_checkpoint_is_never_a_fresh_start",
            ),
        },
    ),
    14: Fault(
        "a target or tokenizer that is damaged or does not fit",
        {
            "targets/test_find.py": (),
            "serving/engine/test_text.py": (
                "test_the_text_does_not_depend_on_where_steps_end",
                "test_byte_fallback_reads_as_in_sentencepiece",
            ),
        },
    ),
    15: Fault(
        "an operator's first hour",
        {
            "serving/http/test_server_file.py": (
                "test_a_second_server_leaves_it_alone_and_takes_over_later",
                "test_a_start_removes_that_of_a_dead_server_only",
            ),
            "serving/test_without_a_disk.py": (),
            "serving/http/test_admin.py": (
                "test_an_order_without_a_body_needs_no_content_type",
                "test_a_web_page_still_cannot_order_anything",
                "test_a_slash_at_the_end_of_a_path_changes_nothing",
                "test_a_slash_at_the_end_opens_no_door",
            ),
            "buffer/test_deleted_log.py": (
                "test_traces_are_their_owners_alone_to_read",
                "test_folders_that_a_reader_makes_are_their_owners_alone_too",
            ),
            "trainer/test_checkpoint.py": ("test_checkpoints_are_their_owners_alone_to_read",),
            "trainer/test_loop.py": ("test_version_0_stays_whatever_is_published_after_it",),
            "configs/test_options.py": (),
        },
    ),
    16: Fault(
        "HTTP of proxies, probes and libraries; chat templates; long prompts (not reported here)",
        {
            "serving/http/test_prompts.py": (),
            "serving/http/test_http.py": (),
            "serving/http/test_connections.py": (),
            "serving/http/test_chat_templates.py": (),
            "serving/http/test_hostile.py": (
                "test_a_body_of_two_lengths_is_refused_and_nothing_behind_it_is_read",
                "test_a_body_in_chunks_is_read",
            ),
        },
    ),
}


Found = dict[tuple[str, str], Counter[str]]
"""(file in ``tests``, name of a test) -> number of its cases by outcome."""


def run_tests(files: Iterable[str], root: Path = REPOSITORY) -> Found:
    """Run the tests of some files in ``root / "tests"``, in one process.

    Raises:
        RuntimeError: the tests could not be run to their end.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-q", "--no-header", "-o", "junit_family=xunit1"),
                *(f"--junitxml={report}", *sorted(f"tests/{file}" for file in set(files))),
            ],
            cwd=root,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode not in (0, 1):
            raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout[-2000:]}")
        return read_report(report)


def read_report(path: Path) -> Found:
    """Outcomes in a report in JUnit's format."""
    found: Found = {}
    for case in ElementTree.parse(path).iter("testcase"):
        file = case.attrib["file"].removeprefix("tests/")
        name = case.attrib["name"].partition("[")[0]
        tags = {child.tag for child in case}
        outcome = "failed" if tags & {"failure", "error"} else "passed"
        outcome = "skipped" if "skipped" in tags else outcome
        found.setdefault((file, name), Counter())[outcome] += 1
    return found


def counted(fault: Fault, found: Found) -> Counter[str]:
    """Cases of a fault's tests by outcome; ``missing``: tests that do not exist."""
    total: Counter[str] = Counter()
    for file, names in fault.tests.items():
        for name in names or sorted(n for f, n in found if f == file) or ("",):
            total += found.get((file, name), Counter(missing=1))
    return total


def rows_of(numbers: Sequence[int], counts: dict[int, Counter[str]]) -> list[Row]:
    """The claims."""
    rows = []
    for number in numbers:
        name, count = f"row {number}: {FAULTS[number].name}", counts[number]
        wrong = count["failed"] + count["missing"]
        rows.append(at_least(name, "cases that pass", count["passed"], FEWEST))
        rows.append(at_most(name, "cases that fail", wrong, 0))
    return rows


def main(
    out: Out = RESULTS / "operators.json",
    rows: Annotated[str, typer.Option(help="numbers; empty: all")] = "",
) -> None:
    """Run the tests of the rows and write what came."""
    began = time.monotonic()
    numbers = [int(number) for number in rows.split(",") if number] or list(FAULTS)
    if unknown := sorted(set(numbers) - set(FAULTS)):
        raise typer.BadParameter(f"unknown rows {unknown}; known: 1 to {max(FAULTS)}")
    found = run_tests(file for number in numbers for file in FAULTS[number].tests)
    counts = {number: counted(FAULTS[number], found) for number in numbers}
    for number, count in counts.items():
        say(f"{number}, {FAULTS[number].name}: {dict(count)}")
    claims = rows_of(numbers, counts)
    table = [{"row": number, "fault": FAULTS[number].name, **counts[number]} for number in numbers]
    write_result(out, {"seconds": time.monotonic() - began, "rows": table})
    write_rows("operators", claims, SOURCE, out.parent)
    if not all(row.holds for row in claims):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
