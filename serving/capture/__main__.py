"""``python -m serving.capture``: a recorder's process, started by ``apart.RecorderProcess``."""

from __future__ import annotations

import sys

from serving.capture.process import main

if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
