import io
import tarfile

import pytest
import webdataset
from hypothesis import example, given, settings
from hypothesis import strategies as st

from textlock.data.captions import Fields
from textlock.data.tar import DamagedTar, _read_pax, read_members, read_samples, split_key

from .tars import FORMATS, contents, extended_header, set_field, set_size, tar_bytes, tarfile_contents, write_tar

names = st.lists(
    st.text("abcXYZ0189 _-.é漢", min_size=1, max_size=90).filter(lambda part: part.strip(".") == part), max_size=4
).map(lambda parts: "/".join([*parts, "name.jpg"]))


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@settings(max_examples=40, deadline=None)
@example(members=[("d" * 300 + "/" + "n" * 900 + ".jpg", b"image"), ("short.txt", b"text")])  # longer than a block
@given(members=st.lists(st.tuples(names, st.binary(max_size=1500)), max_size=6))
def test_members_agree_with_tarfile(format, members, tmp_path_factory):
    path = tmp_path_factory.mktemp("tar") / "0.tar"
    try:
        write_tar(path, members, format)
    except ValueError:  # USTAR has no room for this name
        return
    assert contents(path) == tarfile_contents(path) == members


def test_links_and_devices_are_not_followed(tmp_path):
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
    links = [(f"{number}.jpg", b"", kind) for number, kind in enumerate(kinds)]
    path = write_tar(tmp_path / "0.tar", [*links, ("real.jpg", b"abc")])
    assert contents(path) == [("real.jpg", b"abc")]
    samples, problems, _ = read_samples(path, Fields())
    assert [sample.key for sample in samples] == ["real"]
    # tarfile writes a folder's name with a slash at its end: it has no extension.
    assert [(problem.key, problem.kind) for problem in problems] == [("0", "link"), ("1", "link"), ("2", "link")]


@pytest.mark.parametrize("name", ["/etc/a.jpg", "../a.jpg", "b/../../a.jpg", "b/..", "b\\..\\a.jpg", "C:\\..\\a.jpg"])
def test_names_that_lead_out_of_their_folder(name, tmp_path):
    path = write_tar(tmp_path / "0.tar", [("./b.jpg", b"b"), (name, b"a"), ("..c/d.jpg", b"c")])
    samples, problems, _ = read_samples(path, Fields())
    assert [sample.key for sample in samples] == ["./b", "..c/d"]
    assert [problem.kind for problem in problems] == ["name"] * name.endswith(".jpg")


def test_what_a_sparse_member_holds_is_not_read_and_a_byte_that_is_no_utf_8_is_no_separator(tmp_path):
    path = tmp_path / "0.tar"
    inner = tar_bytes([("inner.jpg", b"x")])
    raw = bytearray(tar_bytes([("a.tar", inner), ("\udce9t\udce9.jpg", b"y")], tarfile.GNU_FORMAT))
    set_field(raw, 0, 156, b"S")
    path.write_bytes(raw)
    samples, problems, _ = read_samples(path, Fields())
    assert ([s.key for s in samples], [p.kind for p in problems]) == ([r"\xe9t\xe9"], ["tar-sparse"])
    # Two more headers of the old GNU format before the data.
    set_field(raw, 0, 482, b"\1")
    raw[512:512] = (bytes(504) + b"\1" + bytes(7)) + bytes(512)
    path.write_bytes(raw)
    assert [s.key for s in read_samples(path, Fields()).samples] == [r"\xe9t\xe9"]


def test_base_256_and_pax_sizes(tmp_path):
    path = tmp_path / "0.tar"
    members = [("a.jpg", b"abc"), ("b.jpg", b"de")]
    raw = bytearray(tar_bytes(members))
    set_size(raw, 0, b"\x80" + (3).to_bytes(11, "big"))
    path.write_bytes(raw)
    assert contents(path) == tarfile_contents(path) == members

    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "of the whole archive"}) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size, info.pax_headers = 3, {"size": "3", "mtime": "1.5"}
        tar.addfile(info, io.BytesIO(b"abc"))
    assert contents(path) == [("a.jpg", b"abc")]


def extend(raw, kind, body):
    raw[1536:1536] = extended_header(kind, body)


