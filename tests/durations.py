"""Records how long each test file takes, for the order in which processes take them.

    make test ARGS=--junitxml=results.xml
    python -m tests.durations results.xml

writes ``tests/durations.json``: file -> seconds, of those that take at least one.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

LEAST_S = 1.0


def durations(results: Path) -> dict[str, float]:
    """Seconds of each test file in a JUnit report, setup and teardown included; longest first."""
    seconds: Counter[str] = Counter()
    for case in ElementTree.parse(results).iter("testcase"):
        seconds[case.attrib["classname"].replace(".", "/") + ".py"] += float(case.attrib["time"])
    return {file: round(time_s, 1) for file, time_s in seconds.most_common() if time_s >= LEAST_S}


if __name__ == "__main__":
    found = durations(Path(sys.argv[1]))
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"{len(found)} files of {sum(found.values()):.0f} s")
