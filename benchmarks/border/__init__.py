"""HTTP beside the engine: does it survive, and what does it cost?

    python -m benchmarks.border survive       # 10,000 requests while HTTP processes are killed
    python -m benchmarks.border speed         # through HTTP against the engine alone
    python -m benchmarks.border events        # processor time of an event, without a target
    python -m benchmarks.border starts        # gaps of streams while requests begin and end
    python -m benchmarks.border timeline      # where the time of one client's request goes
    python -m benchmarks.border contention    # the engine's loop with borders and without

``survive`` sends requests of mixed kinds, some of which are cancelled or left in the middle, and
kills an HTTP process every few seconds. Afterwards no page, lane or request may be missing, and
every answer must have been complete or an honest error.

``speed`` keeps N streams open, with HTTP in the engine's process and in one or more of its own.
In turn with these, the engine alone decodes the same batch. It reports tokens/s, and the gaps
between the events of a stream.

``events`` puts a paced thread in the engine's place and counts the processor time of both processes
for each output of a stream.

``starts`` puts the same thread there while chat clients begin and end requests. It reports gaps
between the events of a stream, and the processor time of an HTTP process for a request.

``timeline`` lets one client ask one request after another, and shows for every station between
client and engine when a request passes it, beside the engine without HTTP.

``contention`` runs the engine's loop beside a stand-in for the device and reports how often, and
for how long, delivering to other processes holds it up.

All need Linux, where processes are found in /proc, and httpx, which a server does not. With
``--publish`` they write ``border_*.json`` and ``rows/border.json`` in ``benchmarks/results``.
"""
