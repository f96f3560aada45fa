"""Every bad file gets one clear line, fast; every good one comes back as it was written."""

import bz2
import contextlib
import errno
import lzma
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from morphgraph.errors import FileError, ModelError, MorphError
from morphgraph.onnx_io import as_model, bind_inputs, escape, load, save

TEXT = """
<ir_version: 8, opset_import: ["" : 18]>
tiny (float[N,3] x) => (float[N,2] y)
<float[3,2] w = {1,2,3,4,5,6}, float[2] b = {1,2}>
{ [mm] a = MatMul(x, w)
  [add] y = Add(a, b) }
"""


def proto() -> onnx.ModelProto:
    return onnx.parser.parse_model(TEXT)


def write(folder: Path, content: bytes | onnx.ModelProto) -> Path:
    path = folder / "m.onnx"
    raw = content if isinstance(content, bytes) else content.SerializeToString()
    path.write_bytes(raw)
    return path


def refuse(path: Path, *words: str, error: type[MorphError] = ModelError) -> str:
    """Loading fails at once, in one line that says all these words."""
    started = time.perf_counter()
    with pytest.raises(error) as caught:
        load(path)
    assert time.perf_counter() - started < 5
    message = str(caught.value)
    assert message.isprintable(), message
    assert path.name in message
    for word in words:
        assert word in message, message
    return message


def test_weights_of_a_file_share_memory_of_about_their_size(tmp_path: Path) -> None:
    arrays = [np.arange(size, dtype=np.float32) for size in (300, 1000, 70_000, 500, 20_000)]
    graph = proto().graph
    graph.initializer.extend(
        numpy_helper.from_array(array, f"extra_{k}") for k, array in enumerate(arrays)
    )
    whole = proto()
    whole.graph.CopyFrom(graph)
    read = load(write(tmp_path, whole)).graph.initializers
    found = [read[f"extra_{k}"].const_value for k in range(len(arrays))]
    pieces = {}
    for tensor, array in zip(found, arrays, strict=True):
        assert tensor is not None
        assert np.array_equal(tensor.numpy(), array)
        piece = tensor.numpy()
        while isinstance(piece.base, np.ndarray):
            piece = piece.base
        pieces[id(piece)] = piece.nbytes
    assert sum(pieces.values()) <= 1.1 * sum(array.nbytes for array in arrays)


# -- not a model -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "HTML"),
        (b"  <html>", "HTML"),
        (b"import torch\n", "looks like text; give the ONNX file itself"),
        (b"404: Not Found", "text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"PK\x03\x04" + bytes(50), "PyTorch"),
        (b"\x80\x02}q\x00.", "pickle"),
        (b"\x80\x04\x95\x00.", "pickle"),
        (b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'}", "array of NumPy"),
        (
            (40).to_bytes(8, "little") + b'{"w":{"dtype":"F32","shape":[1]}}' + bytes(8),
            "safetensors",
        ),
        (b"\x08\x07\xff\xff\xff\xff\xff", "truncated or corrupt (7 bytes)"),
    ],
)
def test_files_that_are_not_onnx(tmp_path: Path, content: bytes, word: str) -> None:
    refuse(write(tmp_path, content), word)


def test_truncated_anywhere(tmp_path: Path) -> None:
    whole = proto().SerializeToString()
    for length in range(1, len(whole)):
        with pytest.raises(ModelError):
            load(write(tmp_path, whole[:length]))


def test_flipped_bits_never_raise_anything_else(tmp_path: Path) -> None:
    whole = proto().SerializeToString()
    random = np.random.default_rng(0)
    for _ in range(300):
        broken = bytearray(whole)
        for position in random.integers(0, len(whole), 2):
            broken[position] ^= 1 << random.integers(0, 8)
        with contextlib.suppress(MorphError):
            load(write(tmp_path, bytes(broken)))


