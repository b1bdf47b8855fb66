"""A real Prometheus scrapes a server and a training run, and every query of the dashboard is run against it."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from deploying import Control
from project import Project, wait_for
from serving import serving

pytestmark = pytest.mark.heavy
DASHBOARD: Final = Path(__file__).parents[2] / "configs" / "grafana" / "tunesmith.json"
ONLY_WITH_A_GPU: Final = ("GPU use", "GPU memory")
ONLY_IN_RFT: Final = "trainer_run_reward"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def textfile(text: str) -> Iterator[int]:
    """Serve a text as a textfile collector does; yields the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@contextmanager
def prometheus(root: Path, server: int, runs: int, key: str) -> Iterator[str]:
    """Scrape both every second; yields its address."""
    (root / "key").write_text(key)
    config = f"""\
global: {{scrape_interval: 1s}}
scrape_configs:
  - job_name: server
    authorization: {{credentials_file: {root}/key}}
    static_configs: [{{targets: ["127.0.0.1:{server}"]}}]
  - job_name: runs
    static_configs: [{{targets: ["127.0.0.1:{runs}"]}}]
"""
    (root / "prometheus.yml").write_text(config)
    port = free_port()
    words = ["prometheus", f"--config.file={root}/prometheus.yml", f"--storage.tsdb.path={root}/tsdb"]
    words += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
    process = subprocess.Popen(words)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def ask(address: str, query: str) -> list[dict[str, Any]]:
    try:
        answer = httpx.get(f"{address}/api/v1/query", params={"query": query})
    except httpx.TransportError:
        return []
    assert answer.status_code in (200, 503), f"{query}: {answer.text}"
    return list(answer.json()["data"]["result"]) if answer.status_code == 200 else []


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="no Prometheus: apt-get install prometheus")
def test_every_query_of_the_dashboard_has_an_answer(project: Project, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert project.trainer("train", project.recipe(steps=2)).code == 0
    text = project.trainer("runs", "--prometheus").stdout
    assert 'trainer_run_step{run="tiny"} 2' in text
    promtool = subprocess.run(["promtool", "check", "metrics"], input=text, text=True, capture_output=True, check=False)
    assert promtool.returncode == 0, promtool.stdout + promtool.stderr
    root = tmp_path_factory.mktemp("prometheus")
    with serving(project, "--deployments") as server, textfile(text) as runs:
        control = Control(server, project, server.running.out.read_text().strip())
        control.create("orders", scale_to_zero_s=600)
        key = control.call("POST", "/v1/keys", {"account": "admin", "scopes": ["metrics"]}).json()["key"]
        control.ask("orders")
        control.ask("orders", max_tokens=100_000)  # a 400
        with prometheus(root, server.port, runs, key) as address:
            wait_for(lambda: len([each for each in ask(address, "up") if each["value"][1] == "1"]) == 2)
            control.ask("orders")
            wait_for(lambda: ask(address, "sum(rate(trainer_output_tokens_total[5m])) > 0"))
            for panel in json.loads(DASHBOARD.read_text())["panels"]:
                for target in panel["targets"]:
                    is_absent = panel["title"] in ONLY_WITH_A_GPU or target["expr"] == ONLY_IN_RFT
                    assert bool(ask(address, target["expr"])) is not is_absent, (panel["title"], target["expr"])
            (tokens,) = ask(address, 'trainer_output_tokens_total{deployment="orders", addon=""}')
            assert tokens["value"][1] == "12"  # two answers of six tokens
            codes = {each["metric"]["status"] for each in ask(address, "trainer_requests_total")}
            assert {"200", "400"} <= codes
