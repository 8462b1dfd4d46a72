"""What a load stages is the bundle that was checked, whatever way it went there."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save
from torch import nn

from buffer.folder_weights import FolderWeights
from buffer.manifest import TENSORS
from buffer.records import Manifest
from serving.swap import flat_weights as swapping
from serving.swap.flat_weights import Expected, FlatWeights, load_bundle

EXPECTED = Expected("eagle3", {}, "ab" * 32)
LAYOUTS = {"by rows": (0, 1, 2), "by columns": (0, 2, 1), "mixed": (2, 0, 1)}
each_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)


def module_of(layout="by rows", dtype=torch.float32, device="cpu"):
    """A module whose largest parameter lies in memory in the order that the layout names."""
    module = nn.Module()
    order = LAYOUTS[layout]
    cube = torch.zeros(5, 7, 11, dtype=dtype, device=device).permute(order).contiguous()
    module.cube = nn.Parameter(cube.permute([order.index(d) for d in range(3)]), False)
    module.matrix = nn.Parameter(torch.zeros(6, 9, dtype=dtype, device=device), False)
    module.norm = nn.Parameter(torch.zeros(13, dtype=dtype, device=device), False)
    module.register_buffer("table", torch.arange(4, device=device))
    return module


def numbers(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"cube": (5, 7, 11), "matrix": (6, 9), "norm": (13,)}
    drawn = {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}
    return {**drawn, "table": torch.arange(4)}


def publish_numbers(root, version, tensors):
    manifest = Manifest(version, None, EXPECTED.kind, {}, EXPECTED.target_fingerprint, {})
    FolderWeights(root).publish(manifest, {TENSORS: save(tensors)})


def assert_serves(module, tensors):
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.cpu(), tensors[name].to(parameter.dtype)), name


@each_device
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("piece_bytes", [8, 60, 500, 8 << 20])
def test_pieces_of_any_size_arrive_where_they_lie(
    tmp_path, monkeypatch, device, layout, dtype, piece_bytes
):
    monkeypatch.setattr(swapping, "_PIECE_BYTES", piece_bytes)
    module = module_of(layout, dtype, device)
    strides = module.cube.stride()
    weights = FlatWeights(module)
    for version in range(2):
        publish_numbers(tmp_path, version, numbers(version))

        weights.take_over(load_bundle(FolderWeights(tmp_path), version, weights, EXPECTED).flat)

        assert_serves(module, numbers(version))
        assert module.cube.stride() == strides


@pytest.mark.parametrize("piece_bytes", [4, 44, 60, 308, 1000, 1540])
def test_no_piece_is_larger_than_it_may_be(monkeypatch, piece_bytes):
    monkeypatch.setattr(swapping, "_PIECE_BYTES", piece_bytes)
    source, to = numbers(0)["cube"], torch.zeros(5, 7, 11)

    pieces = list(swapping._pieces(to, source))

    assert max(piece.nbytes for _, piece in pieces) <= piece_bytes
    assert len(pieces) <= 2 * source.nbytes / piece_bytes + 7
    for part, piece in pieces:
        part.copy_(piece)
    assert torch.equal(to, source)


def test_what_is_staged_was_read_before_it_was_checked_and_not_again(tmp_path):
    class Late(FlatWeights):
        def stage(self, tensors):
            (tmp_path / "0" / TENSORS).write_bytes(save(numbers(7)))
            return super().stage(tensors)

    publish_numbers(tmp_path, 0, numbers(0))
    module = module_of()
    weights = Late(module)

    weights.take_over(load_bundle(FolderWeights(tmp_path), 0, weights, EXPECTED).flat)

    assert_serves(module, numbers(0))


@each_device
def test_a_load_uses_the_memory_of_the_one_before(tmp_path, device):
    weights = FlatWeights(module_of(device=device))
    places = set()
    for version in range(3):
        publish_numbers(tmp_path, version, numbers(version))
        staged = load_bundle(FolderWeights(tmp_path), version, weights, EXPECTED)
        places.add(staged.flat.data_ptr())
        weights.take_over(staged.flat)
    assert len(places) == 1


@each_device
def test_a_version_that_nobody_took_yet_is_not_overwritten(tmp_path, device):
    """An order that timed out is taken when the engine wakes, behind the next load."""
    module = module_of(device=device)
    weights = FlatWeights(module)
    for version in range(2):
        publish_numbers(tmp_path, version, numbers(version))

    first, second = (load_bundle(FolderWeights(tmp_path), v, weights, EXPECTED) for v in range(2))

    weights.take_over(first.flat)
    assert_serves(module, numbers(0))
    weights.take_over(second.flat)
    assert_serves(module, numbers(1))


@pytest.mark.gpu
def test_a_load_waits_until_the_engine_has_copied_the_one_before(tmp_path):
    module = module_of(device="cuda")
    weights = FlatWeights(module)
    for version in range(2):
        publish_numbers(tmp_path, version, numbers(version))
    former = load_bundle(FolderWeights(tmp_path), 0, weights, EXPECTED)

    torch.cuda._sleep(1_000_000_000)  # the copy is some half a second behind
    weights.take_over(former.flat)
    load_bundle(FolderWeights(tmp_path), 1, weights, EXPECTED)

    assert_serves(module, numbers(0))


@each_device
def test_a_number_too_large_for_the_served_dtype_is_refused(tmp_path, device):
    module = module_of(dtype=torch.float16, device=device)
    weights = FlatWeights(module)
    sound = numbers(0)
    publish_numbers(tmp_path, 0, sound)
    former = load_bundle(FolderWeights(tmp_path), 0, weights, EXPECTED).flat
    weights.take_over(former)
    publish_numbers(tmp_path, 1, {**sound, "matrix": torch.full((6, 9), 1e6)})

    with pytest.raises(ValueError, match=r"snapshot 1 cannot be used: \['matrix'\] do not fit in"):
        load_bundle(FolderWeights(tmp_path), 1, weights, EXPECTED)

    assert_serves(module, sound)
    publish_numbers(tmp_path, 2, numbers(2))
    newer = load_bundle(FolderWeights(tmp_path), 2, weights, EXPECTED).flat
    assert newer.data_ptr() == former.data_ptr()
    weights.take_over(newer)
    assert_serves(module, numbers(2))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"more": torch.zeros(1)}, r"missing \[\], unexpected \['more'\]"),
        ({"norm": torch.zeros(12)}, r"norm must be \[13\], got \[12\]"),
        ({"norm": torch.zeros(13, dtype=torch.uint8)}, "norm is U8, none of"),
        (
            {"norm": torch.zeros(13, dtype=torch.int32)},
            "norm must be of a floating type, got torch.int32",
        ),
        ({"table": torch.zeros(4, dtype=torch.int64)}, "table differs from the running drafter's"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path, change, text):
    module = module_of()
    weights = FlatWeights(module)
    publish_numbers(tmp_path, 0, {**numbers(0), **change})

    with pytest.raises(ValueError, match=f"snapshot 0 cannot be used: .*{text}"):
        load_bundle(FolderWeights(tmp_path), 0, weights, EXPECTED)

    assert not module.cube.any()


def test_a_tensor_that_begins_anywhere_is_read(tmp_path):
    """A header of any length is allowed, so numbers may begin between two addresses."""
    publish_numbers(tmp_path, 0, numbers(0))
    file = tmp_path / "0" / TENSORS
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little") + 3
    shifted = (
        length.to_bytes(8, "little") + content[8 : 5 + length] + b"   " + content[5 + length :]
    )
    FolderWeights(tmp_path / "shifted").publish(
        Manifest(0, None, EXPECTED.kind, {}, EXPECTED.target_fingerprint, {}),
        {TENSORS: shifted},
    )
    module = module_of()
    weights = FlatWeights(module)

    weights.take_over(load_bundle(FolderWeights(tmp_path / "shifted"), 0, weights, EXPECTED).flat)

    assert_serves(module, numbers(0))
