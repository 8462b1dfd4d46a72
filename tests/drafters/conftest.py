"""What tests of drafters run under."""

from __future__ import annotations

from drafters.suffix import compiled

# Compiling the search of the suffix index counts for no test's time.
compiled.wait()