def test_paths(tmp_path: Path) -> None:
    refuse(tmp_path / "missing.onnx", os.strerror(errno.ENOENT), error=FileError)
    refuse(tmp_path, "folder", error=FileError)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    refuse(fifo, "ordinary", error=FileError)


# -- impossible models -----------------------------------------------------------------------------


def test_cycle(tmp_path: Path) -> None:
    model = proto()
    model.graph.node[0].input[0] = "y"
    message = refuse(write(tmp_path, model), "cycle", "'mm'", "'add'")
    assert message.count("->") == 2


def test_cycle_through_a_subgraph(tmp_path: Path) -> None:
    branch = helper.make_graph(
        [helper.make_node("Relu", ["late"], ["r"])],
        "branch",
        [],
        [helper.make_tensor_value_info("r", TensorProto.FLOAT, None)],
    )
    choose = helper.make_node(
        "If", ["c"], ["early"], name="choose", then_branch=branch, else_branch=branch
    )
    after = helper.make_node("Relu", ["early"], ["late"], name="after")
    graph = helper.make_graph(
        [choose, after],
        "g",
        [helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("late", TensorProto.FLOAT, [1])],
    )
    refuse(write(tmp_path, helper.make_model(graph)), "cycle", "'choose'", "'after'")


def test_unsorted_nodes_are_sorted(tmp_path: Path) -> None:
    model = proto()
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    assert [node.name for node in load(write(tmp_path, model)).graph] == ["mm", "add"]


def test_value_made_twice(tmp_path: Path) -> None:
    model = proto()
    model.graph.node[0].output[0] = "y"
    refuse(write(tmp_path, model), "'y' is made twice", "'mm'", "'add'")


def test_value_made_by_node_and_initializer(tmp_path: Path) -> None:
    model = proto()
    model.graph.node[0].output[0] = "w"
    refuse(write(tmp_path, model), "'w' is made twice", "initializer", "'mm'")


def test_dangling_input_and_output(tmp_path: Path) -> None:
    model = proto()
    model.graph.node[1].input[1] = "nowhere"
    refuse(write(tmp_path, model), "'add'", "'nowhere'")
    model = proto()
    model.graph.output[0].name = "nowhere"
    refuse(write(tmp_path, model), "output 'nowhere'")


def test_names_of_unnamed_nodes_and_hostile_names(tmp_path: Path) -> None:
    model = proto()
    model.graph.node[1].name = ""
    model.graph.node[1].input[1] = "a\n\x1b[31m"
    refuse(write(tmp_path, model), "unnamed node 1 (Add, output 'y')", r"'a\n\x1b[31m'")


def test_versions(tmp_path: Path) -> None:
    model = proto()
    model.opset_import[0].version = 999
    refuse(write(tmp_path, model), "opset 999", "newer")
    model.opset_import[0].version = 0
    refuse(write(tmp_path, model), "opset 0", "does not exist")
    model = proto()
    model.ir_version = 9999
    refuse(write(tmp_path, model), "IR version 9999", "newer")
    model = proto()
    del model.opset_import[:]
    refuse(write(tmp_path, model), "no operator set")
    model = proto()
    model.ClearField("graph")
    refuse(write(tmp_path, model), "no graph")


def test_duplicate_initializer(tmp_path: Path) -> None:
    model = proto()
    model.graph.initializer.append(model.graph.initializer[0])
    refuse(write(tmp_path, model), "initializer 'w'", "twice")


def test_sparse_initializer(tmp_path: Path) -> None:
    model = proto()
    sparse = model.graph.sparse_initializer.add()
    sparse.values.name = "s"
    refuse(write(tmp_path, model), "'s'", "sparse", error=MorphError)


def test_a_size_of_minus_one_is_open(tmp_path: Path) -> None:
    """PaddlePaddle writes it where ONNX has a symbol."""
    model = proto()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    loaded = load(write(tmp_path, model))
    shape = loaded.graph.inputs[0].shape
    assert shape is not None
    assert isinstance(shape[0], ir.SymbolicDim)
    assert shape[1] == 3
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -2
    refuse(write(tmp_path, model), "'x'", "negative size")


