"""Access control: every route, with every variant of a missing or wrong key."""

from __future__ import annotations

import base64
import socket

import httpx
import pytest

from serving.http.auth import is_loopback, scope_of
from serving.http.routes import ALL
from tests.serving.http.conftest import KEY
from tests.serving.http.live import LiveServer

SCOPES = {
    ("GET", "/health"): "open",
    ("GET", "/ready"): "open",
    ("GET", "/dashboard"): "page",
    ("GET", "/dashboard/data"): "page",
    ("GET", "/admin/drafter"): "admin",
    ("POST", "/admin/drafter/swap"): "admin",
    ("POST", "/admin/drafter/rollback"): "admin",
    ("POST", "/admin/drain"): "admin",
    ("GET", "/admin/target"): "admin",
    ("POST", "/admin/target/update"): "admin",
    ("POST", "/v1/completions"): "user",
    ("POST", "/v1/chat/completions"): "user",
    ("GET", "/v1/models"): "user",
    ("GET", "/v1/models/{model}"): "user",
    ("GET", "/version"): "user",
    ("GET", "/metrics"): "user",
    ("GET", "/openapi.json"): "user",
}
CLOSED = [place for place, scope in SCOPES.items() if scope != "open"]
PAGES = [place for place, scope in SCOPES.items() if scope == "page"]


def test_every_route_has_the_scope_written_here():
    assert {(next(iter(r.methods)), r.path_format): scope_of(r) for r in ALL} == SCOPES


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"user:{password}".encode()).decode()


WRONG = [
    pytest.param([], id="none"),
    pytest.param([("Authorization", "Bearer wrong")], id="wrong"),
    pytest.param([("Authorization", f"Bearer {KEY}x".encode())], id="longer"),
    pytest.param([("Authorization", f"Bearer {KEY[:-1]}".encode())], id="shorter"),
    pytest.param([("Authorization", f"Bearer {KEY.upper()}".encode())], id="other case"),
    pytest.param([("Authorization", KEY.encode())], id="no scheme"),
    pytest.param([("Authorization", f"Token {KEY}".encode())], id="other scheme"),
    pytest.param([("Authorization", "Bearer")], id="empty"),
    pytest.param([("Authorization", "Basic !!!")], id="broken basic"),
    pytest.param([("Authorization", basic("wrong"))], id="wrong password"),
    pytest.param(
        [("Authorization", f"Bearer {KEY}".encode()), ("Authorization", "Bearer wrong")],
        id="two headers",
    ),
    pytest.param([("X-Api-Key", KEY.encode())], id="another header"),
    pytest.param([("Cookie", f"key={KEY}".encode())], id="cookie"),
    pytest.param([("Host", "localhost/health?")], id="host that looks like an open path"),
    pytest.param([("X-Forwarded-For", "127.0.0.1")], id="forwarded from loopback"),
    pytest.param([("X-Original-URL", "/health"), ("X-Rewrite-URL", "/health")], id="rewrite"),
    pytest.param([("X-HTTP-Method-Override", "GET")], id="method override"),
]


@pytest.mark.parametrize("headers", WRONG)
def test_no_route_is_served_without_the_key(locked_server: LiveServer, headers):
    raw = [(n, v if isinstance(v, bytes) else v.encode()) for n, v in headers]
    with httpx.Client(base_url=locked_server.url) as client:
        for method, path in CLOSED:
            url = path.replace("{model}", "org/tiny")
            answer = client.request(method, url, headers=raw, content=b"not even json")
            assert answer.status_code == 401, path
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert "www-authenticate" in answer.headers


def test_the_key_opens_every_route(locked_server: LiveServer):
    with locked_server.client() as client:
        for method, path in CLOSED:
            if path == "/admin/drain":
                continue  # would end the server that other tests use
            answer = client.request(method, path.replace("{model}", "org/tiny"), json={})
            assert answer.status_code not in (401, 403, 404, 405), path


@pytest.mark.parametrize(
    "target",
    [
        "//v1/models",
        "/v1//models",
        "/v1/models/",
        "/V1/models",
        "/v1/%6dodels",
        "/health/../v1/models",
        "/health/..%2fv1/models",
        "/%2e%2e/v1/models",
        "/v1/models;/health",
        "/v1/models%00",
        "http://127.0.0.1/v1/models",
        "http://127.0.0.1/health/../v1/models",
        "/health#/v1/models",
        "*",
    ],
)
@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
def test_no_spelling_of_a_path_serves_the_models(locked_server: LiveServer, target, version):
    request = f"GET {target} {version}\r\nHost: 127.0.0.1/health\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", locked_server.port), timeout=10) as link:
        link.sendall(request.encode())
        answer = b"".join(iter(lambda: link.recv(65536), b""))
    status = int(answer.split(b" ", 2)[1])
    assert status in (400, 401, 404)
    assert b"max_model_len" not in answer


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_probes_need_no_key(locked_server: LiveServer, path):
    assert httpx.get(locked_server.url + path).status_code == 200


