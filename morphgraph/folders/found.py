"""A model's folder: which file the model is, and which configs say its sizes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from morphgraph.errors import FileError, ModelError
from morphgraph.onnx_io import escape
from morphgraph.onnx_io.reading import read_bounded

GENAI = "genai_config.json"
HUGGING_FACE = "config.json"
_SUBFOLDER = "onnx"  # where Hugging Face's folders keep exported models
#: Ends of the names of files that hold another file's network in another precision.
_PRECISIONS = (
    *("_quantized", "_optimized", "_fp16", "_int8", "_uint8"),
    *("_q4", "_q4f16", "_bnb4"),
)
_MAX_BYTES = 16_000_000
_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length")


@dataclass(frozen=True)
class ModelFolder:
    """A folder that a runtime loads as a whole.

    Attributes:
        path: the folder.
        file: the model in it, or in a folder below; the folder itself where that is several files.
        configs: what its configs say, by file name.
        parts: the files of a model that is several files; none where it is one.
    """

    path: Path
    file: Path
    configs: Mapping[str, dict[str, Any]]
    parts: tuple[Path, ...] = ()

    @property
    def caches(self) -> tuple[str, ...]:
        """Patterns of the names of cache inputs, with ``%d`` for the layer; of GenAI's config."""
        inputs = _inside(self.configs.get(GENAI, {}), "model", "decoder", "inputs")
        return tuple(v for k, v in inputs.items() if k.startswith("past_") and "%d" in str(v))

    @property
    def positions(self) -> int | None:
        """The most tokens of a sequence that its configs state; ``None``: they state none."""
        inner = (
            (self.configs.get(HUGGING_FACE, {}), "text_config"),
            (self.configs.get(GENAI, {}), "model"),
        )
        tables = [table for config, key in inner for table in (config, _inside(config, key))]
        stated = [n for table in tables for name in _POSITIONS if type(n := table.get(name)) is int]
        return min((n for n in stated if n > 0), default=None)

    @property
    def presents(self) -> tuple[str, ...]:
        """The same of cache outputs."""
        outputs = _inside(self.configs.get(GENAI, {}), "model", "decoder", "outputs")
        return tuple(v for k, v in outputs.items() if k.startswith("present_") and "%d" in str(v))


def folder_of(path: Path) -> ModelFolder | None:
    """The folder that a model stands in, or that is named, if there is a config in it.

    Args:
        path: an ONNX file or a folder.

    Raises:
        FileError: a config cannot be read.
        ModelError: a config is no JSON, or a named folder holds no model.
    """
    if path.is_dir():
        configs = _configs(path)
        if not configs:
            return None
        files = _the_models(path, configs)
        parts = files if len(files) > 1 else ()
        return ModelFolder(path, path if parts else files[0], configs, parts)
    above = path.absolute().parent
    for place in (above, above.parent) if above.name == _SUBFOLDER else (above,):
        configs = _configs(place)
        named = _named(configs)
        if configs and named in (None, path.name):
            return ModelFolder(place, path, configs)
    return None


def model_file(path: Path) -> Path:
    """The ONNX file that is meant by a path: itself, or the one in a model's folder.

    Raises:
        FileError: a folder without a config.
        ModelError: one without a model, or with several files.
    """
    file = model_place(path)
    if file.is_dir():
        raise ModelError(
            f"{escape(str(file))}: holds several models ({_part_names(file)}), and one ONNX file "
            "is wanted: give it (`analyze`, `plan`, `apply`, `shrink`, `expand`, `verify`, `diff`, "
            "`bench` and `report` take the folder as one network)"
        )
    return file


def model_places(paths: Sequence[Path]) -> list[Path]:
    """What is to be loaded for models that stand beside each other: files alone, or folders alone.

    Raises: as :func:`model_place`, and
        ModelError: one is a file, and another one several; or their files have other names.
    """
    places = [model_place(path) for path in paths]
    several = [place for place in places if place.is_dir()]
    for place in places if several else ():
        if not place.is_dir():
            raise ModelError(
                f"{escape(str(place))}: is one file, and {escape(str(several[0]))} a network of "
                f"several ({_part_names(several[0])}); give two folders, or a file of each"
            )
        if _stems(place) != _stems(several[0]):
            raise ModelError(
                f"{escape(str(place))}: holds {_part_names(place)}, and {escape(str(several[0]))} "
                f"{_part_names(several[0])}: files are compared by name; give a file of each"
            )
    return places