def _dims(tensor: TensorProto) -> None:
    tensor.dims[:] = [2**40, 2**40]


def _negative(tensor: TensorProto) -> None:
    tensor.dims[0] = -3


def _twice_negative(rows: int, tensor: TensorProto) -> None:
    """The product of both is what there are of numbers."""
    tensor.CopyFrom(numpy_helper.from_array(np.ones((rows, 2), np.float32), "w"))
    tensor.dims[:] = [-rows, -2]


def _short(tensor: TensorProto) -> None:
    tensor.CopyFrom(numpy_helper.from_array(np.ones((3, 2), np.float32), "w"))
    tensor.raw_data = tensor.raw_data[:10]


def _dtype(tensor: TensorProto) -> None:
    tensor.data_type = 777


def _undefined(tensor: TensorProto) -> None:
    tensor.data_type = 0


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (_dims, "1099511627776x1099511627776"),
        (_negative, "negative size -3"),
        (partial(_twice_negative, 3), "negative size -3"),
        (partial(_twice_negative, 300), "negative size -300"),  # which stands beside the message
        (_short, "needs 24 bytes, but stores 10"),
        (_dtype, "unknown data type 777"),
        (_undefined, "not set"),
    ],
)
def test_damaged_tensors(tmp_path: Path, damage: Callable[[TensorProto], None], word: str) -> None:
    model = proto()
    damage(model.graph.initializer[0])
    refuse(write(tmp_path, model), "initializer 'w'", word)


def test_damaged_tensor_in_an_attribute(tmp_path: Path) -> None:
    model = proto()
    tensor = numpy_helper.from_array(np.ones(4, np.float32))
    tensor.dims[0] = 5
    model.graph.node.append(helper.make_node("Constant", [], ["k"], name="konst", value=tensor))
    refuse(write(tmp_path, model), "'konst'", "'value'", "needs 20 bytes, but stores 16")


@pytest.mark.parametrize("code", [code for code in ir.DataType if code != ir.DataType.UNDEFINED])
def test_every_data_type_is_accepted(tmp_path: Path, code: ir.DataType) -> None:
    model = proto()
    values: Any = [b"x"] * 6 if code == ir.DataType.STRING else [1] * 6
    try:
        tensor = helper.make_tensor("extra", code.value, [2, 3], values)
    except (KeyError, TypeError, ValueError):
        pytest.skip("onnx.helper cannot make such a tensor")
    model.graph.initializer.append(tensor)
    loaded = load(write(tmp_path, model)).graph.initializers["extra"].const_value
    assert loaded is not None
    assert loaded.numpy().shape == (2, 3)


# -- external data ---------------------------------------------------------------------------------


def external(folder: Path, location: str, **entries: object) -> Path:
    model = proto()
    tensor = model.graph.initializer[0]
    tensor.ClearField("float_data")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
    return write(folder, model)


@pytest.mark.parametrize(
    ("location", "word"),
    [
        ("../secret", "refused"),
        ("/etc/passwd", "refused"),
        ("a/../../secret", "refused"),
        ("..\\secret", "refused"),
        ("*/_ORT_MEM_ADDR_/*", "not a file"),
        ("", "not a file"),
        ("missing.bin", "missing"),
    ],
)
def test_external_locations(tmp_path: Path, location: str, word: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(24))
    refuse(external(folder, location), "'w'", word)


def test_external_links_out_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(24))
    (folder / "soft").symlink_to(tmp_path / "secret")
    refuse(external(folder, "soft"), "'w'", "links out")
    (folder / "hard").hardlink_to(tmp_path / "secret")
    refuse(external(folder, "hard"), "'w'", "hard links")


def test_external_by_bare_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_bytes(bytes(24))
    folder = tmp_path / "model"
    folder.mkdir()
    path = external(folder, "../secret")
    monkeypatch.chdir(folder)
    refuse(Path(path.name), "refused")


