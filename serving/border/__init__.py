"""HTTP beside the engine: in processes of its own, or in the engine's.

``serving.http.face.RunningServer`` is all that HTTP knows of the engine. ``in_process`` is that
face in one process. With several, each HTTP process (``http_process``, ``http_side``) has a socket
to the engine's process, whose side is a ``Line`` (``engine_side``). ``processes`` starts them, and
again when they die. None of them imports torch.

Who waits for whom: the engine's thread for nobody. It gives the outputs of a step to an ``Outbox``,
which sends what the socket takes. One thread for each HTTP process sends the rest, another one
reads.
"""
