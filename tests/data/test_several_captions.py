"""Several captions of an image, and other fields in its sample: what training sees, and what webdataset reads there."""

import io
import json

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import settings as of_hypothesis
from hypothesis import strategies as st

from textlock.data.captions import Fields, caption_draws, caption_id
from textlock.data.index import index_shards
from textlock.data.tar import read_samples

from .loading import open_one, settings, take
from .tars import caption_of, jpeg, read_all, tar_bytes, write_shards

SEVERAL = {
    number: {"txt": "\n".join(f"{number} of {line}" for line in range(number)).encode()} for number in range(2, 8)
}


def captions_of(number):
    return [f"{number} of {line}" for line in range(number)] if number in SEVERAL else [caption_of(number)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("several") / "shards", [5, 5], SEVERAL)


def test_training_draws_a_caption_by_seed_epoch_and_position(shards):
    seen = {}
    for step, batch in enumerate(take(settings(shards, batch_size=5), 40)):
        epoch, place = divmod(5 * step, 10)
        draws = caption_draws(42, epoch, np.arange(place, place + 5))
        for key, caption, draw in zip(batch.keys, batch.captions, draws, strict=True):
            captions = captions_of(int(key))
            assert caption == captions[int(draw * len(captions))]
            seen.setdefault(int(key), set()).add(caption)
        assert batch.ids.tolist() == [caption_id(caption) for caption in batch.captions]
    assert {number: len(captions) for number, captions in seen.items() if number < 6} == {
        0: 1,
        1: 1,
        2: 2,
        3: 3,
        4: 4,
        5: 5,
    }


def test_the_draw_is_the_same_from_the_middle_and_on_other_ranks(shards):
    whole = [(batch.keys, batch.captions) for batch in take(settings(shards, batch_size=4), 12)]
    with open_one(settings(shards, batch_size=4)) as loader:
        for _ in range(5):
            next(loader)
        state = loader.state()
    assert [(batch.keys, batch.captions) for batch in take(settings(shards, batch_size=4), 7, state=state)] == whole[5:]
    parts = [take(settings(shards, batch_size=4), 12, rank=rank, world_size=2) for rank in range(2)]
    assert [one.captions + other.captions for one, other in zip(*parts, strict=True)] == [
        captions for _, captions in whole
    ]


def test_a_run_that_names_other_fields_than_the_index_is_refused(shards):
    take(settings(shards, caption_fields=("txt",), image_fields=("jpg,jpeg,png,webp",)), 1)
    with pytest.raises(ValueError, match=r"run python .* index .* --caption-fields json:caption$"):
        take(settings(shards, caption_fields=("json:caption",)), 1)


# Names of members as they come: further dots, upper case, folders, several images.
FIELDS = ["jpg", "JPG", "png", "depth.png", "de.txt", "txt", "Txt", "json", "npz", "cls", "seg.v2.webp", "webp"]


@of_hypothesis(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["0", "set.0/1", "a b", "漢", "x/y.z/2"]),
            st.lists(st.sampled_from(FIELDS), min_size=1, max_size=6, unique_by=str.lower),
        ),
        max_size=5,
        unique_by=lambda sample: sample[0],
    ),
    st.sampled_from([Fields(), Fields(("png", "jpg"), ("de.txt", "txt")), Fields(("depth.png",), ("cls",))]),
)
def test_samples_are_those_of_webdataset(tmp_path_factory, samples, fields):
    members = [(f"{key}.{name}", f"{key}.{name}".encode()) for key, names in samples for name in names]
    path = tmp_path_factory.mktemp("tar") / "0.tar"
    path.write_bytes(tar_bytes(members))
    groups = webdataset.tariterators.group_by_keys(
        webdataset.tariterators.tar_file_expander([{"url": str(path), "stream": io.BytesIO(path.read_bytes())}])
    )
    expected = {}
    for group in groups:
        first = [
            next((group[name] for name in names if name in group), None) for names in (fields.image, fields.caption)
        ]
        if first[0] is not None:
            expected[group["__key__"]] = tuple(first)
    raw = path.read_bytes()

    def content(member):
        return raw[member.offset :][: member.size]

    found = {
        sample.key: (content(sample.image), next((content(m) for _, m in sorted(sample.captions.items())), None))
        for sample in read_samples(path, fields).samples
    }
    assert found == expected


def test_json_captions_are_those_that_webdataset_decodes(tmp_path):
    rows = [{"caption": "one"}, {"caption": ["two", "three"]}, {"caption": ["four"], "url": "x"}]
    members = [
        member
        for number, row in enumerate(rows)
        for member in ((f"{number}.jpg", jpeg(number)), (f"{number}.json", json.dumps(row).encode()))
    ]
    (tmp_path / "0.tar").write_bytes(tar_bytes(members))
    index_shards(tmp_path, fields=Fields(caption=("json:caption",)))
    theirs = webdataset.WebDataset(str(tmp_path / "0.tar"), shardshuffle=False, empty_check=False).decode("pil")
    captions = [sample["json"]["caption"] for sample in theirs]
    assert [raw.captions for raw in read_all(tmp_path)] == [
        caption if isinstance(caption, list) else [caption] for caption in captions
    ]
