"""Clients of a running server: live traffic from several threads, and a replay by all arms."""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from buffer.records import Acceptance
from examples.arms import ALL_ARMS, Arm, Setup
from examples.connections import Connections, RequestError
from examples.recording import Replay
from examples.traffic.prompts import Prompt

TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn, unless a prompt says otherwise."""

    temperature: float = 0.7
    """0 is greedy."""
    max_tokens: int = 512
    """A bound: answers end where the model ends them."""
    seed: int = 0
    """Every prompt's own seed follows from it."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The server's answer to one prompt."""

    token_ids: tuple[int, ...]
    acceptance: Acceptance
    version: int
    request_s: float


class Server:
    """A running server, found by its ``server.json``."""

    def __init__(self, file: Path) -> None:
        """
        Raises:
            FileNotFoundError: the server is not listening yet.
        """
        record = json.loads(file.read_text(encoding="utf-8"))
        self.url = f"http://{record['host']}:{record['port']}"
        self.model: str = record["model"]
        self._connections = Connections(record["host"], record["port"], TIMEOUT_S)

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/ready", timeout=2.0) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def ask(
        self,
        prompt: Prompt,
        sampling: Sampling,
        setup: Setup | None = None,
        capture: bool = True,
    ) -> Reply:
        """The answer to a prompt: a completion of a text, or a turn of a chat.

        Args:
            setup: what may draft; ``None`` leaves it to the server.
            capture: if False, the answer is neither trained on nor looked up for later requests.

        Raises:
            RequestError: it failed.
        """
        given = prompt.temperature
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": sampling.max_tokens if prompt.max_tokens is None else prompt.max_tokens,
            "temperature": sampling.temperature if given is None else given,
            "seed": prompt.seed(sampling.seed),
            "return_token_ids": True,
            "capture": capture,
            "speculation": _speculation(setup),
        }
        if re.fullmatch(r"[!-~]{1,64}", prompt.domain):  # else the server would refuse it
            body["domain"] = prompt.domain
        path = "/v1/completions"
        if prompt.messages is None:
            body["prompt"] = prompt.prompt
        else:
            path = "/v1/chat/completions"
            body["messages"] = [message.model_dump() for message in prompt.messages]
        started_s = time.perf_counter()
        fields = self._connections.post(path, body)
        request_s = time.perf_counter() - started_s
        spent = fields["speculation"]
        return Reply(
            token_ids=tuple(fields["choices"][0]["token_ids"]),
            acceptance=Acceptance(spent["steps"], spent["proposed"], spent["accepted"]),
            version=spent["drafter_version"],
            request_s=request_s,
        )

    def drafter(self) -> dict[str, Any]:
        """Status of the drafter: version, versions, swaps, history and more."""
        return self._admin("GET", "/admin/drafter", None)

    def policy(self) -> dict[str, Any]:
        """State of the draft policy: acceptance, step times, decisions."""
        beliefs: dict[str, Any] = self._admin("GET", "/dashboard/data", None)["policy"]
        return beliefs

    def swap(self, version: int | None) -> dict[str, Any]:
        """Pin a version; ``None`` takes the newest and follows new ones again."""
        return self._admin("POST", "/admin/drafter/swap", {"version": version})

    def _admin(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            answer: dict[str, Any] = json.load(response)
        return answer


def _speculation(setup: Setup | None) -> dict[str, Any] | None:
    if setup is None:
        return None
    return {"max_draft": None if setup.drafters else 0, "drafters": list(setup.drafters)}


class Traffic:
    """Clients that each send one prompt after another, until none is left or ``stop`` is called."""

    def __init__(
        self,
        server: Server,
        prompts: Sequence[Prompt],
        num_clients: int,
        sampling: Sampling,
        on_reply: Callable[[Prompt, Reply], None],
    ) -> None:
        """
        Args:
            on_reply: called in the order in which requests finish, by one thread at a time.
        """
        self._server = server
        self._prompts: Iterator[Prompt] = iter(prompts)
        self._sampling = sampling
        self._on_reply = on_reply
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, name=f"client-{i}", daemon=True)
            for i in range(num_clients)
        ]
        self.failures: list[str] = []

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def is_over(self) -> bool:
        """All prompts are answered."""
        return not any(thread.is_alive() for thread in self._threads)

    def wait(self) -> None:
        """Wait until all prompts are answered."""
        for thread in self._threads:
            thread.join()

    def stop(self) -> None:
        """Send nothing more, and wait for the requests in flight."""
        self._stopping.set()
        self.wait()

    def _run(self) -> None:
        while not self._stopping.is_set():
            with self._lock:
                prompt = next(self._prompts, None)
            if prompt is None:
                return
            try:
                reply = self._server.ask(prompt, self._sampling)
            except RequestError as error:
                with self._lock:
                    self.failures.append(str(error))
                self._stopping.wait(0.5)  # do not flood a server that is down
                continue
            with self._lock:
                self._on_reply(prompt, reply)


@dataclass(frozen=True, slots=True)
class Turn:
    """A few prompts that one arm answers in a row."""

    arm: Arm
    prompts: tuple[int, ...]


def replay_rounds(num_prompts: int, block: int) -> list[list[Turn]]:
    """A schedule in which every arm answers every prompt once, ``block`` prompts at a time.

    In a round all arms answer the same prompts in turn. The order of the arms rotates from round to
    round, so that drift of the machine affects them alike.
    """
    starts = range(0, num_prompts, block)
    blocks = [tuple(range(start, min(start + block, num_prompts))) for start in starts]
    num_arms = len(ALL_ARMS)
    return [
        [Turn(ALL_ARMS[(number + place) % num_arms], prompts) for place in range(num_arms)]
        for number, prompts in enumerate(blocks)
    ]


class Replayer:
    """Sends held-out prompts by one arm after another."""

    def __init__(
        self,
        server: Server,
        setups: Mapping[Arm, Setup],
        sampling: Sampling,
        *,
        num_clients: int,
        num_warmup: int,
    ) -> None:
        """
        Args:
            num_clients: concurrent requests.
            num_warmup: unmeasured prompts of an arm's first turn in a domain, from which its policy
                estimates how well the drafters do on this text.
        """
        self._server = server
        self._setups = setups
        self._sampling = sampling
        self._num_warmup = num_warmup
        self._pool = ThreadPoolExecutor(num_clients, thread_name_prefix="replay")
        self._warm: set[tuple[str, Arm]] = set()
        """Domains and arms."""
        self.num_warmed = 0
        self.failures: list[str] = []

    def take(
        self, domain: str, turn: Turn, prompts: Sequence[Prompt], warmup: Sequence[Prompt]
    ) -> list[Replay]:
        """Carry out one turn."""
        setup = self._setups[turn.arm]
        if setup.version is not None:
            self._server.swap(setup.version)
        if setup.drafters and (domain, turn.arm) not in self._warm:
            self._warm.add((domain, turn.arm))
            replies = self._ask_all(warmup[: self._num_warmup], setup)
            self.num_warmed += sum(reply is not None for reply in replies)
        started_s = time.perf_counter()
        replies = self._ask_all([prompts[index] for index in turn.prompts], setup)
        share_s = (time.perf_counter() - started_s) / len(turn.prompts)
        return [
            Replay(
                domain=domain,
                arm=turn.arm,
                prompt=index,
                request_s=r.request_s,
                share_s=share_s,
                token_ids=r.token_ids,
                acceptance=r.acceptance,
                version=r.version,
                turn=turn.prompts[0],
            )
            for index, r in zip(turn.prompts, replies, strict=True)
            if r is not None
        ]

    def _ask_all(self, prompts: Sequence[Prompt], setup: Setup) -> list[Reply | None]:
        return list(self._pool.map(lambda prompt: self._try(prompt, setup), prompts))

    def _try(self, prompt: Prompt, setup: Setup) -> Reply | None:
        try:
            return self._server.ask(prompt, self._sampling, setup, capture=False)
        except RequestError as error:
            self.failures.append(str(error))
            return None
