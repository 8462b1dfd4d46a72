"""Memory of records is used again once nobody looks at it, and never before."""

import gc
import threading

import numpy as np
import pytest

from buffer.blocks import Blocks

BIG = 1 << 20


def address(array):
    return array.__array_interface__["data"][0]


def test_memory_comes_back_when_its_last_view_is_gone():
    blocks = Blocks()
    first = blocks.take(BIG)
    place, view = address(first), np.frombuffer(first.data[8:24], np.int32)
    del first
    assert address(blocks.take(BIG)) != place, "a view still looks at it"
    del view
    gc.collect()
    assert address(blocks.take(BIG - 100)) == place


def test_pieces_that_are_held_never_overlap():
    blocks = Blocks()
    luck = np.random.default_rng(0)
    held = []
    for number in range(400):
        piece = blocks.take(int(luck.integers(1, 300_000)))
        piece[:] = number % 251
        held.append((number % 251, piece))
        if len(held) > 20:
            del held[int(luck.integers(len(held)))]
        assert all((piece == mark).all() for mark, piece in held[-3:])
    assert all((piece == mark).all() for mark, piece in held)


@pytest.mark.parametrize("num_bytes", [0, 1, 65_535, 65_536, 65_537, 999_999, 1 << 24])
def test_a_piece_has_the_size_that_was_asked_for(num_bytes):
    assert Blocks().take(num_bytes).shape == (num_bytes,)


def test_idle_memory_is_bounded():
    blocks = Blocks(max_idle_bytes=3 * BIG)
    places = [address(one) for one in [blocks.take(BIG) for _ in range(6)]]
    again = [blocks.take(BIG) for _ in range(6)]
    assert len({address(one) for one in again} & set(places)) <= 6
    assert blocks._idle_bytes == 0
    del again
    assert blocks._idle_bytes == 3 * BIG


def test_threads_may_give_back_what_others_took():
    blocks = Blocks()
    wrong = []

    def work(mark):
        for _ in range(200):
            piece = blocks.take(100_000)
            piece[:] = mark
            if not (piece == mark).all():
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
