"""The HTTP face: OpenAI-shaped requests in, the engine's outputs out.

Start at ``app.create_app`` (what is answered) and ``drain.serve`` (how the process lives and ends).
"""

from serving.http.app import create_app
from serving.http.drain import bind, serve
from serving.http.face import RunningServer

__all__ = ["RunningServer", "bind", "create_app", "serve"]
