"""Tokenizers of fewer tokens, held against the library `tokenizers`: text is split as before."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import morphgraph as mg
from morphgraph.cli import main
from morphgraph.errors import DataError, FileError, UnsupportedError
from morphgraph.folders import folder_of, write_folder
from morphgraph.folders.tokens import not_formed, smaller_tokenizer, vocabulary
from morphgraph.testing import model_from_text

tokenizers: Any = pytest.importorskip("tokenizers")

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
TEXT = [
    line
    for module in (mg.plan, mg.shrink, mg.lift, mg.cost, json.dumps, json.loads, np.einsum)
    for line in (module.__doc__ or "").splitlines()
    if line.strip()
]
SIZE = 420


def trained(kind: str) -> Any:
    """A tokenizer that puts a token in front of every text and one behind it."""
    models, trainers = tokenizers.models, tokenizers.trainers
    split, templates = tokenizers.pre_tokenizers, tokenizers.processors
    if kind == "BPE of bytes":
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer = split.ByteLevel(add_prefix_space=False)
        made.decoder = tokenizers.decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=SIZE, special_tokens=SPECIAL, initial_alphabet=split.ByteLevel.alphabet()
        )
    elif kind == "BPE of letters":
        made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", continuing_subword_prefix="##"))
        made.pre_tokenizer = split.Whitespace()
        trainer = trainers.BpeTrainer(
            vocab_size=SIZE, special_tokens=SPECIAL, continuing_subword_prefix="##"
        )
    elif kind == "WordPiece":
        made = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.pre_tokenizer = split.Whitespace()
        trainer = trainers.WordPieceTrainer(vocab_size=SIZE, special_tokens=SPECIAL)
    elif kind == "Unigram":
        made = tokenizers.Tokenizer(models.Unigram())
        made.pre_tokenizer = split.Metaspace()
        made.decoder = tokenizers.decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=SIZE, special_tokens=SPECIAL, unk_token="<unk>"
        )
    else:
        made = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
        made.pre_tokenizer = split.Whitespace()
        trainer = trainers.WordLevelTrainer(vocab_size=SIZE, special_tokens=SPECIAL)
    made.train_from_iterator(TEXT, trainer)
    made.post_processor = templates.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(name, SPECIAL.index(name)) for name in SPECIAL[1:3]]
    )
    made.enable_padding(pad_id=0, pad_token="<pad>")
    return made


KINDS = ("BPE of bytes", "BPE of letters", "WordPiece", "Unigram", "WordLevel")


def saved(kind: str, folder: Path) -> tuple[Any, Path]:
    made, path = trained(kind), folder / "tokenizer.json"
    made.save(str(path))
    return made, path


@pytest.mark.parametrize("kind", KINDS)
def test_text_of_tokens_that_stay_is_split_as_before(kind: str, tmp_path: Path) -> None:
    made, path = saved(kind, tmp_path)
    half = TEXT[: len(TEXT) // 2]
    counts = Counter(number for line in half for number in made.encode(line).ids)
    kept = mg.tokens_with_parts(mg.frequent_tokens(counts), path)
    assert len(kept) < made.get_vocab_size()
    ids = mg.token_map(kept)
    table = json.loads(path.read_text())
    small = smaller_tokenizer(table, ids)
    assert table == json.loads(path.read_text())  # what is given stays
    assert not_formed(table, ids) == []
    again = tokenizers.Tokenizer.from_str(json.dumps(small))
    assert sorted(again.get_vocab().values()) == list(range(len(kept)))
    told = 0
    for line in TEXT:
        old = made.encode(line).ids
        if set(old) <= ids.keys():
            new = again.encode(line).ids
            assert new == [ids[number] for number in old]
            assert again.decode(new) == made.decode(old)
            told += 1
    assert told >= len(half)
    short, _ = again.encode_batch([half[0][:6], half[0]])
    assert set(short.ids[len(made.encode(half[0][:6]).ids) :]) <= {ids[0]}  # padding


def test_merges_of_which_a_part_has_gone_are_told(tmp_path: Path) -> None:
    made, path = saved("BPE of bytes", tmp_path)
    table = json.loads(path.read_text())
    kept = set(mg.tokens_with_parts([0], path))  # by the tokenizer itself
    merged = (
        (number, chosen, parts)
        for number in reversed(range(made.get_vocab_size()))
        if (parts := set(chosen := mg.tokens_with_parts([number], path)) - kept - {number})
    )
    number, chosen, parts = next(merged)  # a merge of tokens that are merged themselves
    without = mg.token_map(set(chosen) - parts)
    assert made.id_to_token(number) in not_formed(table, without)
    assert not_formed(table, mg.token_map(chosen)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_that_the_tokenizer_needs_may_not_go(kind: str, tmp_path: Path) -> None:
    made, path = saved(kind, tmp_path)
    table, whole = json.loads(path.read_text()), range(made.get_vocab_size())
    gone = [1] if kind == "BPE of bytes" else [1, 3]  # what it adds to texts; unknown text
    for number in gone:
        with pytest.raises(UnsupportedError, match=f"token '{SPECIAL[number]}'.*tokens_with_parts"):
            smaller_tokenizer(table, mg.token_map(set(whole) - {number}))
    assert smaller_tokenizer(table, mg.token_map(whole)) == table
    less = smaller_tokenizer(table, mg.token_map(whole[1:]))
    assert less["padding"] is None
    assert [added["id"] for added in less["added_tokens"]] == [0, 1, 2]


def test_files_that_are_no_tokenizer_are_refused(tmp_path: Path) -> None:
    _, path = saved("WordPiece", tmp_path)
    for text, error, words in (
        ("{", DataError, "is no JSON"),
        ("[]", DataError, "is no tokenizer"),
        ('{"model": {"type": "Other", "vocab": {}}}', UnsupportedError, "'Other' is none of"),
    ):
        other = tmp_path / "other.json"
        other.write_text(text)
        with pytest.raises(error, match=words):
            mg.tokens_with_parts([0], other)
    with pytest.raises(FileError, match="No such file or directory; check the path"):
        mg.tokens_with_parts([0], tmp_path / "none.json")
    with pytest.raises(DataError, match=r"has no token 9999 \(\d+ tokens\)"):
        mg.tokens_with_parts([9999], path)


def make(folder: Path, kind: str = "BPE of bytes", **config: Any) -> tuple[Any, list[int]]:
    """A model's folder with a tokenizer of its vocabulary, and a third of the ids."""
    folder.mkdir()
    made, path = saved(kind, folder)
    size = made.get_vocab_size()
    network = model_from_text(
        f"""<ir_version: 8, opset_import: ["": 17]> net (int64[N,T] input_ids,
        float[{size},8] table, float[8,8] w, float[8,{size}] head) => (float[N,T,{size}] logits) {{
            x = Gather(table, input_ids)  h = MatMul(x, w)  a = Relu(h)
            logits = MatMul(a, head) }}""",
        inputs=("input_ids",),
    )
    mg.save(network, folder / "model.onnx")
    ids: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": [2, 300], "pad_token_id": 0}
    said = {"model_type": "tiny", "hidden_size": 8, "vocab_size": size, **ids, **config}
    (folder / "config.json").write_text(json.dumps(said))
    (folder / "generation_config.json").write_text(json.dumps({**ids, "top_k": 300}))
    added = {str(k): {"content": name} for k, name in enumerate(SPECIAL)}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    (folder / "vocab.json").write_text(json.dumps(vocabulary(json.loads(path.read_text()))))
    return made, mg.tokens_with_parts(range(4, size, 3), path)


