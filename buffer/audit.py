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

from buffer.files import open_regular
from configs.urls import shown_url

log = logging.getLogger(__name__)

FILE = "audit.jsonl"
_OF_A_RUN = ("write", "read")
"""What servers and trainers do, whose run folder is made if it is missing."""
_CHANGES = ("delete", "copy", "replay")
Action = Literal[
    "write", "read", "inspect", "stats", "delete", "replay", "copy", "vocabulary", "policies"
]


def audit(run_dir: Path, action: Action, url: str, **facts: Any) -> None:
    """Note an access. A disk that refuses costs the line, not the access, and the log says so.

    Args:
        run_dir: folder of the run.
        action: what is done.
        url: ``buffer.url``; what may be a secret is left out.
        facts: more to note; no contents.
    """
    line = {
        "unix_ms": int(time.time() * 1000),
        "action": action,
        "buffer": shown_url(url),
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
        if action in _OF_A_RUN:
            run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = open_regular(run_dir / FILE, flags)
        try:
            os.write(descriptor, text.encode() + b"\n")
        finally:
            os.close(descriptor)
    except FileNotFoundError:  # whoever looks at a buffer may have no run folder here
        if action in _CHANGES:
            log.warning(
                "%s does not exist, so %s notes nothing: the access is noted in this log only",
                run_dir,
                FILE,
            )
    except OSError as error:
        log.warning("%s cannot be written (%s): an access is noted in this log only", FILE, error)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may have no name for its user id
        return str(os.getuid())
