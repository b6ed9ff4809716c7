"""mteb's own tasks, made here, on both towers."""

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.stats import spearmanr

mteb = pytest.importorskip("mteb")
datasets = pytest.importorskip("datasets")

from mteb.abstasks.retrieval import AbsTaskRetrieval  # noqa: E402
from mteb.abstasks.sts import AbsTaskSTS  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402
from mteb.abstasks.zeroshot_classification import AbsTaskZeroShotClassification  # noqa: E402

from textlock.data.images import eval_image, eval_picture  # noqa: E402
from textlock.demo.text_tower import write_random_text_tower  # noqa: E402
from textlock.evals.mteb import MtebEncoder  # noqa: E402
from textlock.models.text import build_text_tower  # noqa: E402

from ..data.zoo import encode, photo  # noqa: E402
from .toys import random_images  # noqa: E402

SIDE, WIDTH = 4, 64
NAMES = ["red circle", "blue star", "green square", "a tall tree"]
CAPTIONS = [f"{name} number {n}" for n in range(6) for name in NAMES]
PHOTOS = [photo(9 + n % 3, 8, seed=n) for n in range(24)]
LABELS = np.random.default_rng(0).integers(0, len(NAMES), len(PHOTOS)).tolist()


def encode_images(images):
    projection = torch.randn(SIDE * SIDE * 3, WIDTH, generator=torch.Generator().manual_seed(2))
    return (images.float() - 127.5).flatten(1) @ projection


def metadata(name, type, category, modalities, score):
    return TaskMetadata(
        name=name, type=type, category=category, modalities=modalities, main_score=score,
        description="made here", reference=None, dataset={"path": "made/here", "revision": "1"},
        eval_splits=["test"], eval_langs=["eng-Latn"], date=("2024-01-01", "2024-12-31"), domains=["Web"],
        task_subtypes=[], license="mit", annotations_creators="derived", dialect=[], sample_creation="found",
        bibtex_citation="",
    )  # fmt: skip


class ImagesAndNames(AbsTaskZeroShotClassification):
    metadata = metadata("HereZeroShot", "ZeroShotClassification", "i2t", ["image", "text"], "accuracy")

    def load_data(self, *_, **__):
        data = datasets.Dataset.from_dict({"image": PHOTOS, "label": LABELS})
        self.dataset = datasets.DatasetDict(test=data.cast_column("image", datasets.Image()))
        self.data_loaded = True

    def get_candidate_labels(self):
        return NAMES


class PairsOfTexts(AbsTaskSTS):
    metadata = metadata("HereSTS", "STS", "t2t", ["text"], "cosine_spearman")

    def load_data(self, *_, **__):
        pairs = {"sentence1": CAPTIONS[:12], "sentence2": CAPTIONS[12:], "score": [float(n % 5) for n in range(12)]}
        self.dataset = datasets.DatasetDict(test=datasets.Dataset.from_dict(pairs))
        self.data_loaded = True


class TextsToImages(AbsTaskRetrieval):
    metadata = metadata("HereT2I", "Any2AnyRetrieval", "t2i", ["text", "image"], "recall_at_1")

    def load_data(self, *_, **__):
        ids = [str(n) for n in range(len(PHOTOS))]
        corpus = datasets.Dataset.from_dict({"id": ids, "image": PHOTOS}).cast_column("image", datasets.Image())
        queries = datasets.Dataset.from_dict({"id": [f"q{n}" for n in ids], "text": CAPTIONS})
        relevant = {f"q{n}": {n: 1} for n in ids}
        split = {"corpus": corpus, "queries": queries, "relevant_docs": relevant, "top_ranked": None}
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "tower"
    write_random_text_tower(folder, [*CAPTIONS, "query: text: "], width=WIDTH, heads=1, seed=9)
    return folder


@pytest.fixture(scope="module")
def tower(folder):
    return build_text_tower(folder)


def encoder_of(tower, **more):
    return MtebEncoder(encode_images, tower, SIDE, name="textlock/here", revision="1", **more)


def score(encoder, task):
    result = mteb.evaluate(encoder, [task], cache=None, co2_tracker=False, encode_kwargs={"batch_size": 5})
    return result[0].scores["test"][0]


def image_rows():
    return F.normalize(encode_images(torch.stack([eval_image(encode(image, "PNG"), SIDE) for image in PHOTOS])), dim=-1)


