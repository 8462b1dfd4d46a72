"""Dispatch by device: kernels for tensors on a GPU, torch definitions for all others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from specops import (
    allocation,
    attention,
    capture_pack,
    draft_sampling,
    lane_penalties,
    lanes_host,
    listed,
    matches,
    text_first,
)
from specops import best_ids as best_definition
from specops import chain_attention as chains_definition
from specops import distill as distill_definition
from specops import trained_rows as rows_definition
from specops import verify_logits as logits_definition
from specops.allocation import CutValues, HeadWeights, PackedRows, Score
from specops.attention import DecodePass, PagedPass, Places
from specops.capture_pack import PackRing
from specops.chain_attention import Anchors
from specops.distill import (
    Distilled,
    LabelFigures,
    LossKind,
    Rows,
    Teacher,
    TeacherOrder,
    Weigh,
)
from specops.draft_sampling import Drafted, DraftLaw, Instead, VocabMap
from specops.lane_penalties import LaneRequests, LaneTables
from specops.lanes import ClosedRound, Field, LaneState, OpenedRound
from specops.matches import Bounds, RingText, TextDrafts
from specops.rng import Numbering
from specops.sampling import SamplingRows
from specops.text_first import Begun
from specops.verify_logits import LogitVerdict, Rule


def prepare_pass(
    decode: DecodePass, num_query: int, heads_per_key: int = 0
) -> DecodePass | PagedPass:
    """The pass as every layer's ``decode_attention`` takes it: unchanged on a GPU; on a CPU, as
    slots and masks listed once, because finding them in each layer would take half of a step.

    Args:
        num_query: rows of each request.
        heads_per_key: query heads of a key head in all layers; 0: not known.
    """
    if decode.first_R.is_cuda:
        return decode
    return listed.listed_pass(decode, num_query, heads_per_key)


def prepare_steps(
    decode: DecodePass, first_KR: Tensor, num_steps: int, heads_per_key: int = 0
) -> Sequence[DecodePass | PagedPass]:
    """``prepare_pass`` of single rows at consecutive positions, one pass for each step.

    Args:
        first_KR: [K, R] int32 position of each request's row at each step.
        num_steps: K.
        heads_per_key: see ``prepare_pass``.
    """
    if decode.first_R.is_cuda:
        return [replace(decode, first_R=first_R) for first_R in first_KR.unbind()]
    return listed.listed_steps(decode, num_steps, heads_per_key)


def decode_attention(
    q_THD: Tensor,
    k_THD: Tensor | None,
    v_THD: Tensor | None,
    keys: Tensor,
    values: Tensor,
    paged: DecodePass | PagedPass,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    pinned: bool = False,
) -> Tensor:
    """See ``specops.attention.decode_attention``.

    Args:
        paged: a pass as it is, or from ``prepare_pass``.
        pinned: a row's result does not depend on the other rows; GPU only.
    """
    if isinstance(paged, PagedPass):
        if k_THD is None or v_THD is None:
            return attention.attend_listed(q_THD, keys, values, paged, scale, window, softcap)
        return attention.paged_attention(
            q_THD, k_THD, v_THD, keys, values, paged, scale, window, softcap
        )
    attend: attention.AttendPages = attention.attend_pages
    write = attention.write_rows
    if q_THD.is_cuda:
        from specops import (
            attention_triton,
            overlap_triton,
        )  # Triton is installed wherever there is a GPU

        overlap = overlap_triton.can_overlap(q_THD.device)
        attend = partial(attention_triton.attend_pages, overlap=overlap, pinned=pinned)
        write = attention_triton.write_rows
    return attention.decode_attention(
        q_THD, k_THD, v_THD, keys, values, paged, scale, window, softcap, attend, write
    )


def places_of(decode: DecodePass, num_query: int, *, by_step: bool = False) -> Places:
    """See ``specops.attention.places_of``."""
    if decode.first_R.is_cuda:
        from specops import attention_triton

        return attention_triton.places_of(decode, num_query, by_step=by_step)
    return listed.places_of(decode, num_query, by_step=by_step)


def sample_draft(
    logits_RD: Tensor,
    sampling: SamplingRows,
    numbering: Numbering,
    greedy_R: Tensor,
    vocab: VocabMap | None,
    *,
    instead: Instead | None = None,
) -> Drafted:
    """See ``specops.draft_sampling.sample_draft``."""
    if logits_RD.is_cuda:
        from specops import draft_sampling_triton, overlap_triton

        return draft_sampling_triton.sample_draft(
            logits_RD, sampling, numbering, greedy_R, vocab, instead=instead,
            overlap=overlap_triton.can_overlap(logits_RD.device),
        )  # fmt: skip
    return draft_sampling.sample_draft(
        logits_RD, sampling, numbering, greedy_R, vocab, instead=instead
    )


def verify_logits(
    logits_RK1V: Tensor,
    sampling: SamplingRows,
    draft_RK: Tensor,
    lens_R: Tensor,
    rules_R: Tensor,
    numbering: Numbering,
    drafted: DraftLaw | None,
) -> LogitVerdict:
    """See ``specops.verify_logits.verify_logits``."""
    judge = logits_definition.verify_logits
    if logits_RK1V.is_cuda:
        from specops import verify_logits_triton

        judge = verify_logits_triton.verify_logits
    return judge(
        logits_RK1V, sampling, draft_RK, lens_R, rules_R, numbering, drafted, with_logprobs=False
    )


def adjust_rows(
    logits_RQV: Tensor, draft_RK: Tensor, requests: LaneRequests, tables: LaneTables
) -> None:
    """See ``specops.lane_penalties.adjust_rows``."""
    adjust = lane_penalties.adjust_rows
    if logits_RQV.is_cuda:
        from specops import lane_penalties_triton

        adjust = lane_penalties_triton.adjust_rows
    adjust(logits_RQV, draft_RK, requests, tables)


def count_tokens(
    emitted_RQ: Tensor, count_R: Tensor, requests: LaneRequests, tables: LaneTables
) -> None:
    """See ``specops.lane_penalties.count_tokens``."""
    count = lane_penalties.count_tokens
    if emitted_RQ.is_cuda:
        from specops import lane_penalties_triton

        count = lane_penalties_triton.count_tokens
    count(emitted_RQ, count_R, requests, tables)


def best_ids(
    logits: Tensor,
    d2t_D: Tensor | None = None,
    *,
    is_target: bool = False,
    instead: Instead | None = None,
) -> Tensor:
    """See ``specops.best_ids.best_ids``."""
    if logits.is_cuda:
        from specops import best_ids_triton, overlap_triton

        overlap = overlap_triton.can_overlap(logits.device)
        return best_ids_triton.best_ids(
            logits, d2t_D, is_target=is_target, instead=instead, overlap=overlap
        )
    return best_definition.best_ids(logits, d2t_D, is_target=is_target, instead=instead)


def confidence(logits_RD: Tensor) -> Tensor:
    """See ``specops.allocation.confidence``."""
    if logits_RD.is_cuda:
        from specops import allocation_triton

        return allocation_triton.confidence(logits_RD)
    return allocation.confidence(logits_RD)


def cut_drafts(
    figures_RKF: Tensor,
    offered_R: Tensor,
    temperature_R: Tensor,
    values: CutValues,
    head: HeadWeights,
    noted_RC: Tensor | None = None,
    *,
    score: Score,
    cumulative: bool,
) -> Tensor:
    """See ``specops.allocation.cut_drafts``."""
    cut = allocation.cut_drafts
    if figures_RKF.is_cuda:
        from specops import allocation_triton

        cut = allocation_triton.cut_drafts
    return cut(
        figures_RKF, offered_R, temperature_R, values, head, noted_RC,
        score=score, cumulative=cumulative,
    )  # fmt: skip


def pack_rows(lens_R: Tensor, num_draft: int, capacity: int) -> PackedRows:
    """See ``specops.allocation.pack_rows``."""
    if lens_R.is_cuda:
        from specops import allocation_triton

        return allocation_triton.pack_rows(lens_R, num_draft, capacity)
    return allocation.pack_rows(lens_R, num_draft, capacity)


def open_round(
    state: LaneState,
    inputs_RI: Tensor,
    num_draft: int,
    page_size: int,
    rule: Rule,
    *,
    is_given: bool,
) -> OpenedRound:
    """See ``specops.lanes.open_round``."""
    start = lanes_host.open_round
    if inputs_RI.is_cuda:
        from specops import lanes_triton

        start = lanes_triton.open_round
    return start(state, inputs_RI, num_draft, page_size, rule, is_given=is_given)


def close_round(
    state: LaneState,
    opened: OpenedRound,
    draft_RK: Tensor,
    verdict: LogitVerdict | Tensor,
    logq_RK: Tensor | None,
    outputs_RC: Tensor,
) -> ClosedRound:
    """See ``specops.lanes.close_round``."""
    end: Callable[..., ClosedRound] = lanes_host.close_round
    if draft_RK.is_cuda:
        from specops import lanes_triton, overlap_triton

        overlap = overlap_triton.can_overlap(draft_RK.device)
        end = partial(lanes_triton.close_round, overlap=overlap)
    return end(state, opened, draft_RK, verdict, logq_RK, outputs_RC)


def text_drafts(
    texts_LN: Tensor,
    lanes_R: Tensor,
    lengths_R: Tensor,
    spaces_R: Tensor,
    ring: RingText | None,
    num_draft: int,
    bounds: Bounds,
) -> TextDrafts:
    """See ``specops.matches.text_drafts``."""
    find = matches.text_drafts
    if texts_LN.is_cuda:
        from specops import matches_triton

        find = matches_triton.text_drafts
    return find(texts_LN, lanes_R, lengths_R, spaces_R, ring, num_draft, bounds)


def begin_drafts(
    counts: Tensor, found: TextDrafts, opened: OpenedRound, num_draft: int, num_passes: int
) -> Begun:
    """See ``specops.text_first.begin_drafts``."""
    begin = text_first.begin_drafts
    if counts.is_cuda:
        from specops import text_first_triton

        begin = text_first_triton.begin_drafts
    return begin(
        counts, found.matched_R, found.counts_R, opened.floats_3R[0], opened.lanes_R,
        opened.ints_FR[Field.LENGTH], opened.lens_R, num_draft, num_passes,
    )  # fmt: skip


def note_kept(
    counts: Tensor, found: TextDrafts, opened: OpenedRound, begun: Begun, closed: ClosedRound
) -> Tensor:
    """See ``specops.text_first.note_kept``."""
    note = text_first.note_kept
    if counts.is_cuda:
        from specops import text_first_triton

        note = text_first_triton.note_kept
    return note(
        counts, found.matched_R, found.counts_R, opened.floats_3R[0], begun.text_R, begun.lens_R,
        found.tokens_RK, closed.emitted_RQ, closed.count_R,
    )  # fmt: skip


def pack_kept_rows(
    features_TmH: Tensor,
    hidden_TH: Tensor,
    counts_R: Tensor,
    first_R: Tensor,
    lanes_R: Tensor,
    ring: PackRing,
) -> None:
    """See ``specops.capture_pack.pack_kept_rows``."""
    pack = capture_pack.pack_kept_rows
    if hidden_TH.is_cuda:
        from specops import capture_pack_triton

        pack = capture_pack_triton.pack_kept_rows
    pack(features_TmH, hidden_TH, counts_R, first_R, lanes_R, ring)


def distill(
    hidden_NH: Tensor,
    weight_DH: Tensor,
    teacher: Teacher,
    rows: Rows,
    weights_N: Tensor | Weigh,
    kind: LossKind,
    chunk_rows: int | None = None,
    order: TeacherOrder | None = None,
) -> Distilled:
    """See ``specops.distill.distill``."""
    blocks = _distill_blocks(hidden_NH)
    return distill_definition.distill(
        hidden_NH, weight_DH, teacher, rows, weights_N, kind, chunk_rows, blocks, order
    )


def label_figures(
    hidden_NH: Tensor, weight_DH: Tensor, rows: Rows, chunk_rows: int | None = None
) -> LabelFigures:
    """See ``specops.distill.label_figures``."""
    blocks = _distill_blocks(hidden_NH)
    return distill_definition.label_figures(hidden_NH, weight_DH, rows, chunk_rows, blocks)


def _distill_blocks(hidden_NH: Tensor) -> distill_definition.Blocks:
    if hidden_NH.is_cuda:
        from specops import distill_triton

        return distill_triton.BLOCKS
    return distill_definition.BLOCKS


_LOW = torch.bfloat16, torch.float16
"""Rows of these dtypes are what an update on a GPU computes with; torch computes all others."""


def trained_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor | None:
    """See ``specops.trained_rows.rms_norm``; ``None``: there is no kernel for these rows, which
    torch's own RMSNorm computes."""
    if not x.is_cuda or x.dtype not in _LOW or weight_H.dtype != torch.float32:
        return None
    from specops import trained_rows_triton

    if not trained_rows_triton.can_norm(x):
        return None
    return trained_rows_triton.rms_norm(x, weight_H, eps)