# Each edits a tar of the members a, b and c of 600 bytes, which begin at 0, 1536 and 3072, and says of which kind the
# damage is and which members are read all the same.
DAMAGE = [
    pytest.param(lambda raw: raw.__setitem__(1536 + 5, raw[1541] ^ 4), "tar-header", "ac", id="flipped bit"),
    pytest.param(lambda raw: raw.__setitem__(slice(1536, 2048), bytes(512)), "tar-concatenated", "ac", id="zeros"),
    pytest.param(lambda raw: raw.__delitem__(slice(1536, 1836)), "tar-header", "a", id="a part is missing"),
    pytest.param(lambda raw: raw.__delitem__(slice(4000, None)), "tar-truncated", "ab", id="cut in a member"),
    pytest.param(lambda raw: raw.__delitem__(slice(3300, None)), "tar-truncated", "ab", id="cut in a header"),
    pytest.param(lambda raw: raw.__delitem__(slice(3072, None)), "tar-truncated", "ab", id="cut between"),
    pytest.param(lambda raw: raw.__delitem__(slice(0, None)), "tar-truncated", "", id="0 bytes"),
    pytest.param(lambda raw: set_size(raw, 1536, b"77777777777\0"), "tar-size", "ac", id="8 GB size"),
    pytest.param(lambda raw: set_size(raw, 1536, b"\x80" + b"\x3f" * 11), "tar-size", "ac", id="2^86 size"),
    pytest.param(lambda raw: set_size(raw, 1536, b"\xff" * 12), "tar-header", "ac", id="negative size"),
    pytest.param(lambda raw: set_size(raw, 1536, b"12x45678901\0"), "tar-header", "ac", id="not octal"),
    pytest.param(lambda raw: set_size(raw, 1536, b"00000000144\0"), "tar-header", "abc", id="a size too small"),
    pytest.param(lambda raw: set_size(raw, 1536, b"00000002144\0"), "tar-header", "ab", id="a size too large"),
    pytest.param(lambda raw: set_field(raw, 1536, 156, b"S"), "tar-sparse", "ac", id="sparse"),
    pytest.param(lambda raw: extend(raw, b"x", b"22 GNU.sparse.major=1\n"), "tar-sparse", "ac", id="pax sparse"),
    pytest.param(lambda raw: extend(raw, b"x", b"9 path=b"), "tar-extended", "abc", id="pax without an end"),
    pytest.param(lambda raw: extend(raw, b"x", b"0 path=b\n"), "tar-extended", "abc", id="pax of no length"),
    pytest.param(lambda raw: extend(raw, b"x", b"11 size=-1\n"), "tar-extended", "abc", id="pax negative size"),
    pytest.param(lambda raw: extend(raw, b"L", bytes(2**20 + 1)), "tar-extended", "abc", id="1 MB name"),
    pytest.param(lambda raw: raw.extend(raw[:2048]), "tar-concatenated", "abca", id="two tars in one file"),
    pytest.param(lambda raw: raw.extend(b"x" * 700), "tar-garbage", "abc", id="data behind the end"),
]


@pytest.mark.parametrize(("edit", "kind", "kept"), DAMAGE)
def test_damage_is_named_and_its_neighbours_are_kept(edit, kind, kept, tmp_path):
    raw = bytearray(tar_bytes([(f"{name}.jpg", name.encode() * 600) for name in "abc"]))
    edit(raw)
    path = tmp_path / "0.tar"
    path.write_bytes(raw)
    damages = []
    with open(path, "rb") as file:
        found = list(read_members(file, on_damage=damages.append))
    assert kind in [damage.kind for damage in damages]
    assert [member.name[0] for member in found] == list(kept)
    for member in found:
        assert set(raw[member.offset :][: min(member.size, 600)]) == {ord(member.name[0])}

    with open(path, "rb") as file, pytest.raises(DamagedTar) as caught:
        list(read_members(file))
    assert caught.value.kind == damages[0].kind


def test_a_tar_of_nothing_but_damage_is_given_up(tmp_path):
    raw = bytearray(tar_bytes([(f"{number}.jpg", b"") for number in range(300)]))
    for at in range(0, 600 * 512, 512):
        set_size(raw, at, b"77777777777\0")
    path = tmp_path / "0.tar"
    path.write_bytes(raw)
    assert len(read_samples(path, Fields())[1]) == 101


def test_an_extended_header_of_many_records_is_read_in_one_pass():
    """Copying what is left at each of its 100,000 records would take minutes."""
    copied = 0

    class Counted(bytes):
        def __getitem__(self, part):
            nonlocal copied
            content = Counted(super().__getitem__(part))
            copied += len(content)
            return content

    body = Counted(b"5 a=\n" * 100_000 + b"11 path=d.\n")
    assert _read_pax(body, 0) == ("d.", None, False)
    assert copied < 4 * len(body)


@pytest.mark.parametrize(
    ("name", "key", "field"),
    [
        ("000000001.jpg", "000000001", "jpg"),
        ("folder.d/a.b.JPG", "folder.d/a", "b.jpg"),
        ("folder.d/a.JPG", "folder.d/a", "jpg"),
        ("../../etc/a.txt", "../../etc/a", "txt"),
        ("folder/._a.jpg", "", ""),
        ("noextension", "", ""),
    ],
)
def test_split_key(name, key, field):
    assert split_key(name) == (key, field)
    found, suffix = webdataset.tariterators.base_plus_ext(name)
    assert (found or "", (suffix or "").lower()) == (key, field) or "._" in name  # what macOS puts beside a file


