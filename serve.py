"""Serve the model of a checkpoint over HTTP, with a web page to try it.

  python serve.py --checkpoint runs/x/best.pt --port 8000

POST /predict, /feedback and /reload; GET /health, /schema, /drift, /metrics (Prometheus), /openapi.json and the page at
/. With an API key, all but /health require it: `Authorization: Bearer KEY`, or as the password in a browser.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads slow down everything else on the machine

import gc
import sys
from dataclasses import dataclass

from console import run
from errors import UserError, parse_flags

SHUTDOWN_TIMEOUT = 8  # seconds to finish accepted requests when the service is stopped; docker kills after 10


@dataclass(frozen=True)
class Options:
    """which model to serve, and where"""

    checkpoint: str
    """best.pt of a run."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 = reachable from other machines (set an --api-key then)."""
    port: int = 8000
    """0 = any free port."""
    api_key: str = ""
    """Key that clients must send; better set as environment variable API_KEY, which other users can't see."""
    log: str = ""
    """SQLite file for requests, predictions, and the true targets sent to /feedback."""
    force: bool = False
    """Serve the checkpoint even if it is worse than the model that the log used last."""

    def __post_init__(self):
        if not 0 <= self.port < 65_536:
            raise UserError(f"--port must be between 0 and 65535, got {self.port}.")
        if self.checkpoint.endswith(".onnx"):
            raise UserError(f"--checkpoint {self.checkpoint}: ONNX files are not supported: give the run's best.pt.")


def serve(options: Options) -> None:
    """Load the model and serve it until stopped; then finish the accepted requests."""
    import ipaddress
    import socket

    import torch
    import uvicorn

    from serving.app import make_app
    from serving.batching import Service
    from serving.guard import LOOPBACK
    from serving.protocol import Protocol, Server

    key = read_key(options.api_key or os.environ.get("API_KEY", ""))
    service = Service(options.checkpoint, options.log, force=options.force)
    if service.comparison:
        print(service.comparison, file=sys.stderr)
    torch.set_num_threads(service.model.pipeline.threads or torch.get_num_threads())  # 1 for small networks
    try:
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        listener = socket.create_server((options.host, options.port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {options.host} --port {options.port}: cannot listen there ({error}).") from None
    host, port = listener.getsockname()[:2]
    is_local = ipaddress.ip_address(host.split("%")[0]).is_loopback
    if not key and not is_local:
        print(
            f"warning: --host {options.host} without an API key: anyone who reaches this address can use the model, "
            "read its reports and reload it. Set API_KEY, or --host 127.0.0.1.",
            file=sys.stderr,
        )
    host = f"[{host}]" if ":" in host else host
    print(f"serving {options.checkpoint} at http://{host}:{port} (Ctrl-C stops)", flush=True)
    app = make_app(service, key, (*LOOPBACK, options.host.lower()) if is_local and not key else ())
    gc.freeze()  # the loaded modules stay: scanning them takes the garbage collector 70 ms each time
    quiet = {"log_level": "warning", "access_log": False}
    config = uvicorn.Config(app, http=Protocol, ws="none", timeout_graceful_shutdown=SHUTDOWN_TIMEOUT, **quiet)
    Server(config, service).run(sockets=[listener])


def read_key(key: str) -> str:
    """Return an API key without the newline that a file may end in. Raises UserError if no header can hold it."""
    if (key and not key.strip().isprintable()) or key.isspace():
        raise UserError("API_KEY: the key must be printable characters, in one line.")
    return key.strip()


if __name__ == "__main__":
    run(lambda: serve(parse_flags(Options, description=__doc__)))
