"""Names of classes: of their folders, of files in every form, of ImageNet; and the prompts around them."""

import json

import pytest

from textlock.data.class_names import names_of_folders, read_class_names, resolve_templates

WORDNET = ["n01440764", "n01443537", "n01484850"]
NAMES = ["tench", "goldfish", "great white shark"]
WORDS = ["cat", "dark_red", "hot dog"]


def test_names_of_folders_are_words():
    assert names_of_folders(WORDS, "x") == ["cat", "dark red", "hot dog"]
    few = ["747", "A320", "biplane", "n_puppies", "glider"]
    assert names_of_folders(few, "x") == [name.replace("_", " ") for name in few]


@pytest.mark.parametrize(
    "folders",
    [WORDNET, ["0", "1", "2"], ["00000", "00001"], ["d41d8cd98f00b204", "9e107d9d372bb682"], [*WORDNET, "dog"]],
)
def test_folders_that_are_called_by_ids_are_refused(folders):
    with pytest.raises(ValueError, match=f"called {folders[0]} and the like, which no text says: .*--class-names FILE"):
        names_of_folders(folders, "x")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.json", json.dumps(dict(zip([*WORDNET, "n99999999"], [*NAMES, "x"], strict=True)))),
        ("c.json", json.dumps(NAMES)),
        ("c.csv", 'wnid,class\n{0},tench\n{2},"great white shark"\n{1},goldfish\nn99999999,x\n'),
        ("c.tsv", "\ufeffFolder\tName\tcount\n{0}\ttench\t3\n{1}\tgoldfish\t3\n{2}\tgreat white shark\t3\n"),
        ("c.txt", "tench\ngoldfish\n\ngreat white shark\n"),
        (
            "c.txt",
            "{0} tench, Tinca tinca\n{1} goldfish, Carassius auratus\nn9 x\n{2} great white shark, white shark\n",
        ),
        ("classes", "{1}\tgoldfish\n{0}\ttench\n{2}\tgreat white shark\n"),
    ],
)
def test_a_file_of_any_form_names_the_folders(name, content, tmp_path):
    path = tmp_path / name
    path.write_text(content if name.endswith("json") else content.format(*WORDNET), encoding="utf-8")
    assert read_class_names(path, WORDNET, "x") == NAMES


def test_a_name_that_begins_with_the_word_of_a_folder_is_a_name(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("cat breed\ndark red\nhot dog\n")
    assert read_class_names(path, WORDS, "x") == ["cat breed", "dark red", "hot dog"]
    path.write_text("hot dog, sausage\ncat, tabby cat\ndark_red,red\n")
    assert read_class_names(path, WORDS, "x") == ["tabby cat", "red", "sausage"]


REFUSED = {
    "too few": ("c.txt", "tench\ngoldfish\n", "has 2 names and x 3 class folders: one for each, in sorted order"),
    "half of both": (
        "c.txt",
        "n01440764 tench\ngoldfish\nshark\n",
        "1 of 3 lines begin with one of the 3 class folders",
    ),
    "a folder twice": ("c.txt", "n01440764 a\nn01440764 b\nn01443537 c\nn01484850 d", "4 of 4 lines begin with"),
    "a name twice": ("c.txt", "tench\ntench\nshark\n", "classes n01440764 and n01443537 are both named tench"),
    "a key twice": ("c.json", '{"n01440764": "a", "n01440764": "b"}', "names n01440764 more than once"),
    "a folder without a name": ("c.json", '{"n01440764": "a"}', "has no name for class folder n01443537 of x: add one"),
    "no column of names": (
        "c.csv",
        "wnid,words,label\na,b,c\n",
        "needs one column of name, class_name, .*it has wnid, wo",
    ),
    "no column of folders": ("c.csv", "x,name\na,b\n", "needs one column of folder, wnid, synset, .*it has x, name"),
    "a row twice": ("c.csv", "wnid,name\na,b\na,c\n", "names a more than once"),
    "not UTF-8": ("c.txt", "caf\xe9".encode("latin-1"), "is not UTF-8 text"),
}


@pytest.mark.parametrize(("name", "content", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_with_the_names_is_said(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        read_class_names(tmp_path / name, WORDNET, "x")
    assert "\n" not in str(caught.value)


def test_two_folders_that_read_alike_are_refused():
    with pytest.raises(ValueError, match="the classes dark red and dark_red are both named dark red: name them apart"):
        names_of_folders(["dark red", "dark_red"], "x")


def test_the_names_and_prompts_of_imagenet_are_those_of_open_clip():
    open_clip = pytest.importorskip("open_clip")
    folders = sorted(f"n{number:08d}" for number in range(1000))
    assert read_class_names("imagenet", folders, "x") == list(open_clip.IMAGENET_CLASSNAMES)
    with pytest.raises(ValueError, match="x has 3 class folders and not the 1,000 of ImageNet"):
        read_class_names("imagenet", WORDNET, "x")
    for name, theirs in (
        ("openai-80", open_clip.OPENAI_IMAGENET_TEMPLATES),
        ("openai-7", open_clip.SIMPLE_IMAGENET_TEMPLATES),
    ):
        prompts = resolve_templates([name, "a {}"])
        assert len(prompts) == int(name[7:]) + 1
        assert [prompt.replace("{}", "tench") for prompt in prompts[:-1]] == [prompt("tench") for prompt in theirs]


def test_without_open_clip_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    for use in (
        lambda: resolve_templates(["openai-80"]),
        lambda: read_class_names("imagenet", [f"n{n:08d}" for n in range(1000)], "x"),
    ):
        with pytest.raises(
            ValueError, match=r'taken from open_clip, which is not installed: pip install "textlock\[peers\]"'
        ):
            use()


def test_prompts_come_from_a_file(tmp_path):
    (tmp_path / "p.txt").write_text("a {}.\n\nthe {} there\n")
    (tmp_path / "p.json").write_text('["a {}.", "the {} there"]')
    for name in ("p.txt", "p.json"):
        assert resolve_templates([str(tmp_path / name)]) == ("a {}.", "the {} there")
    (tmp_path / "p.txt").write_text("a cat\n")
    with pytest.raises(ValueError, match=r"p\.txt must hold prompts alone, each with \{\} where"):
        resolve_templates([str(tmp_path / "p.txt")])
    with pytest.raises(ValueError, match=r"openai-8 is no prompt with \{\}, none of openai-80, openai-7, and no file"):
        resolve_templates(["openai-8"])