def test_samples_are_grouped_by_key(tmp_path):
    names = ["b.txt", "a.JPG", "b.webp", "a.json", "a.txt", "a.png", "b.txt", "alone.txt", "silent.jpeg"]
    path = write_tar(tmp_path / "0.tar", [(name, b"x") for name in names])
    samples, problems, _ = read_samples(path, Fields())
    found = [(s.key, s.image.name, *(member.name for member in s.captions.values())) for s in samples]
    assert found == [("b", "b.webp", "b.txt"), ("a", "a.JPG", "a.txt"), ("silent", "silent.jpeg")]
    assert sorted((p.key, p.kind, p.message) for p in problems) == [
        ("a", "duplicate", "its image is a.JPG; a.png is not used"),
        ("alone", "no-image", "the sample has a caption but no image"),
        ("b", "duplicate", "a second member b.txt is not used"),
    ]


@pytest.mark.parametrize("reverse", [False, True], ids=["as listed", "the other way round"])
def test_other_fields_beside_image_and_caption_are_left_and_counted(reverse, tmp_path):
    """As webdataset and open_clip read them, whichever comes first."""
    names = ["0.depth.png", "0.jpg", "0.de.txt", "0.txt", "0.json", "0.npz", "1.seg.v2.png", "1.webp"]
    path = write_tar(tmp_path / "0.tar", [(name, name.encode()) for name in (names[::-1] if reverse else names)])
    samples, problems, left = read_samples(path, Fields())
    found = {s.key: (s.image.name, *(member.name for member in s.captions.values())) for s in samples}
    assert found == {"0": ("0.jpg", "0.txt"), "1": ("1.webp",)} and not problems
    assert left == {"depth.png": 1, "de.txt": 1, "json": 1, "npz": 1, "seg.v2.png": 1}


@pytest.mark.parametrize("reverse", [False, True], ids=["as listed", "the other way round"])
def test_the_first_of_the_named_fields_that_a_sample_has_is_its_image(reverse, tmp_path):
    names = ["0.jpg", "0.depth.png", "0.png", "0.txt", "0.json", "0.meta.json", "1.jpg", "1.meta.json", "2.txt"]
    path = write_tar(tmp_path / "0.tar", [(name, b"x") for name in (names[::-1] if reverse else names)])
    fields = Fields(("depth.png", "jpg"), ("json:title", "txt", "json:alt", "meta.json:x"))
    samples, problems, left = read_samples(path, fields)
    found = {s.key: (s.image.name, {place: member.name for place, member in s.captions.items()}) for s in samples}
    assert found == {
        "0": ("0.depth.png", {0: "0.json", 1: "0.txt", 2: "0.json", 3: "0.meta.json"}),
        "1": ("1.jpg", {3: "1.meta.json"}),
    }
    assert left == {"png": 1}
    assert sorted((p.key, p.kind) for p in problems) == [("0", "duplicate"), ("2", "no-image")]


@pytest.mark.parametrize(
    ("start", "what"),
    [(b"\x1f\x8b\x08", "gzip"), (b"BZh91AY", "bzip2"), (b"\xfd7zXZ\0", "xz"), (b"\x28\xb5\x2f\xfd", "zstd")],
)
def test_a_compressed_shard_is_named_for_what_it_is(start, what, tmp_path):
    path = tmp_path / "0.tar"
    path.write_bytes(start + bytes(2000))
    assert read_samples(path, Fields()).problems[0].message.startswith(f"it is compressed with {what}: decompress it (")
    write_tar(path, [(start.decode("latin-1").replace("\0", "") + ".jpg", b"x")])
    assert not [problem for problem in read_samples(path, Fields()).problems if problem.kind == "compressed"]


@pytest.mark.parametrize("reverse", [False, True], ids=["as listed", "the other way round"])
def test_names_with_more_dots_are_pairs_of_their_own_and_never_joined_crosswise(reverse, tmp_path):
    names = ["cat.1.jpg", "cat.1.txt", "cat.2.JPG", "cat.2.txt", "dog.jpg", "dog.txt", "dog.1.jpg", "dog.1.txt"]
    names += ["cow.1.png", "cow.txt", "cow.seg.v2.png", "b/a.de.txt", "b/a.0.1.webp", "b/a.0.1.txt", "b/a.de.jpg"]
    path = write_tar(tmp_path / "0.tar", [(name, name.encode()) for name in (names[::-1] if reverse else names)])
    samples, problems, left = read_samples(path, Fields())
    found = [(s.key, s.image.name, s.captions[0].name) for s in samples]
    assert sorted(found) == [
        ("b/a.0.1", "b/a.0.1.webp", "b/a.0.1.txt"),
        ("b/a.de", "b/a.de.jpg", "b/a.de.txt"),
        ("cat.1", "cat.1.jpg", "cat.1.txt"),
        ("cat.2", "cat.2.JPG", "cat.2.txt"),
        ("dog", "dog.jpg", "dog.txt"),
    ]
    assert [s.start for s in samples] == sorted(s.start for s in samples)
    assert sorted((p.key, p.kind) for p in problems) == [("cow", "dots"), ("cow", "dots")]
    assert (
        "cow.1.png is the field 1.png of cow, which is no image, and cow.1 has no caption: write other dots in"
        in "".join(p.message for p in problems)
    )
    assert left == {"1.jpg": 1, "1.txt": 1, "1.png": 1, "seg.v2.png": 1}
