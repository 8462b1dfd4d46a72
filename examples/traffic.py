"""Clients of a running server: live traffic from several threads, and a replay in three ways."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from buffer.records import Acceptance
from examples.report import ARMS, Arm, Replay

TIMEOUT_S = 120.0


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
        # A retry would hide a failed request.
        self._openai = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=TIMEOUT_S
        )

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/ready", timeout=2.0) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def ask(
        self, prompt: str, max_tokens: int, max_draft: int | None = None, capture: bool = True
    ) -> Reply:
        """A greedy completion.

        Args:
            max_draft: largest K; ``None`` leaves it to the server's policy.
            capture: if False, the answer is neither trained on nor looked up for later requests.

        Raises:
            openai.OpenAIError: the request failed.
        """
        extra = {
            "return_token_ids": True,
            "capture": capture,
            "speculation": {"max_draft": max_draft},
        }
        started_s = time.perf_counter()
        completion = self._openai.completions.create(
            model=self.model, prompt=prompt, max_tokens=max_tokens, temperature=0, extra_body=extra
        )
        request_s = time.perf_counter() - started_s
        fields: dict[str, Any] = completion.model_dump()
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


class Traffic:
    """Clients that each send one prompt after another, until none is left or ``stop`` is called."""

    def __init__(
        self,
        server: Server,
        prompts: Sequence[str],
        num_clients: int,
        max_tokens: int,
        on_reply: Callable[[Reply], None],
    ) -> None:
        """
        Args:
            on_reply: called in the order in which requests finish, by one thread at a time.
        """
        self._server = server
        self._prompts: Iterator[str] = iter(prompts)
        self._max_tokens = max_tokens
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
                reply = self._server.ask(prompt, self._max_tokens)
            except openai.OpenAIError as error:
                with self._lock:
                    self.failures.append(f"{type(error).__name__}: {error}")
                self._stopping.wait(0.5)  # do not flood a server that is down
                continue
            with self._lock:
                self._on_reply(reply)


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
    return [
        [Turn(ARMS[(number + place) % len(ARMS)], prompts) for place in range(len(ARMS))]
        for number, prompts in enumerate(blocks)
    ]


class Replayer:
    """Sends held-out prompts with drafting off and with two pinned versions of the drafter."""

    def __init__(
        self, server: Server, versions: dict[Arm, int], max_tokens: int, num_warmup: int
    ) -> None:
        """
        Args:
            versions: drafter version of the arms ``static`` and ``tuned``.
            num_warmup: unmeasured prompts after a swap, from which the policy estimates how well
                the drafter does on this text.
        """
        self._server = server
        self._versions = versions
        self._max_tokens = max_tokens
        self._num_warmup = num_warmup
        self.num_warmed = 0
        self.failures: list[str] = []

    def take(
        self, phase: str, turn: Turn, prompts: Sequence[str], warmup: Sequence[str]
    ) -> list[Replay]:
        """Carry out one turn."""
        if turn.arm != "plain":
            self._server.swap(self._versions[turn.arm])
            for text in warmup[: self._num_warmup]:
                self.num_warmed += self._try(text, None) is not None
        cap = 0 if turn.arm == "plain" else None
        replies = [(index, self._try(prompts[index], cap)) for index in turn.prompts]
        return [
            Replay(phase, turn.arm, i, r.request_s, r.token_ids, r.acceptance, r.version)
            for i, r in replies
            if r is not None
        ]

    def _try(self, prompt: str, max_draft: int | None) -> Reply | None:
        try:
            return self._server.ask(prompt, self._max_tokens, max_draft, capture=False)
        except openai.OpenAIError as error:
            self.failures.append(f"{type(error).__name__}: {error}")
            return None