@pytest.mark.parametrize(
    ("entries", "word"),
    [
        ({}, "needs 24 bytes"),
        ({"offset": 2**50}, f"needs {2**50 + 24} bytes"),
        ({"offset": -1}, "offset -1"),
        ({"length": 2**50}, f"needs {2**50} bytes"),
        ({"length": 3}, "length 3"),
        ({"offset": "ten"}, "not a number"),
    ],
)
def test_external_file_too_short(tmp_path: Path, entries: dict[str, object], word: str) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(10))
    refuse(external(tmp_path, "w.bin", **entries), "'w'", word)


def test_unknown_external_keys_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(np.arange(6, dtype=np.float32).tobytes())
    path = external(tmp_path, "w.bin", __class__="os.system")
    with pytest.warns(UserWarning, match="__class__"):
        model = load(path)
    tensor = model.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    np.testing.assert_array_equal(tensor.numpy(), [[0, 1], [2, 3], [4, 5]])


# -- size ------------------------------------------------------------------------------------------


def test_long_chain_is_linear_and_not_recursive(tmp_path: Path) -> None:
    length = 20_000
    nodes = [helper.make_node("Relu", [f"v{i}"], [f"v{i + 1}"]) for i in range(length)]
    graph = helper.make_graph(
        nodes[::-1],
        "chain",
        [helper.make_tensor_value_info("v0", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info(f"v{length}", TensorProto.FLOAT, [1])],
    )
    started = time.perf_counter()
    model = load(write(tmp_path, helper.make_model(graph)))
    assert time.perf_counter() - started < 20
    assert next(iter(model.graph)).inputs[0].name == "v0"


def test_deeply_nested_subgraphs_may_read_outer_values(tmp_path: Path) -> None:
    def branch(depth: int) -> onnx.GraphProto:
        node = helper.make_node("Relu", ["x"], [f"r{depth}"])
        if depth:
            inner = branch(depth - 1)
            node = helper.make_node(
                "If", ["c"], [f"r{depth}"], then_branch=inner, else_branch=inner
            )
        out = onnx.ValueInfoProto(name=f"r{depth}")
        return helper.make_graph([node], f"b{depth}", [], [out])

    node = helper.make_node("If", ["c"], ["y"], then_branch=branch(6), else_branch=branch(6))
    graph = helper.make_graph(
        [node],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1]),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    assert len(load(write(tmp_path, helper.make_model(graph))).graph) == 1


# -- writing ---------------------------------------------------------------------------------------


def run(path: Path) -> np.ndarray:
    x = np.array([[1.0, 2.0, 3.0]], np.float32)
    result: np.ndarray = ort.InferenceSession(str(path)).run(None, {"x": x})[0]
    return result


def test_round_trip(tmp_path: Path) -> None:
    source = write(tmp_path, proto())
    out = tmp_path / "out.onnx"
    save(load(source), out)
    np.testing.assert_array_equal(run(out), [[23.0, 30.0]])
    first = out.read_bytes()
    save(load(out), out, overwrite=True)
    assert out.read_bytes() == first
    assert out.stat().st_mode == source.stat().st_mode


def test_external_data_appears_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("morphgraph.onnx_io.files._INLINE_LIMIT_BYTES", 8)
    monkeypatch.setattr("morphgraph.onnx_io.files._EXTERNAL_TENSOR_BYTES", 8)
    model = as_model(proto())
    out = tmp_path / "big.onnx"
    save(model, out)
    assert {file.name for file in tmp_path.iterdir()} == {"big.onnx", "big.onnx.data"}
    np.testing.assert_array_equal(run(out), [[23.0, 30.0]])
    loaded = load(out)
    assert isinstance(loaded.graph.initializers["w"].const_value, ir.ExternalTensor)
    assert not isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor)
    with pytest.raises(FileError, match="exists already"):
        save(loaded, out)
    save(loaded, out, overwrite=True)  # over the very file that its weights are mapped from
    np.testing.assert_array_equal(run(out), [[23.0, 30.0]])
    monkeypatch.undo()
    inner = tmp_path / "inner.onnx"
    save(load(out), inner)
    np.testing.assert_array_equal(run(inner), [[23.0, 30.0]])


