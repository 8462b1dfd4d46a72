"""Routes, one module per resource. ``ALL`` holds every route of the app."""

from fastapi.routing import APIRoute

from serving.http.routes import (
    admin,
    chat,
    completions,
    dashboard,
    metrics,
    models,
    probes,
    schema,
)

_MODULES = (completions, chat, models, probes, metrics, dashboard, admin, schema)
ALL = [
    route for module in _MODULES for route in module.router.routes if isinstance(route, APIRoute)
]
