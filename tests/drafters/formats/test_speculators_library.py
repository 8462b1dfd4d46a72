"""What we export is loaded by vLLM's ``speculators`` with the same logits, and read back from it.

Skipped where that package is not installed: it is no dependency, because it brings datasets,
torchvision and torchaudio along. ``python -m oracles.speculators_library`` runs the same with all
variants.
"""

from __future__ import annotations

import pytest

from oracles.speculators_library import TOLERANCE, VARIANTS, compare

pytest.importorskip("speculators", reason="needs the package speculators: pip install speculators")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "variants", "is_reduced"),
    [
        ("eagle3", (), True),
        ("eagle3", VARIANTS, False),
        ("p_eagle", (), True),
        ("p_eagle", VARIANTS[:2], False),
        ("dflash", (), False),
        ("dflash", ("window", "both_ways"), False),
        ("mtp", (), False),
        ("mtp", ("gate",), False),
    ],
)
def test_the_library_computes_our_logits_and_keeps_our_tensors(
    tmp_path, kind, variants, is_reduced
):
    worst, same = compare(tmp_path, kind, variants, is_reduced)

    assert worst < TOLERANCE
    assert same
