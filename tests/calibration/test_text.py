"""Text becomes sequences of ids and what goes along with them; bad text gets one line."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx_ir as ir
import pytest

from morphgraph.calibration import Samples, TextOptions
from morphgraph.calibration.text import is_text
from morphgraph.cli.console import OutputSettings
from morphgraph.cli.data_options import DataOptions
from morphgraph.errors import ArgumentError, DataError, FileError, ModelError, MorphError
from morphgraph.folders.found import ModelFolder
from morphgraph.testing import model_from_text

tokenizers = pytest.importorskip("tokenizers")

WORDS = [f"w{number}" for number in range(40)]
PLAIN = """lm (int64[batch,sequence] input_ids, float[64,4] table)
=> (float[batch,sequence,4] y) { y = Gather(table, input_ids) }"""
CACHED = """lm (int64[batch,sequence] input_ids, int64[batch,total] attention_mask,
  int64[batch,sequence] position_ids, float[batch,2,past,8] past_key_values_0_key,
  float[64,4] table) => (float[batch,sequence,4] y) { y = Gather(table, input_ids) }"""
FIXED = """lm (int64[batch,12] tokens, float[64,4] table) => (float[batch,12,4] y) {
  y = Gather(table, tokens) }"""
BERT = """lm (int32[batch,sequence] ids, int32[batch,sequence] token_type_ids,
  float[batch,sequence] mask, float[64,4] table) => (float[batch,sequence,4] y) {
  y = Gather(table, ids) }"""


def model(text: str, rows: int = 64) -> ir.Model:
    names = re.findall(r"\] ([\w.]+)", text.split("=>")[0])
    inputs = [name for name in names if name != "table"]
    return model_from_text(text.replace("[64,4]", f"[{rows},4]"), inputs)


def tokenizer(folder: Path, marked: bool = False) -> Path:
    known = {"[CLS]": 0, "[SEP]": 1, **{word: 2 + k for k, word in enumerate(WORDS)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if marked:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
        )
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def text(count: int) -> str:
    return " ".join(WORDS[k % len(WORDS)] for k in range(count))


def only(samples: Samples) -> list[dict[str, Any]]:
    return [dict(feed) for feed in samples.batches(1)]


def test_a_file_is_cut_into_sequences_that_follow_each_other(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(text(100))
    feeds = only(Samples.of(file, model(PLAIN), text=TextOptions(tokenizer(tmp_path), length=16)))
    found = np.concatenate([feed["input_ids"][0] for feed in feeds])
    assert found.tolist() == [2 + k % len(WORDS) for k in range(96)]  # 100 = 6 x 16 + 4


def test_a_cache_is_empty_and_masks_and_positions_are_of_the_sequence(tmp_path: Path) -> None:
    file = tmp_path / "text.md"
    file.write_text(text(64))
    tokenizer(tmp_path)
    given = TextOptions(tmp_path, length=8)
    feed = only(Samples.of(file, model(CACHED), text=given))[0]
    assert feed["past_key_values_0_key"].shape == (1, 2, 0, 8)
    assert feed["position_ids"].tolist() == [list(range(8))]
    assert feed["attention_mask"].tolist() == [[1] * 8]


def test_marks_of_the_tokenizer_stand_around_every_sequence(tmp_path: Path) -> None:
    made = tokenizers.Tokenizer.from_file(str(tokenizer(tmp_path, marked=True)))
    feeds = only(Samples.of([text(30), text(30)], model(BERT), text=TextOptions(made, length=12)))
    assert [feed["ids"][0, [0, -1]].tolist() for feed in feeds] == [[0, 1]] * 6
    assert feeds[0]["token_type_ids"].tolist() == [[0] * 12]
    assert feeds[0]["mask"].dtype == np.float32


def test_the_length_is_the_models_where_it_has_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text(20))
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text(20)}) + "\n")
    feeds = only(Samples.of(tmp_path, model(FIXED), text=TextOptions(tokenizer(tmp_path))))
    assert [feed["tokens"].shape for feed in feeds] == [(1, 12)] * 3


# Positions, with the table that they choose from: of 24 and of 20 rows.
COUNTED = """lm (int64[batch,sequence] ids, float[64,4] table, float[24,4] places)
=> (float[batch,sequence,4] y) <int64 zero = {0}, int64 one = {1}> {
  sizes = Shape(ids)  length = Gather(sizes, one)  at = Range(zero, length, one)
  p = Gather(places, at)  x = Gather(table, ids)  y = Add(x, p) }"""
MASKED = """lm (int64[batch,sequence] ids, int64[batch,sequence] attention_mask, float[64,4] table,
  float[24,4] places) => (float[batch,sequence,4] y) <int64 one = {1}> {
  count = CumSum(attention_mask, one)  at = Sub(count, one)
  p = Gather(places, at)  x = Gather(table, ids)  y = Add(x, p) }"""
TURNED = """lm (int64[batch,sequence] ids, float[64,32] table, float[20,8] c, float[20,8] s,
  int64[batch,sequence] position_ids) => (float[batch,sequence,32] y) {
  x = Gather(table, ids)
  y = com.microsoft.RotaryEmbedding<num_heads=2>(x, position_ids, c, s) }"""
BUCKETS = """lm (int64[batch,sequence] ids, float[64,4] table, float[5,4] places)
=> (float[batch,sequence,4] y) <int64 zero = {0}, int64 one = {1}, int64 four = {4}> {
  sizes = Shape(ids)  length = Gather(sizes, one)  at = Range(zero, length, one)
  near = Min(at, four)  p = Gather(places, near)  x = Gather(table, ids)  y = Add(x, p) }"""


@pytest.mark.parametrize(
    ("network", "length"), [(COUNTED, 24), (MASKED, 24), (TURNED, 20), (BUCKETS, 40), (PLAIN, 40)]
)
def test_sequences_are_no_longer_than_there_are_positions(
    network: str, length: int, tmp_path: Path
) -> None:
    """A table chosen by the nearest of some distances has rows for any."""
    head = '<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]> '
    given = [name for name in re.findall(r"\] ([\w.]+)", network.split("=>")[0]) if "_ids" in name]
    names = (*given, "ids", "attention_mask", "input_ids")
    made = model_from_text(head + network, [n for n in names if f"] {n}" in network])
    options = TextOptions(tokenizer(tmp_path), longest=40)
    feeds = only(Samples.of([text(100)], made, text=options))
    assert next(iter(feeds[0].values())).shape == (1, length)


def test_sequences_are_no_longer_than_a_folders_config_says(tmp_path: Path) -> None:
    place, data = tmp_path / "lm", tmp_path / "text.txt"
    place.mkdir()
    tokenizer(place)
    data.write_text(text(100))
    genai = {"model": {"context_length": 30}}
    cases: list[tuple[dict[str, dict[str, Any]], int]] = [
        ({"config.json": {"n_positions": 20}, "genai_config.json": genai}, 20),
        ({"config.json": {"text_config": {"max_position_embeddings": 40}}}, 40),
        ({"genai_config.json": genai}, 30),
    ]
    for configs, length in cases:
        folder = ModelFolder(place, place / "model.onnx", configs)
        with click.Context(click.Command("shrink"), obj=OutputSettings(verbosity=-1)):
            feeds = only(DataOptions().read(data, model(PLAIN), 0, folder))
            short = only(DataOptions(length=8).read(data, model(PLAIN), 0, folder))
        assert feeds[0]["input_ids"].shape == (1, length)
        assert short[0]["input_ids"].shape == (1, 8)


def test_sequences_of_a_large_text_come_from_everywhere_in_it(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"w{min(k // 1000, 39)}" for k in range(40000)))
    options = TextOptions(tokenizer(tmp_path), length=8)
    feeds = only(Samples.of(file, model(PLAIN), 20, text=options))
    first = [int(feed["input_ids"][0, 0]) for feed in feeds]
    assert len(feeds) == 20
    assert first == sorted(first)
    assert first[0] < 6
    assert first[-1] > 36
    again = only(Samples.of(file, model(PLAIN), 20, text=options))
    assert [f["input_ids"].tolist() for f in feeds] == [f["input_ids"].tolist() for f in again]


STRANGE = PLAIN.replace("input_ids,", "input_ids, float[3,7] shape,", 1)
NO_IDS = "net (float[N,3] x) => (float[N,3] y) { y = Relu(x) }"


@pytest.mark.parametrize(
    ("content", "network", "options", "error", "message"),
    [
        (text(100), PLAIN, {"tokenizer": None}, ArgumentError, "holds text; give the model's tok"),
        (text(20), PLAIN, {}, DataError, "too short: 20 tokens, and the sequences have 16; give"),
        (text(100), PLAIN, {"tokenizer": "no.json"}, FileError, "no.json: there is no such file"),
        (text(100), FIXED, {}, ArgumentError, "length 16: the model takes sequences of 12 tokens"),
        (text(100), STRANGE, {}, ModelError, r"input 'shape' \(FLOAT \[3,7\]\) is none that goes"),
        (text(100), NO_IDS, {}, ModelError, "the model has no input for ids of tokens"),
        (text(100), NO_IDS, {"tokenizer": None}, ModelError, r"takes 'x' .*a folder of them"),
        (b"\xff\xfe" * 99, PLAIN, {}, FileError, "not text in UTF-8"),
    ],
)
def test_what_does_not_fit_is_told_in_a_line(
    tmp_path: Path,
    content: str | bytes,
    network: str,
    options: dict[str, Any],
    error: type[MorphError],
    message: str,
) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    given = TextOptions(**{"tokenizer": tokenizer(tmp_path), "length": 16, **options})
    with pytest.raises(error, match=message) as caught:
        Samples.of(file, model(network), text=given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl", "texts"])
def test_the_tokenizer_of_the_models_folder_is_the_default(name: str, tmp_path: Path) -> None:
    place, data, words = tmp_path / "lm", tmp_path / name, text(40)
    place.mkdir()
    if name == "texts":
        data.mkdir()
        (data / "a.txt").write_text(words)
    else:
        data.write_text(json.dumps({"text": words}) if data.suffix == ".jsonl" else words)
    folder, network = ModelFolder(place, place / "model.onnx", {}), model(PLAIN)
    options = DataOptions(length=8)
    with click.Context(click.Command("shrink"), obj=OutputSettings(verbosity=-1)):
        with pytest.raises(ArgumentError, match="holds text"):
            options.read(data, network, 0, folder)
        tokenizer(place)
        feeds = only(options.read(data, network, 0, folder))
        arrays = tmp_path / "ids.npy"
        np.save(arrays, np.zeros((3, 8), np.int64))
        assert len(only(DataOptions().read(arrays, network, 0, folder))) == 3
    found = np.concatenate([feed["input_ids"][0] for feed in feeds])
    assert found.tolist() == [2 + k for k in range(40)]


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    given = TextOptions(tokenizer(tmp_path), length=16)
    with pytest.raises(ModelError, match="gives the id 17, and the model's embedding 'table' "):
        Samples.of([text(100)], model(PLAIN, rows=10), text=given)


def test_words_that_a_tokenizer_does_not_know_are_told(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"other{number}" for number in range(60)) + " " + text(20))
    given = TextOptions(tokenizer(tmp_path), length=8)
    with pytest.raises(DataError, match=r"does not know 6\d of 80 tokens; give the tokenizer"):
        only(Samples.of(file, model(PLAIN), text=given))
    file.write_text(text(80) + " other")
    assert len(only(Samples.of(file, model(PLAIN), text=given))) == 10


@pytest.mark.parametrize(("rows", "few"), [(64, False), (200, True)])
def test_a_tokenizer_with_few_of_the_models_tokens_is_doubted(
    rows: int, few: bool, tmp_path: Path
) -> None:
    file = tmp_path / "text.txt"
    file.write_text(text(64))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        only(Samples.of(file, model(PLAIN, rows), text=TextOptions(tokenizer(tmp_path), length=8)))
    assert [f"{rows} rows; is it the tokenizer" in str(each.message) for each in said] == [
        True
    ] * few


@pytest.mark.parametrize("blank", ["", " \n\n"])
def test_no_text_is_told(blank: str, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(blank)
    with pytest.raises(DataError, match="holds no text; give some"):
        only(Samples.of(file, model(PLAIN), text=TextOptions(tokenizer(tmp_path), length=8)))


def test_a_broken_tokenizer_and_one_without_text(tmp_path: Path) -> None:
    broken = tmp_path / "tokenizer.json"
    broken.write_text("{}")
    with pytest.raises(FileError, match="not a tokenizer of the library tokenizers"):
        Samples.of([text(100)], model(PLAIN), text=TextOptions(broken, 16))
    with pytest.raises(ArgumentError, match="a tokenizer and a length are for text"):
        Samples.of(np.zeros((4, 3)), model(NO_IDS), text=TextOptions(broken))


def test_a_note_among_arrays_is_no_text_unless_there_is_a_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "README.md").write_text(text(64))
    np.save(folder / "a.npy", np.zeros(3))
    assert not is_text(folder)
    assert is_text(folder, wanted=True)
    (folder / "a.npy").unlink()
    assert is_text(folder)
