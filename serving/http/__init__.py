"""The HTTP layer: an OpenAI-compatible API over the engine.

Start at ``app.create_app`` (the routes) and ``uvicorn_server.serve`` (the process from start to
exit). Importing this package imports nothing: an engine whose HTTP is in other processes does
without FastAPI and uvicorn, which take a second where files are slow.
"""
