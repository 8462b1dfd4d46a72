"""Outputs are sent in order and whole, and a process that does not read costs little memory."""

from __future__ import annotations

import socket
import threading
import time

from serving.border.messages import (
    Accepted,
    FromEngine,
    Outputs,
)
from serving.border.outbox import Outbox
from serving.framing import Frames
from serving.requests import Output, SpeculationStats, join_outputs

NUM_REQUESTS = 3


def output(request: int, number: int, is_last: bool = False) -> Output:
    return Output(
        request_id=f"r{request}",
        text=f"{number},",
        token_ids=(number,),
        logprobs=None,
        finish_reason="length" if is_last else None,
        stats=SpeculationStats(0, number, 0, 0),
        num_prompt_tokens=1,
        num_cached_tokens=0,
    )


def read_to_the_end(sock: socket.socket, wanted: FromEngine) -> list[FromEngine]:
    """All messages until every request has its last output and ``wanted`` has come, in whichever
    order: what is said may be sent behind the outputs that were taken before it."""
    sock.settimeout(60)
    frames: Frames[FromEngine] = Frames(FromEngine)
    came: list[FromEngine] = []
    num_open = NUM_REQUESTS
    while num_open or wanted not in came:
        data = sock.recv(1 << 16)
        assert data, "the socket was closed"
        for message in frames.feed(data):
            came.append(message)
            if isinstance(message, Outputs):
                num_open -= sum(o.finish_reason is not None for o in message.outputs)
    return came


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_reader_that_rests_gets_everything_in_order_in_fewer_messages():
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    outbox = Outbox(ours, on_broken=lambda why: None)
    outbox.start()
    num_each = 20_000
    for number in range(num_each):
        is_last = number == num_each - 1
        outbox.put([output(request, number, is_last) for request in range(NUM_REQUESTS)])
    # Nobody has read a byte, and yet all is taken, and joined but for what came last.
    until(lambda: not outbox._queue and sum(map(len, [*outbox._outputs.values()])) < num_each)
    outbox.say(Accepted(1))
    came = read_to_the_end(theirs, Accepted(1))
    assert came.count(Accepted(1)) == 1
    parts: dict[str, list[Output]] = {f"r{request}": [] for request in range(NUM_REQUESTS)}
    for message in came:
        if isinstance(message, Outputs):
            for one in message.outputs:
                parts[one.request_id].append(one)
    for request in range(NUM_REQUESTS):
        whole = join_outputs(parts[f"r{request}"])
        assert whole.token_ids == tuple(range(num_each))
        assert whole.text == "".join(f"{number}," for number in range(num_each))
        assert whole.finish_reason == "length"
        assert whole.stats.steps == num_each - 1
    assert len(came) < num_each
    outbox.close()
    outbox.join(10)
    ours.close()
    theirs.close()


def test_what_the_socket_takes_at_once_needs_no_other_thread():
    ours, theirs = socket.socketpair()
    outbox = Outbox(ours, on_broken=lambda why: None)  # its thread is not started
    outputs = [output(request, 0, is_last=True) for request in range(NUM_REQUESTS)]
    outbox.put(outputs)
    outbox.say(Accepted(1))
    assert read_to_the_end(theirs, Accepted(1)) == [Outputs(outputs), Accepted(1)]
    ours.close()
    theirs.close()


def test_what_is_put_while_another_thread_sends_comes_behind_it():
    """Nothing is sent past what waits, whether that is the rest of a message or a whole one."""
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    outbox = Outbox(ours, on_broken=lambda why: None)
    with outbox._turn:
        outbox.put([output(0, 0)])  # left to the thread
    outbox.put([output(0, 1)])
    outbox.start()
    until(lambda: not outbox._queue)
    number = 1
    while not outbox._rest and number < 10_000:  # the thread sleeps: nothing is ahead of these
        number += 1
        outbox.put([output(0, number)])
    last = number + 1
    outbox.put([output(request, last, is_last=True) for request in range(NUM_REQUESTS)])
    outbox.say(Accepted(1))
    came = [m for m in read_to_the_end(theirs, Accepted(1)) if isinstance(m, Outputs)]
    of_first = [one for message in came for one in message.outputs if one.request_id == "r0"]
    assert join_outputs(of_first).token_ids == tuple(range(last + 1))
    outbox.close()
    outbox.join(10)
    ours.close()
    theirs.close()


def test_threads_that_send_at_once_lose_nothing_and_keep_the_order_of_each_request():
    """One puts outputs, one says messages, and the socket is full now and then."""
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    outbox = Outbox(ours, on_broken=lambda why: None)
    outbox.start()
    num_each = 1500

    def put() -> None:
        for number in range(num_each):
            is_last = number == num_each - 1
            outbox.put([output(request, number, is_last) for request in range(NUM_REQUESTS)])
            if number % 50 < 25:
                time.sleep(0)  # lets others go first

    def say() -> None:
        for number in range(num_each):
            outbox.say(Accepted(number))

    threads = [threading.Thread(target=put), threading.Thread(target=say)]
    for thread in threads:
        thread.start()
    came = read_to_the_end(theirs, Accepted(num_each - 1))
    for thread in threads:
        thread.join()
    numbers = [message.number for message in came if isinstance(message, Accepted)]
    assert numbers == list(range(num_each))
    for request in range(NUM_REQUESTS):
        own = [
            token
            for message in came
            if isinstance(message, Outputs)
            for one in message.outputs
            if one.request_id == f"r{request}"
            for token in one.token_ids
        ]
        assert own == list(range(num_each))
    outbox.close()
    outbox.join(10)
    ours.close()
    theirs.close()


def test_a_reader_that_takes_nothing_is_given_up():
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    broken = threading.Event()
    reasons: list[str] = []

    def on_broken(why: str) -> None:
        reasons.append(why)
        broken.set()

    outbox = Outbox(ours, on_broken, stall_s=0.2)
    outbox.start()
    until(lambda: outbox.put([output(0, 1)]) or broken.is_set())
    assert "read nothing" in reasons[0]
    outbox.put([output(0, 2)])
    outbox.join(10)
    assert not (outbox._queue or outbox._outputs or outbox._rest)
    ours.close()
    theirs.close()


def test_a_reader_that_is_gone_is_noticed():
    ours, theirs = socket.socketpair()
    theirs.close()
    broken = threading.Event()
    outbox = Outbox(ours, on_broken=lambda why: broken.set())
    outbox.start()
    outbox.put([output(0, 1)])
    assert broken.wait(60)
    outbox.join(10)
    ours.close()