@pytest.mark.parametrize(("method", "path"), PAGES)
def test_a_browser_may_send_the_key_as_a_password(locked_server: LiveServer, method, path):
    url = locked_server.url + path
    assert httpx.get(url).headers["www-authenticate"].startswith("Basic")
    assert httpx.get(url, headers={"Authorization": basic(KEY)}).status_code == 200


def test_a_password_opens_pages_only(locked_server: LiveServer):
    headers = {"Authorization": basic(KEY)}
    assert httpx.get(f"{locked_server.url}/v1/models", headers=headers).status_code == 401
    assert httpx.get(f"{locked_server.url}/admin/drafter", headers=headers).status_code == 401


def test_the_key_is_never_shown(locked_server: LiveServer):
    with locked_server.client() as client:
        for path in ("/openapi.json", "/metrics", "/dashboard/data", "/admin/drafter"):
            assert KEY not in client.get(path).text
    assert KEY not in locked_server.log


def test_without_a_key_admin_is_for_local_programs_not_for_web_pages(server: LiveServer):
    url = f"{server.url}/admin/drafter"
    assert httpx.get(url).status_code == 200
    for origin in ("https://example.com", "null", server.url):
        answer = httpx.get(url, headers={"Origin": origin})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "web_page")


OWN_HOSTS = [
    "127.0.0.1", "127.0.0.1:8000", "127.9.9.9:1", "localhost", "LocalHost:8000", "localhost.:80",
    "[::1]:8000", "[::ffff:127.0.0.1]", socket.gethostname(), f"{socket.gethostname()}:8000",
]  # fmt: skip
FOREIGN_HOSTS = [
    "evil.com:8114", "evil.com", "127.0.0.1.evil.com", "localhost.evil.com", "10.0.0.1", "",
    "[::2]:80", "127.0.0.1@evil.com", "user:127.0.0.1", "127.0.0.1:80:80", "[127.0.0.1",
]  # fmt: skip


@pytest.mark.parametrize("path", ["/admin/drafter", "/dashboard", "/dashboard/data"])
def test_a_web_page_whose_name_leads_here_is_refused(server: LiveServer, path):
    """To a browser it is of the same origin, and sends no Origin with GET."""
    for host in FOREIGN_HOSTS:
        answer = httpx.get(server.url + path, headers={"Host": host})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_host"), host
    for host in OWN_HOSTS:
        assert httpx.get(server.url + path, headers={"Host": host}).status_code == 200, host


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/ready", "/metrics", "/version"])
def test_other_routes_answer_under_every_name(server: LiveServer, path):
    for host in ("evil.com:8114", "model.internal"):
        assert httpx.get(server.url + path, headers={"Host": host}).status_code == 200


def test_a_request_without_a_host_is_no_browsers(server: LiveServer):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as link:
        link.sendall(b"GET /admin/drafter HTTP/1.0\r\n\r\n")
        assert b" 200 " in link.recv(65536)


@pytest.mark.parametrize("site", ["cross-site", "same-site", "same-origin"])
def test_admin_is_not_for_web_pages_that_send_no_origin(server: LiveServer, site):
    answer = httpx.get(f"{server.url}/admin/drafter", headers={"Sec-Fetch-Site": site})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "web_page")
    typed = httpx.get(f"{server.url}/admin/drafter", headers={"Sec-Fetch-Site": "none"})
    assert typed.status_code == 200


def test_with_a_key_the_key_alone_decides(locked_server: LiveServer):
    headers = {"Host": "model.example.com", "Authorization": f"Bearer {KEY}"}
    for path in ("/admin/drafter", "/dashboard"):
        assert httpx.get(locked_server.url + path, headers=headers).status_code == 200


def test_a_form_of_a_web_page_cannot_post(server: LiveServer):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        answer = httpx.post(
            f"{server.url}/v1/completions",
            content=b'{"prompt": "a"}',
            headers={"Content-Type": kind},
        )
        assert answer.status_code == 415


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.example.com", False),
        ("127.0.0.1.example.com", False),
        ("", False),
    ],
)
def test_only_this_machines_own_addresses_are_loopback(host, expected):
    assert is_loopback(host) is expected
