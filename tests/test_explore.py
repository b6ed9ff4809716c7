"""explore.py on what train.py writes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest
import torch

from textlock.demo.text_tower import write_random_text_tower
from textlock.evals.suite import EvalConfig, EvaluationSuite
from textlock.exports.loaded import load_towers

from .commands import run_here
from .conftest import ONE_THREAD, ROOT, run

QUERIES = ("a red circle", "a blue car on the left")


@pytest.fixture(scope="module")
def trained(small_world, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("explored") / "run"
    flags = ("--optim.steps", "2", "--evals.zero-shot", "None", "--evals.retrieval", "None")
    outcome = run("train.py", *small_world.command(run_dir, *flags))
    assert outcome.returncode == 0, outcome.stderr
    return run_dir


def explore(checkpoint, pictures, cache, *flags):
    where = ("--checkpoint", checkpoint, "--pictures", pictures, "--cache", cache)
    return run_here("explore.py", *where, "--device", "cpu", *flags)


def test_cosines_are_those_of_the_evaluation(small_world, trained, tmp_path):
    heldout = small_world.root / "data" / "heldout"
    towers = load_towers(trained, None, torch.device("cpu"))
    config = EvalConfig(retrieval=str(heldout), queries=QUERIES)
    suite = EvaluationSuite(towers.text, config, image_size=towers.loaded.tower.image_size, group=None)
    suite.run(towers.encode_images)
    asked = [flag for query in QUERIES for flag in ("--query", query)]
    status, out, err = explore(trained, heldout, tmp_path, *asked, "--json", "--top", "6")
    assert status == 0, err
    assert "40 images and 40 captions" in err
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["query"] for answer in answers] == list(QUERIES)
    for answer, expected in zip(answers, suite.answers(), strict=True):
        assert [image["cosine"] for image in answer["images"]] == pytest.approx(expected.scores, abs=1e-6)
        assert ["\n".join(image["captions"]) for image in answer["images"]] == expected.captions

    status, out, _ = explore(trained, heldout, tmp_path, "--query", QUERIES[0], "--top", "1")
    best, caption = answers[0]["images"][0], answers[0]["captions"][0]
    assert status == 0
    assert out.splitlines() == [
        QUERIES[0],
        "  images",
        f"    {best['cosine']:6.3f}  {best['name']}  {best['captions'][0]}",
        "  captions",
        f"    {caption['cosine']:6.3f}  {caption['text']}",
    ]


def test_the_page_is_served_until_it_is_interrupted(small_world, trained, tmp_path):
    """And what could not be read is named."""
    photos = tmp_path / "photos"
    shutil.copytree(small_world.root / "data" / "classes", photos)
    (photos / "bad.jpg").write_bytes(b"<html>")
    where = ("--checkpoint", trained, "--pictures", photos, "--cache", tmp_path / "cache")
    command = [sys.executable, "explore.py", *map(str, where), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    said = process.stdout.readline()
    try:
        url = said.split()[0]
        with urllib.request.urlopen(f"{url}/search?text=a+car", timeout=60) as response:
            answer = json.load(response)
        with urllib.request.urlopen(f"{url}/thumbnail/{answer['images'][0]['id']}", timeout=60) as response:
            assert response.read().startswith(b"\xff\xd8")
    finally:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert len(answer["images"]) == 12 and answer["captions"] == []
    assert process.returncode == 0 and err.endswith("ended\n"), err
    assert "1 images were not read: bad.jpg (format: " in err


def test_bad_input_is_one_sentence(small_world, trained, tmp_path):
    heldout, other, empty, texts = small_world.root / "data" / "heldout", tmp_path / "t", tmp_path / "e", tmp_path / "x"
    captions = (small_world.root / "data" / "captions.txt").read_text().splitlines()
    write_random_text_tower(other, captions, width=64, heads=1, seed=9)
    empty.mkdir()
    texts.mkdir()
    (texts / "a.txt").write_text("a")
    exported = tmp_path / "exported"
    status, _, err = run_here("export.py", "--checkpoint", trained, "--output", exported)
    assert status == 0, err
    no_folder = tmp_path / "file"
    no_folder.write_text("")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for checkpoint, pictures, cache, flags, message in [
            (trained, tmp_path / "nowhere", tmp_path, (), "nowhere is not a folder"),
            (trained, empty, tmp_path, (), "it is empty"),
            (trained, texts, tmp_path, (), "it holds .txt (1)"),
            (trained, heldout, tmp_path, ("--port", port), f"port {port} is in use"),
            (empty, heldout, tmp_path, ("--query", "a"), "holds no checkpoint"),
            (exported, heldout, tmp_path, ("--query", "a"), "give --text"),
            (trained, heldout, tmp_path, ("--query", "a", "--text", other), "another text tower"),
            (trained, heldout, tmp_path, ("--query", " "), "--query is (' ',), must not be empty"),
            (trained, heldout, tmp_path, ("--json",), "must be left out without --query"),
            (trained, heldout, no_folder / "cache", ("--query", "a"), "embeddings cannot be kept in"),
        ]:
            status, out, err = explore(checkpoint, pictures, cache, *flags)
            assert (status, out) == (2, ""), err
            said = [line for line in err.splitlines() if not line.startswith("text tower ")]
            assert message in err and "Traceback" not in err, err
            by_parser = "--json" in flags or " " in flags  # in its box
            assert by_parser or (len(said) == 1 and said[0].startswith("error: ")), err
    assert sorted(os.listdir(empty)) == []
