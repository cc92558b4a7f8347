"""A chat server that does what a script says, over real sockets."""

import json
import socket
import threading
import time
from collections.abc import Callable

Act = Callable[[socket.socket, dict], None]


def http(status: int, body: bytes | str, headers: str = "") -> bytes:
    body = body.encode() if isinstance(body, str) else body
    head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{headers}Connection: close\r\n\r\n"
    return head.encode() + body


def completion(text: str | None, finish: str = "stop", **message) -> str:
    choice = {"message": {"role": "assistant", "content": text} | message, "finish_reason": finish}
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 10, "completion_tokens": 2}})


def says(text: str | None, **options) -> Act:
    """A well-formed reply with this text."""
    return sends(http(200, completion(text, **options)))


def sends(data: bytes, wait_s: float = 0.0) -> Act:
    def act(connection: socket.socket, request: dict) -> None:
        time.sleep(wait_s)
        connection.sendall(data)

    return act


def trickles(data: bytes, each_s: float) -> Act:
    """A byte at a time: every single read is quick, the whole never ends."""

    def act(connection: socket.socket, request: dict) -> None:
        for number in range(len(data)):
            connection.sendall(data[number : number + 1])
            time.sleep(each_s)

    return act


def hangs(connection: socket.socket, request: dict) -> None:
    connection.recv(1)  # until the client goes


class ScriptedServer:
    """Gives the n-th chat request to the n-th act of the script, the last one to all that follow; `requests` are their
    bodies. `GET /v1/models` is answered with `health`.
    """

    def __init__(self, *script: Act) -> None:
        self.script, self.requests, self.heads, self.health = list(script), [], [], 200
        self._lock = threading.Lock()
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> "ScriptedServer":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                reader = connection.makefile("rb")
                with reader:
                    lines = []
                    while (line := reader.readline().strip()):
                        lines.append(line.decode())
                    if not lines:
                        return
                    headers = dict(line.lower().split(": ", 1) for line in lines[1:])
                    body = reader.read(int(headers.get("content-length", 0)))
                if lines[0].startswith("GET"):
                    connection.sendall(http(self.health, "{}"))
                    return
                with self._lock:
                    act = self.script[min(len(self.requests), len(self.script) - 1)]
                    self.requests.append(json.loads(body))
                    self.heads.append(lines)
                act(connection, self.requests[-1])
            except OSError:
                return  # the client went away