def shrunk(folder: Path, kept: list[int], output: Path) -> None:
    graph = mg.lift(folder / "model.onnx", pin_outputs=False, pin_rows=False)
    plan = mg.plan(graph, {}, vocabulary=kept)
    source = folder_of(folder)
    assert source is not None
    write_folder(graph, plan, mg.apply(graph, plan), source, output)


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_a_folder_gets_a_tokenizer_of_its_vocabulary(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    made, kept = make(tmp_path / "large")
    kept = sorted({*kept, 300})
    ids, small = mg.token_map(kept), tmp_path / "small"
    shrunk(tmp_path / "large", mg.tokens_with_parts(kept, tmp_path / "large/tokenizer.json"), small)
    ids = mg.token_map(mg.tokens_with_parts(kept, tmp_path / "large/tokenizer.json"))
    assert not [w for w in recwarn if "token" in str(w.message)]
    again = tokenizers.Tokenizer.from_file(str(small / "tokenizer.json"))
    sizes = {w.name: list(w.dims) for w in onnx.load(small / "model.onnx").graph.initializer}
    assert again.get_vocab_size() == len(ids) == sizes["table"][0] < made.get_vocab_size()
    line = next(line for line in TEXT if set(made.encode(line).ids) <= ids.keys())
    assert again.encode(line).ids == [ids[number] for number in made.encode(line).ids]
    for name in ("config.json", "generation_config.json"):
        config = read(small / name)
        assert [config[f"{what}_token_id"] for what in ("bos", "eos", "pad")] == [
            ids[1], [ids[2], ids[300]], ids[0]
        ]  # fmt: skip
    assert read(small / "generation_config.json")["top_k"] == 300
    assert read(small / "vocab.json") == again.get_vocab()
    decoded = read(small / "tokenizer_config.json")["added_tokens_decoder"]
    assert {int(k): v["content"] for k, v in decoded.items()} == {
        ids[k]: name for k, name in enumerate(SPECIAL)
    }


def test_plan_says_which_parts_of_tokens_are_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, kept = make(tmp_path / "large")
    (tmp_path / "whole.txt").write_text(" ".join(map(str, kept)))
    words = [str(tmp_path / "large"), "--vocabulary"]
    assert main(["plan", *words, str(tmp_path / "whole.txt"), "-o", str(tmp_path / "a.json")]) == 0
    assert "tokens_with_parts" not in capsys.readouterr().err
    last = [*range(4), made.get_vocab_size() - 1]
    (tmp_path / "few.txt").write_text(" ".join(map(str, last)))
    assert main(["plan", *words, str(tmp_path / "few.txt"), "-o", str(tmp_path / "b.json")]) == 0
    more = len(mg.tokens_with_parts(last, tmp_path / "large/tokenizer.json")) - len(last)
    said = " ".join(capsys.readouterr().err.split())
    assert f"tokenizer.json: needs {more} more tokens" in said
    assert "mg.tokens_with_parts gives all" in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda kept: [k for k in kept if k != 1], r"copied as they are.*'<s>', which the tokeni"),
        (lambda kept: [k for k in kept if k != 0], r"config\.json: pad_token_id 0 .* has gone"),
    ],
)
def test_what_a_folder_cannot_say_any_more_is_told(
    change: Callable[[list[int]], list[int]], words: str, tmp_path: Path
) -> None:
    _, kept = make(tmp_path / "large")
    with pytest.warns(mg.MorphWarning, match=words):
        shrunk(tmp_path / "large", change(kept), tmp_path / "small")
    assert (tmp_path / "small" / "tokenizer.json").is_file()