def test_images_choose_among_names(tower):
    chosen = (image_rows() @ tower.encode(NAMES).T).argmax(dim=1)
    expected = (chosen == torch.tensor(LABELS)).double().mean().item()
    assert 0 < expected < 1
    assert score(encoder_of(tower), ImagesAndNames())["accuracy"] == pytest.approx(expected)


def test_pairs_of_texts(tower):
    cosines = (tower.encode(CAPTIONS[:12]) * tower.encode(CAPTIONS[12:])).sum(dim=1)
    expected = spearmanr([n % 5 for n in range(12)], cosines).statistic
    assert score(encoder_of(tower), PairsOfTexts())["cosine_spearman"] == pytest.approx(expected, abs=1e-6)


def test_texts_find_images(tower):
    ranks = (tower.encode(CAPTIONS) @ image_rows().T).argsort(dim=1, descending=True)
    expected = (ranks[:, :5] == torch.arange(len(PHOTOS))[:, None]).any(dim=1).double().mean().item()
    assert 0 < expected < 1
    assert score(encoder_of(tower), TextsToImages())["recall_at_5"] == pytest.approx(expected, abs=1e-5)


def test_texts_have_the_prefix_that_mteb_has_a_name_for(folder, tower, caplog):
    other = build_text_tower(folder, prefix="query: ")
    prompted = encoder_of(tower, prompted={"STS": other})
    cosines = (other.encode(CAPTIONS[:12]) * other.encode(CAPTIONS[12:])).sum(dim=1)
    expected = spearmanr([n % 5 for n in range(12)], cosines).statistic
    with caplog.at_level(logging.WARNING, "textlock.evals.mteb"):
        assert score(prompted, PairsOfTexts())["cosine_spearman"] == pytest.approx(expected, abs=1e-6)
    assert [r.message for r in caplog.records if r.name == "textlock.evals.mteb"] == [
        f"HereSTS, all texts: prefix 'query: ', at most {other.recipe.max_length} tokens are read"
    ]
    plain = score(encoder_of(tower), PairsOfTexts())["cosine_spearman"]
    assert plain != pytest.approx(expected, abs=1e-6)
    queries = encoder_of(tower, prompted={"query": other})
    rows = image_rows()
    ranks = (other.encode(CAPTIONS) @ rows.T).argsort(dim=1, descending=True)
    expected = (ranks[:, :5] == torch.arange(len(PHOTOS))[:, None]).any(dim=1).double().mean().item()
    assert score(queries, TextsToImages())["recall_at_5"] == pytest.approx(expected, abs=1e-5)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"no prompt of mteb has such a name: .*of no task"):
        encoder_of(tower, prompted={"of no task": other})


def test_an_image_with_a_text_is_the_sum_of_both(tower):
    encoder = encoder_of(tower)
    batches = [{"text": CAPTIONS[:3], "image": PHOTOS[:3]}, {"text": CAPTIONS[3:5], "image": PHOTOS[3:5]}]
    rows = encoder.encode(batches, task_metadata=TextsToImages.metadata)
    assert torch.allclose(rows, F.normalize(tower.encode(CAPTIONS[:5]) + image_rows()[:5], dim=-1), atol=1e-6)
    assert (rows.dtype, rows.device.type) == (torch.float32, "cpu")
    assert encoder.encode([], task_metadata=TextsToImages.metadata).shape == (0, WIDTH)
    for batch, message in (({"audio": [1]}, "HereT2I has inputs of audio"), ({"image": [None]}, "is missing")):
        with pytest.raises(ValueError, match=message):
            encoder.encode([batch], task_metadata=TextsToImages.metadata)


def test_what_mteb_knows_of_it(tower):
    meta = encoder_of(tower).mteb_model_meta
    assert (meta.name, meta.revision, meta.modalities) == ("textlock/here", "1", ["image", "text"])
    assert meta.embed_dim == WIDTH and meta.max_tokens == tower.recipe.max_length


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK"])
def test_pictures_are_seen_as_files_are(mode):
    image = Image.fromarray(random_images(1)[0].numpy()).resize((9, 7)).convert(mode)
    format = "TIFF" if mode == "CMYK" else "PNG"
    assert torch.equal(eval_picture(image, SIDE), eval_image(encode(image, format), SIDE))
