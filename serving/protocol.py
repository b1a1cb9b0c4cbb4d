"""HTTP connections: limits on headers, on the time until they are complete, and on the number of connections."""

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADERS = 64 << 10  # bytes of the request line and headers, and of trailers after a chunked body
HEADER_TIMEOUT = 10  # seconds from the connection, or the end of the previous request, to complete headers
STOP_TIMEOUT = 3  # seconds within which a body must be complete once the service is stopped
MAX_CONNECTIONS = 800  # at once; most systems allow a process 1,024 open files
TOO_LARGE = f"431 Request Header Fields Too Large|the headers exceed {MAX_HEADERS:,} bytes."
TOO_SLOW = f"408 Request Timeout|the headers must arrive within {HEADER_TIMEOUT} seconds."
TOO_MANY = "503 Service Unavailable|too many connections: try again in a second."


class Server(uvicorn.Server):
    """uvicorn's server, which closes the service at its end: a signal that stopped it then ends the process."""

    def __init__(self, config, service):
        super().__init__(config)
        self.service = service

    async def shutdown(self, sockets=None):
        await super().shutdown(sockets)
        self.service.close()


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol, which has none of these limits."""

    deadline = None  # the timer of a connection that waits for headers
    pending = 0  # bytes received since the last body byte or complete headers
    refusal = ""

    def connection_made(self, transport):
        super().connection_made(transport)
        self._wait_for_headers()
        if len(self.connections) > MAX_CONNECTIONS:  # the one that has waited longest for its headers gives way
            waiting = (connection for connection in self.connections if connection.deadline)
            min(waiting, key=lambda connection: connection.deadline.when()).refuse(TOO_MANY)

    def connection_lost(self, exc):
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data):
        self.pending += len(data)
        super().data_received(data)
        if self.pending > MAX_HEADERS:
            self.refuse(TOO_LARGE)
        elif self.pending and not self.deadline and (self.cycle is None or not self.cycle.more_body):
            self._wait_for_headers()  # of a later request on this connection

    def on_headers_complete(self):
        if self.pending > MAX_HEADERS:  # or a body arrived together with the headers
            size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
            if size > MAX_HEADERS:
                self.refusal = TOO_LARGE
                raise httptools.HttpParserError
        self.pending = 0
        self._stop_waiting()
        super().on_headers_complete()

    def on_body(self, body):
        self.pending = 0
        super().on_body(body)

    def on_message_complete(self):
        self.pending = 0
        super().on_message_complete()
        self.cycle.more_body = False  # also if the response is complete

    def on_header(self, name, value):
        if self.cycle is None or not self.cycle.more_body:  # otherwise a trailer, which nothing reads
            super().on_header(name, value)

    def shutdown(self):
        super().shutdown()
        if self.cycle and self.cycle.more_body and not self.transport.is_closing():
            self.loop.call_later(STOP_TIMEOUT, self._stop_reading, self.cycle)

    def _stop_reading(self, cycle):
        if cycle.more_body:
            self.transport.close()

    def _wait_for_headers(self):
        self.deadline = self.loop.call_later(HEADER_TIMEOUT, self._expire)

    def _stop_waiting(self):
        if self.deadline:
            self.deadline.cancel()
            self.deadline = None

    def _expire(self):
        self.deadline = None
        if self.cycle and not self.cycle.response_complete:  # of the previous request
            self._wait_for_headers()
        elif self.pending:
            self.refuse(TOO_SLOW)
        else:
            self.transport.close()

    def send_400_response(self, msg):
        self.refuse(self.refusal or f"400 Bad Request|{msg}")

    def refuse(self, status: str) -> None:
        """Close the connection, after one line that says why unless it would end up within another response."""
        self._stop_waiting()
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            line, _, detail = status.partition("|")
            body = f'{{"detail": "{detail}"}}'
            head = f"HTTP/1.1 {line}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            self.transport.write(f"{head}\r\nConnection: close\r\n\r\n{body}".encode())
        self.transport.close()
