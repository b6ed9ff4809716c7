"""The local page, over HTTP."""

import http.client
import io
import json
import re
import socket
import threading

import pytest
from PIL import Image

from textlock.data.images import MAX_IMAGE_BYTES
from textlock.search.explorer import Explorer
from textlock.search.pictures import find_pictures
from textlock.search.server import listen, serve

from .toys import Counting, jpeg


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A server of six images, one of them large and one with a caption; next to their folder lies a secret."""
    root = tmp_path_factory.mktemp("site")
    folder = root / "pictures"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
    (folder / "5.jpg").write_bytes(jpeg(5, height=700, width=1400))
    (folder / "1.txt").write_text("<b>a dog</b>")
    (root / "secret.jpg").write_bytes(jpeg(6))
    explorer = Explorer(Counting().towers, find_pictures(folder), root / "cache")
    server = listen(0)
    thread = threading.Thread(target=serve, args=(server, explorer, {"count": "6 images"}, 3))
    thread.start()
    yield server.server_address[1], explorer
    server.shutdown()
    thread.join()
    server.server_close()


def ask(site, path, *, method="GET", body=None, **headers):
    """Return status, headers and body of the answer; the path is sent as it stands."""
    connection = http.client.HTTPConnection("127.0.0.1", site[0], timeout=30)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def found(site, path, **request):
    status, _, body = ask(site, path, **request)
    assert status == 200, body
    return json.loads(body)


def test_the_page_and_all_that_it_names_come_from_here(site):
    status, headers, body = ask(site, "/")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    page = body.decode()
    for path in re.findall(r'(?:src|href)="(/[^"]+)"', page):
        status, headers, body = ask(site, path)
        assert status == 200 and headers["X-Content-Type-Options"] == "nosniff"
        page += body.decode()
    assert "script.js" in page and "--paper" in page
    assert not re.search(r"https?://|//[\w-]+\.", page), "something is fetched from elsewhere"
    # Every element that the script takes by its name is on the page.
    for name in re.findall(r'by\("([\w-]+)"\)', page):
        assert f'id="{name}"' in page, name


def test_a_sentence_finds_what_the_explorer_finds(site):
    answer, expected = found(site, "/search?text=%3Cb%3Ea+dog%3C%2Fb%3E"), site[1].by_text("<b>a dog</b>", 3)
    assert [image["name"] for image in answer["images"]] == [image.name for image in expected.images]
    assert [image["cosine"] for image in answer["images"]] == [image.cosine for image in expected.images]
    assert answer["captions"] == [{"text": "<b>a dog</b>", "cosine": expected.captions[0].cosine}]


def test_images_find_themselves(site):
    about = found(site, "/about")
    assert about["count"] == "6 images" and len(about["examples"]) == 6
    answer = found(site, "/search", method="POST", body=jpeg(2))
    assert answer["images"][0]["name"] == "2.jpg" and answer["images"][0]["cosine"] == pytest.approx(1, abs=1e-6)
    again = found(site, f"/search?image={answer['images'][0]['id']}")
    assert [image["name"] for image in again["images"]] == [image["name"] for image in answer["images"]]


def test_thumbnails_are_small_jpegs_of_whole_images(site):
    sizes = {}
    for example in found(site, "/about")["examples"]:
        status, headers, body = ask(site, f"/thumbnail/{example['id']}")
        assert status == 200 and headers["Content-Type"] == "image/jpeg"
        with Image.open(io.BytesIO(body)) as image:
            sizes[example["name"]] = image.format, image.size
    assert sizes["0.jpg"] == ("JPEG", (30, 40)) and sizes["5.jpg"] == ("JPEG", (320, 160))


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/thumbnail/../../etc/passwd",
        "/thumbnail//etc/passwd",
        "/thumbnail/..%2f..%2fsecret.jpg",
        "/thumbnail/0.jpg",
        "/thumbnail/",
        "/page.html",
        "/page/page.html",
        "/search/..",
        "/thumbnail/" + "0" * 32,
        "/search?image=../secret.jpg",
    ],
)
def test_nothing_but_listed_images_is_served(site, path):
    status, _, body = ask(site, path)
    assert status == 404 and set(json.loads(body)) == {"error"}


def test_bad_requests_are_answered_in_one_sentence(site):
    for path, request, status, said in [
        ("/search", {}, 400, "give text or image"),
        ("/search?text=", {}, 400, "the query is empty"),
        ("/search?text=a&text=b", {}, 400, "give text or image"),
        ("/search", {"method": "POST", "body": b"<html>"}, 400, "JPEG"),
        ("/about", {"method": "POST", "body": b""}, 404, "no such page"),
        ("/search", {"method": "POST", "Content_Length": "-1"}, 411, "length"),
        ("/search", {"method": "POST", "Content_Length": str(MAX_IMAGE_BYTES + 1)}, 413, "16 MiB"),
    ]:
        answer = ask(site, path, **request)
        assert answer[0] == status and said in json.loads(answer[2])["error"], (path, answer)


def test_the_pages_of_other_sites_are_refused(site):
    """Also one whose name leads to this machine."""
    port = site[0]
    for headers in ({"Host": "evil.example"}, {"Host": f"evil.example:{port}"}, {"Sec_Fetch_Site": "cross-site"}):
        assert ask(site, "/about", **headers)[0] == 403
    assert ask(site, "/about", Host=f"localhost:{port}", Sec_Fetch_Site="same-origin")[0] == 200


def test_only_this_machine_is_listened_to_and_a_taken_port_is_said(site):
    with pytest.raises(OSError, match=f"port {site[0]} is in use: name another with --port"):
        listen(site[0])
    # Another address of this machine.
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", site[0]), timeout=5)


def test_an_image_that_changed_after_it_was_listed_is_not_shown(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(jpeg(0))
    explorer = Explorer(Counting().towers, find_pictures(folder), tmp_path / "cache")
    server = listen(0)
    thread = threading.Thread(target=serve, args=(server, explorer, {}, 3))
    thread.start()
    try:
        site = (server.server_address[1], explorer)
        (example,) = found(site, "/about")["examples"]
        (folder / "a.jpg").unlink()
        (folder / "a.jpg").write_bytes(jpeg(1))
        status, _, body = ask(site, f"/thumbnail/{example['id']}")
        assert status == 404 and "has changed since it was listed" in json.loads(body)["error"]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