def trained_gate(gate_up: Tensor) -> Tensor:
    """See ``specops.trained_rows.silu_gate``."""
    gate = rows_definition.silu_gate
    if _is_trained(gate_up):
        from specops import trained_rows_triton

        gate = trained_rows_triton.silu_gate
    return gate(gate_up)


def trained_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See ``specops.trained_rows.rotate``."""
    rotate = rows_definition.rotate
    if _is_trained(x):
        from specops import trained_rows_triton

        if trained_rows_triton.can_rotate(x, cos):
            rotate = trained_rows_triton.rotate
    return rotate(x, cos, sin)


def attend_chains(
    q: Tensor, k: Tensor, v: Tensor, own_k: list[Tensor], own_v: list[Tensor], anchors: Anchors
) -> Tensor:
    """See ``specops.chain_attention.attend_chains``. Ask ``can_attend_chains`` first: the
    definition needs the scores of all pairs."""
    attend = chains_definition.attend_chains
    if q.is_cuda:
        from specops import chain_attention_triton

        attend = chain_attention_triton.attend_chains
    return attend(q, k, v, own_k, own_v, anchors)


def can_attend_chains(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """There are kernels for these rows."""
    if device.type != "cuda" or dtype not in _LOW:
        return False
    from specops import chain_attention_triton

    return chain_attention_triton.can_attend(head_dim)


def _is_trained(x: Tensor) -> bool:
    return x.is_cuda and x.requires_grad and x.dtype in _LOW