def test_save_refuses(tmp_path: Path) -> None:
    model = as_model(proto())
    out = tmp_path / "m.onnx"
    out.write_bytes(b"precious")
    with pytest.raises(FileError, match="exists already"):
        save(model, out)
    with pytest.raises(FileError, match="folder"):
        save(model, tmp_path, overwrite=True)
    with pytest.raises(FileError, match="no folder"):
        save(model, tmp_path / "nowhere" / "m.onnx")
    assert out.read_bytes() == b"precious"


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_interrupted_save_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise failure

    out = tmp_path / "m.onnx"
    out.write_bytes(b"precious")
    monkeypatch.setattr(os, "fsync", fail)
    expected = FileError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        save(as_model(proto()), out, overwrite=True)
    assert list(tmp_path.iterdir()) == [out]
    assert out.read_bytes() == b"precious"


# -- small services --------------------------------------------------------------------------------


def test_as_model(tmp_path: Path) -> None:
    model = as_model(proto())
    assert as_model(model) is model
    assert as_model(write(tmp_path, proto())).graph.name == "tiny"
    with pytest.raises(ModelError, match="no graph"):
        as_model(onnx.ModelProto(ir_version=8, opset_import=[helper.make_opsetid("", 18)]))


def test_external_data_needs_a_path(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(24))
    with pytest.raises(ModelError, match="load the model by path"):
        as_model(onnx.load(external(tmp_path, "w.bin"), load_external_data=False))


def test_bind_inputs() -> None:
    model = as_model(proto())
    bound = bind_inputs(model, {"x": (4, 3)})
    assert bound.graph.inputs[0].shape == (4, 3)
    assert bound.graph.outputs[0].shape == (4, 2)
    assert model.graph.inputs[0].shape == ("N", 3)
    weights = [m.graph.initializers["w"].const_value for m in (model, bound)]
    assert weights[0] is weights[1]
    wrong: list[tuple[dict[str, tuple[int, ...]], str]] = [
        ({"z": (1,)}, "no such input"),
        ({"x": (4, 5)}, "does not fit"),
        ({"x": (4,)}, "does not fit"),
        ({"x": (0, 3)}, "does not fit"),
    ]
    for shapes, word in wrong:
        with pytest.raises(ModelError, match=word):
            bind_inputs(model, shapes)


def test_escape_bounds_length() -> None:
    assert len(escape("x" * 100_000)) == 200
    assert escape("Größe") == "Größe"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\x1c\x00\x00\x00TFL3" + bytes(200), "TensorFlow Lite"),
        (b"\x28\x00\x00\x00ORTM" + bytes(200), "ONNX Runtime's own format"),
        (b"GGUF\x03\x00\x00\x00" + bytes(200), "GGUF"),
        (b'<?xml version="1.0"?>\n<net name="x"/>', "OpenVINO"),
        *((bz2.compress(bytes(99)), "bunzip2"), (lzma.compress(bytes(99)), "unxz")),
        *((b"\x28\xb5\x2f\xfd" + bytes(9), "unzstd"), (b"7z\xbc\xaf\x27\x1c", "7z")),
    ],
)
def test_files_of_others_are_called_by_their_name(
    content: bytes, says: str, tmp_path: Path
) -> None:
    (path := tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ModelError, match=f"not an ONNX file: .*{says}"):
        load(path)


def test_a_producer_whose_name_is_a_mark_is_none_of_these(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["": 20]> net (float[1] x) => (float[1] y) { y = Relu(x) }'
    )
    proto.producer_name = "TFL3"
    (path := tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    assert path.read_bytes()[4:8] == b"TFL3"
    load(path)
