"""The sections of a report with bars next to chance, and with free texts and what they found."""

import json
import re

import pytest
import torch

from textlock.engine.gallery import read_answers, save_answers
from textlock.engine.report import write_report
from textlock.evals.suite import Answer

HOSTILE = "<script>alert(1)</script>\"'&"
RESULTS = {"zero_shot_top1": 0.9, "zero_shot_renamed_top1": 0.4, "zero_shot_renamed_top5": 0.75}


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    return tmp_path


def page_of(run_dir, **results):
    (run_dir / "results.json").write_text(json.dumps(results))
    return write_report(run_dir).read_text()


def answer(query, captions, level=0):
    images = torch.full((len(captions), 8, 8, 3), level, dtype=torch.uint8)
    return Answer(query, images, captions, [0.5 - 0.125 * place for place in range(len(captions))])


def test_renamed_classes_stand_next_to_chance(run_dir):
    page = page_of(run_dir, **RESULTS, chance={"zero_shot_renamed_top1": 0.0125, "zero_shot_renamed_top5": 0.0625})
    section = page[page.index("Classes by other names") :]
    section = " ".join(re.sub(r"<[^>]+>", " ", section[: section.index("</section>")]).split())
    assert section.endswith("Top-1 40.0% chance 1.2% Top-5 75.0% chance 6.2%")
    assert 'style="width:40.0%"' in page and 'style="left:1.2%"' in page
    assert "chance" not in page_of(run_dir, **RESULTS)  # of a run that did not write it
    assert "Classes by other names" not in page_of(run_dir, zero_shot_top1=0.9)


def test_free_texts_and_their_images_are_shown(run_dir):
    assert "Free texts" not in page_of(run_dir)
    save_answers(run_dir, [answer("a cat", ["a cat here", HOSTILE]), answer(HOSTILE, ["a dog"], level=255)])
    page = page_of(run_dir)
    assert page.count("<script>") == 1  # its own
    escaped = "&lt;script&gt;alert(1)&lt;/script&gt;&#34;&#39;&amp;"
    assert re.findall(r"<q>(.*?)</q>", page) == ["a cat", escaped]
    section = page[page.index("Free texts") :].partition("</section>")[0]
    assert re.findall(r'title="(.*?)"', section) == ["a cat here", escaped, "a dog"]
    assert re.findall(r'score">([\d.]+)<', section) == ["0.500", "0.375", "0.500"]
    sources = re.findall(r'src="(data:image/.*?)"', section)
    assert len(sources) == 3 and sources[0] == sources[1] != sources[2]


def test_half_written_answers_are_none_and_damaged_ones_are_named(run_dir):
    save_answers(run_dir, [answer("a cat", ["a", "b"])])
    texts = run_dir / "answers.json"
    whole = texts.read_text()
    for damaged in ("{", whole.replace('"query"', '"question"'), whole.replace('"caption"', '"text"'), "[1]"):
        texts.write_text(damaged)
        with pytest.raises(ValueError, match=r"the answers in .* are damaged"):
            read_answers(run_dir)
    texts.unlink()
    assert read_answers(run_dir) == []
