"""What tests of the server run under."""

from __future__ import annotations

from drafters.suffix import compiled

# A server loads the search of its index in the background, and finds no match before it is there.
# Here it is: in this process, and on the disk for servers in others. Compiling it counts for no
# test's time.
compiled.wait()
