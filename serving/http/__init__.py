"""The HTTP layer: an OpenAI-compatible API over the engine.

Start at ``app.create_app`` (the routes) and ``drain.serve`` (the process from start to exit).
"""

from serving.http.app import create_app
from serving.http.drain import bind, serve
from serving.http.face import RunningServer

__all__ = ["RunningServer", "bind", "create_app", "serve"]
