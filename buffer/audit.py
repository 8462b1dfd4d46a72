"""One line for each access to stored traces: who did what, when. Never what they hold.

Lines are JSON objects in ``run_dir/audit.jsonl``, which only grows, and messages of the logger
``buffer.audit`` for whoever collects logs. Tenants appear as the digests of ``deletions.py``.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any, Literal

from buffer.files import OWNER_FOLDER, open_regular
from configs.urls import shown_url

log = logging.getLogger(__name__)

FILE = "audit.jsonl"
_ANYONE = 0o777  # less the process's umask
_OF_A_RUN = ("write", "read")
"""What servers and trainers do: others may read their run folder. One that is made for the audit of
a command alone is its user's."""
Action = Literal[
    "write",
    "read",
    "inspect",
    "stats",
    "delete",
    "undelete",
    "deletions",
    "replay",
    "copy",
    "vocabulary",
    "policies",
]


def audit(run_dir: Path, action: Action, url: str, run: str | None = None, **facts: Any) -> None:
    """Note an access. A disk that refuses costs the line, not the access, and the log says so.

    Args:
        run_dir: folder of the run, made if it is missing: also where traces are elsewhere, each
            access from here is noted there.
        action: what is done.
        url: ``buffer.url``; what may be a secret is left out.
        run: ``Backend.run``.
        facts: more to note; no contents.
    """
    line = {
        "unix_ms": int(time.time() * 1000),
        "action": action,
        "buffer": shown_url(url),
        **({} if run is None else {"run": run}),
        "user": _user(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "program": Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python",
        **facts,
    }
    text = json.dumps(line)
    log.info("audit: %s", text)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    try:
        mode = _ANYONE if action in _OF_A_RUN else OWNER_FOLDER
        run_dir.mkdir(mode=mode, parents=True, exist_ok=True)
        descriptor = open_regular(run_dir / FILE, flags)
        try:
            os.write(descriptor, text.encode() + b"\n")
        finally:
            os.close(descriptor)
    except OSError as error:
        log.warning("%s cannot be written (%s): an access is noted in this log only", FILE, error)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may have no name for its user id
        return str(os.getuid())