def model_place(path: Path) -> Path:
    """What is to be loaded for a path: an ONNX file, or a folder whose files are one model.

    Raises:
        FileError: a folder without a config.
        ModelError: one without a model.
    """
    if not path.is_dir():
        return path
    folder = folder_of(path)
    if folder is None:
        raise FileError(
            f"{escape(str(path))}: is a folder without {HUGGING_FACE} or {GENAI}; give the ONNX "
            "file"
        )
    return folder.file


def _configs(place: Path) -> dict[str, dict[str, Any]]:
    """The configs of a folder that are about a model."""
    found = {name: _read(place / name) for name in (GENAI, HUGGING_FACE)}
    is_about = {
        GENAI: isinstance(found[GENAI].get("model"), dict),
        HUGGING_FACE: bool({"model_type", "architectures"} & found[HUGGING_FACE].keys()),
    }
    return {name: config for name, config in found.items() if is_about[name]}


def _read(file: Path) -> dict[str, Any]:
    """What a config says; empty where there is none."""
    where = escape(str(file))
    try:
        if not file.is_file():
            return {}
        config = json.loads(read_bounded(file, ModelError, _MAX_BYTES))
    except OSError as error:
        raise FileError(f"{where}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{where}: is no JSON ({escape(str(error))}); repair it") from error
    return config if isinstance(config, dict) else {}


def _inside(config: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """A table within a config; empty where there is none."""
    inner: Any = config
    for key in keys:
        inner = inner.get(key) if isinstance(inner, dict) else None
    return inner if isinstance(inner, dict) else {}


def _named(configs: Mapping[str, dict[str, Any]]) -> str | None:
    """The model file that GenAI's config names."""
    name = _inside(configs.get(GENAI, {}), "model", "decoder").get("filename")
    return name if isinstance(name, str) else None


def _the_models(place: Path, configs: Mapping[str, dict[str, Any]]) -> tuple[Path, ...]:
    """The file that the configs mean, or all that are there where none stands out."""
    where = escape(str(place))
    named = _named(configs)
    if named is not None:
        if Path(named).name != named or not (place / named).is_file():
            raise ModelError(
                f"{where}: {GENAI} names the model '{escape(named)}', which is not there; give the "
                "ONNX file"
            )
        return (place / named,)
    files = sorted([*place.glob("*.onnx"), *(place / _SUBFOLDER).glob("*.onnx")])
    plain = [file for file in files if file.name == "model.onnx"]
    if not files:
        raise ModelError(f"{where}: holds no ONNX file; give the ONNX file")
    return tuple(plain) if len(plain) == 1 else tuple(_originals(files))


def _originals(files: Sequence[Path]) -> list[Path]:
    """The files without those that stand beside the file that they were made of.

    Which precision a file is in is said by the end of its name (Optimum, transformers.js).
    """
    stems = {file.with_suffix("") for file in files}

    def is_made_of_another(file: Path) -> bool:
        stem = file.stem
        ends = (end for end in _PRECISIONS if stem.endswith(end))
        return any(file.with_name(stem.removesuffix(end)) in stems for end in ends)

    return [file for file in files if not is_made_of_another(file)]


def _stems(place: Path) -> list[str]:
    folder = folder_of(place)
    return sorted(file.stem for file in (() if folder is None else folder.parts))


def _part_names(place: Path) -> str:
    """The files of a folder that is a network of several."""
    folder = folder_of(place)
    return _names(place, () if folder is None else folder.parts)


def _names(place: Path, files: Sequence[Path]) -> str:
    return ", ".join(f"'{escape(str(file.relative_to(place)))}'" for file in files[:5])
