"""One local page that searches: HTTP on this machine alone, and nothing of it leaves the machine.

    GET  /                      the page, its style sheet and its script
    GET  /about                 what is searched
    GET  /search?text=SENTENCE  the nearest images and captions, as JSON
    GET  /search?image=ID       those nearest to one of the images
    POST /search                those nearest to the image file in the body
    GET  /thumbnail/ID          a small JPEG of one of the images

An ID is the identity of an image that was listed: no path of a file is ever taken from a request.
"""

import errno
import io
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from PIL import Image

from ..data.images import MAX_IMAGE_BYTES, BadSample, thumbnail
from .explorer import Answer, Explorer

HOST: Final = "127.0.0.1"
_THUMBNAIL_SIDE = 320
_EXAMPLES = 12
_PAGE = Path(__file__).parent / "page"
_FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/script.js": ("script.js", "text/javascript; charset=utf-8"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' blob: data:; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


def listen(port: int) -> ThreadingHTTPServer:
    """Take a port of this machine, 0 for a free one; who connects waits until ``serve``.

    Raises OSError where the port is taken or not allowed.
    """
    try:
        return _Server((HOST, port), BaseHTTPRequestHandler)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise OSError(f"port {port} is in use: name another with --port, or 0 for any that is free") from error
        raise OSError(f"port {port} cannot be taken ({error.strerror}): name another with --port") from error


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that went away; anything else is a fault of ours."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def serve(server: ThreadingHTTPServer, explorer: Explorer, about: dict[str, Any], k: int) -> None:
    """Answer until the server is shut down.

    Args:
        server: what ``listen`` returned.
        explorer: what is searched.
        about: what the page says of it.
        k: images and captions in an answer.
    """
    server.RequestHandlerClass = partial(_Handler, Site(explorer, about, k))
    server.serve_forever()


class Site:
    """What the requests are answered from."""

    def __init__(self, explorer: Explorer, about: dict[str, Any], k: int) -> None:
        self._explorer = explorer
        self._k = k
        pictures = explorer.pictures
        self._place_of = {pictures.identities[place].hex(): place for place in explorer.places.tolist()}
        examples = [
            {"name": explorer.name(place), "id": self._id(place), "captions": pictures.captions[place]}
            for place in explorer.some(_EXAMPLES)
        ]
        self.about = about | {"examples": examples}
        self.files = {path: ((_PAGE / name).read_bytes(), kind) for path, (name, kind) in _FILES.items()}

    def search(self, query: dict[str, list[str]]) -> dict[str, Any]:
        """Answer to a sentence or to one of the images."""
        match query:
            case {"text": [text]}:
                return self._answer(lambda: self._explorer.by_text(text, self._k))
            case {"image": [identity]}:
                place = self._place(identity)
                return self._answer(lambda: self._explorer.by_place(place, self._k))
        raise Refused(HTTPStatus.BAD_REQUEST, "give text or image")

    def search_image(self, payload: bytes) -> dict[str, Any]:
        """Answer to an image file."""
        return self._answer(lambda: self._explorer.by_image(payload, self._k))

    def thumbnail(self, identity: str) -> bytes:
        """Return a small JPEG of one of the images."""
        place = self._place(identity)
        try:
            image = thumbnail(self._explorer.pictures.read(place), _THUMBNAIL_SIDE)
        except BadSample as fault:
            raise Refused(HTTPStatus.NOT_FOUND, str(fault)) from fault
        file = io.BytesIO()
        Image.fromarray(image).save(file, "jpeg", quality=88, subsampling=0)
        return file.getvalue()

    def _place(self, identity: str) -> int:
        if identity not in self._place_of:
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such image")
        return self._place_of[identity]

    def _id(self, place: int) -> str:
        return self._explorer.pictures.identities[place].hex()

    def _answer(self, search: Callable[[], Answer]) -> dict[str, Any]:
        start = time.perf_counter()
        try:
            answer = search()
        except ValueError as error:  # also BadSample
            raise Refused(HTTPStatus.BAD_REQUEST, str(error)) from error
        return {
            "images": [
                {"id": self._id(found.place), "name": found.name, "captions": found.captions, "cosine": found.cosine}
                for found in answer.images
            ],
            "captions": [{"text": found.text, "cosine": found.cosine} for found in answer.captions],
            "seconds": time.perf_counter() - start,
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "textlock"
    sys_version = ""
    timeout = 60

    def __init__(self, site: Site, *arguments: Any) -> None:
        self._site = site
        super().__init__(*arguments)

    def do_GET(self) -> None:
        self._reply(self._get)

    def do_POST(self) -> None:
        self._reply(self._post)

    def _get(self) -> tuple[bytes, str]:
        address = urlsplit(self.path)
        if address.path in self._site.files:
            return self._site.files[address.path]
        if address.path == "/about":
            return _json(self._site.about)
        if address.path == "/search":
            return _json(self._site.search(parse_qs(address.query, keep_blank_values=True)))
        if address.path.startswith("/thumbnail/"):
            return self._site.thumbnail(address.path.removeprefix("/thumbnail/")), "image/jpeg"
        raise Refused(HTTPStatus.NOT_FOUND, "there is no such page")

    def _post(self) -> tuple[bytes, str]:
        if self.path != "/search":
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such page")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "the length of the image is missing")
        if int(length) > MAX_IMAGE_BYTES:
            raise Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the image has more than {MAX_IMAGE_BYTES // 2**20} MiB"
            )
        payload = self.rfile.read(int(length))
        self.close_connection = False
        return _json(self._site.search_image(payload))

    def _reply(self, answer: Callable[[], tuple[bytes, str]]) -> None:
        status = HTTPStatus.OK
        if self.command == "POST":  # what is left of a body that was not read is no request
            self.close_connection = True
        try:
            self._require_own()
            body, kind = answer()
        except Refused as refused:
            status = refused.status
            body, kind = _json({"error": str(refused)})
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        is_kept = status == HTTPStatus.OK and kind == "image/jpeg"  # an ID is of one content
        self.send_header("Cache-Control", "private, max-age=86400" if is_kept else "no-store")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def _require_own(self) -> None:
        """Refuse what another site's page asks for, also under a name of its own that it points to this machine."""
        port = self.connection.getsockname()[1]
        if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
            raise Refused(HTTPStatus.FORBIDDEN, f"ask for http://{HOST}:{port}")
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            raise Refused(HTTPStatus.FORBIDDEN, "another site asks")

    def log_message(self, format: str, *arguments: Any) -> None:
        """Leave the terminal to what went wrong."""


def _json(content: Any) -> tuple[bytes, str]:
    return json.dumps(content).encode(), "application/json"
