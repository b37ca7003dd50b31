"""Prometheus: an endpoint at `telemetry.host` and `telemetry.port` that answers with the last step. No torch.

Gauges are numbers of the step and of each layer, counters what only grows, so that `rate` works. Single
experts are left to the dashboard's process: to set 61 x 256 gauges would cost the training 11 ms a step.
`grafana.json`, beside this file, draws both.
"""

from typing import Any

from moe.telemetry.sinks.message import Alarm, Evaluation, Origin, Step


class PrometheusSink:
    """Serves with prometheus_client, from a registry of its own; every series names the run."""

    def __init__(self, origin: Origin) -> None:
        import prometheus_client

        self._library, self._origin = prometheus_client, origin
        self._registry = prometheus_client.CollectorRegistry()
        self._gauges: dict[str, Any] = {}
        self._tokens = self._counter("tokens", "Tokens trained on by this process")
        self._dropped = self._counter("dropped", "Assignments that found no place", "layer")
        self._links = self._counter("link_bytes", "Bytes that dispatches moved", "link")
        self._alarms = self._counter("alarms", "Alarms raised", "kind")
        self._server: Any = None

    def open(self) -> None:
        """Listen; raises OSError where another process does already."""
        host, port = self._origin.host, self._origin.port
        try:
            self._server, _ = self._library.start_http_server(port, host, self._registry)
        except OSError as error:
            raise OSError(
                f"cannot listen on {host}:{port}, {error.strerror}: set `telemetry.port`"
            ) from error

    def step(self, message: Step) -> None:
        """Set the gauges, move the counters on."""
        for key, value in message.train.items():
            self._set(f"train_{key}", value)
        for layer, values in message.layers.items():
            for key, value in values.items():
                self._set(f"layer_{key}", value, layer=layer)
            self._add(self._dropped, values.get("dropped", 0), layer=layer)
        speed, seconds = (message.train.get(key, 0.0) for key in ("tokens_per_second", "step_seconds"))
        self._add(self._tokens, round(speed * seconds))
        for link, moved in message.link_bytes.items():
            self._add(self._links, moved, link=link)

    def evaluation(self, message: Evaluation) -> None:
        """Set a domain's gauges."""
        for key, value in message.values.items():
            self._set(f"eval_{key}", value, domain=message.domain)

    def alarm(self, message: Alarm) -> None:
        """Count it by kind."""
        self._add(self._alarms, 1, kind=message.kind)

    def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def _set(self, name: str, value: float, **labels: object) -> None:
        if name not in self._gauges:
            text = f"`{name.partition('_')[2]}` of the last row that had it"
            self._gauges[name] = self._library.Gauge(
                f"switchyard_{name}", text, ["run", *labels], registry=self._registry
            )
        self._gauges[name].labels(run=self._origin.run.name, **labels).set(value)

    def _counter(self, name: str, text: str, *labels: str) -> Any:
        return self._library.Counter(f"switchyard_{name}", text, ["run", *labels], registry=self._registry)

    def _add(self, counter: Any, amount: float, **labels: object) -> None:
        counter.labels(run=self._origin.run.name, **labels).inc(amount)
