"""The HTTP layer: an OpenAI-compatible API over the engine.

Start at ``app.create_app`` (the routes) and ``drain.serve`` (the process from start to exit).
"""

from serving.http.app import create_app
from serving.http.drain import bind, serve
from serving.http.face import RunningServer
from serving.http.loading import answering_503

__all__ = ["RunningServer", "answering_503", "bind", "create_app", "serve"]
