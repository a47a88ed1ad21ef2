"""The figures of a server for Prometheus, by its client library (the extra ``metrics``)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wsgiref.simple_server import WSGIServer

    from prometheus_client.core import Metric

    from dmabuf.store.server import Server


class _Figures:
    """Collects the figures of a server when Prometheus asks."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def collect(self) -> Iterator[Metric]:
        """Yield each figure."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        usage = self._server.usage
        for name, text, value in (
            ("memory_bytes", "Memory that the store holds.", usage.charged),
            ("memory_limit_bytes", "The most memory that it may hold.", usage.max_memory),
            ("names", "Buffers that the store holds.", usage.names),
            ("names_limit", "The most buffers that it may hold.", usage.max_names),
            ("clients", "Connections of clients.", self._server.clients),
        ):
            yield GaugeMetricFamily(f"dmabuf_store_{name}", text, value)
        requests = CounterMetricFamily(
            "dmabuf_store_requests", "Requests by their result.", labels=["operation", "result"]
        )
        for labels, count in self._server.requests.copy().items():
            requests.add_metric(labels, count)
        yield requests


def _http_server(host: str, port: int) -> WSGIServer:
    from socket import AF_INET, AF_INET6
    from socketserver import ThreadingMixIn
    from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

    class Http(ThreadingMixIn, WSGIServer):
        address_family = AF_INET6 if ":" in host else AF_INET
        daemon_threads = True
        allow_reuse_port = True  # a server that takes over listens before the other one has ended

    class Quiet(WSGIRequestHandler):
        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - inherited
            """Log nothing."""

    return Http((host, port), Quiet)


@contextmanager
def serving_metrics(server: Server, host: str, port: int) -> Iterator[None]:
    """Serve the figures of a server at ``http://host:port/metrics`` until the block ends.

    Raises OSError if that address cannot be used, ImportError without prometheus_client.
    """
    try:
        from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
    except ImportError as error:
        raise ImportError(f"metrics: {error}; pip install 'dmabuf[metrics]'") from None
    registry = CollectorRegistry()
    registry.register(_Figures(server))
    ProcessCollector(registry=registry)
    try:
        http = _http_server(host, port)
    except OSError as error:
        raise OSError(error.errno, f"metrics: {error.strerror}", f"{host}:{port}") from None
    http.set_app(make_wsgi_app(registry))
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
