"""A small HTTP server on loopback that answers as servers do, well or badly."""

import hashlib
import http.server
import threading
import time


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` by name.

    Attributes:
        cuts: bytes after which one answer each breaks off.
        asked: (name, Range, If-Range) of each request.
        validators: function of the data that returns the headers ETag and Last-Modified.
        ranges, if_range: whether it knows these headers.
        spans: function of start and length that returns a Content-Range.
        status: of an answer without a range.
        lengths: whether it sends Content-Length.
        slow: seconds between blocks.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.cuts, self.asked, self.slow = {}, [], [], 0
        self.ranges = self.if_range = self.lengths = True
        self.status = 200
        self.validators = lambda data: {"ETag": f'"{hashlib.md5(data).hexdigest()}"'}
        self.spans = lambda start, length: f"bytes {start}-{length - 1}/{length}"
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def places(self, name):
        """List the Range headers with which a file was asked for."""
        return [where for asked, where, _ in self.asked if asked == name]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, name = self.server, self.path.lstrip("/")
        where, condition = self.headers.get("Range"), self.headers.get("If-Range")
        server.asked.append((name, where, condition))
        data = server.content.get(name)
        if data is None:
            self.send_error(404)
            return
        validators = server.validators(data)
        same = not condition or not server.if_range or condition in validators.values()
        start = int(where.removeprefix("bytes=").rstrip("-")) if where and server.ranges and same else 0
        if start and start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else server.status)
        headers = {"Content-Length": str(len(data) - start)} if server.lengths else {}
        headers |= validators | ({"Content-Range": server.spans(start, len(data))} if start else {})
        for header in headers.items():
            self.send_header(*header)
        self.end_headers()
        rest = data[start:]
        if server.cuts:
            rest = rest[: server.cuts.pop(0)]
        try:
            for at in range(0, len(rest), 10_000):
                self.wfile.write(rest[at : at + 10_000])
                time.sleep(server.slow)
        except OSError:
            return  # whoever asked has gone

    def log_message(self, *_):
        pass
