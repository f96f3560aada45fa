"""A resized model in a folder like the one that it came from; the folder appears whole or not."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir

from morphgraph.errors import FileError, ModelError, warn
from morphgraph.folders.configs import cache_note, rewritten, stated_layers
from morphgraph.folders.found import GENAI, HUGGING_FACE, ModelFolder
from morphgraph.folders.parts import require_same_files
from morphgraph.folders.sizes import VOCABULARY, SizeChanges, cache_parts
from morphgraph.folders.vocabulary import as_text, renumbered_files, token_ids
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import escape
from morphgraph.passes.canonical.join_files import layouts
from morphgraph.passes.canonical.split_files import files_of
from morphgraph.plans import Plan
from morphgraph.workflow import save

_WEIGHTS = (".onnx", ".data", ".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf")
_INDEX = ".index.json"  # which file holds which weights


def check_folder(output: Path, overwrite: bool, source: ModelFolder) -> None:
    """Refuse a folder to be written before any work is done for it.

    Raises:
        FileError: it holds something (without ``overwrite``), is no model's folder, is the source
            or around it, or has no folder above.
    """
    where = escape(str(output))
    here, origin = output.resolve(), source.path.resolve()
    if here == origin or here in origin.parents:
        raise FileError(f"{where}: holds the model, which is never changed; choose another folder")
    if output.exists() and not output.is_dir():
        raise FileError(f"{where}: is a file; give a folder, or a name that ends with .onnx")
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise FileError(
                f"{where}: exists already; choose another name, or pass --overwrite "
                "(overwrite=True)"
            )
        if not any((output / name).is_file() for name in (GENAI, HUGGING_FACE)):
            raise FileError(f"{where}: is no model's folder, and is not replaced; choose another")
    if not output.absolute().parent.is_dir():
        raise FileError(f"{escape(str(output.absolute().parent))}: there is no such folder")


def write_folder(
    graph: ChannelGraph,
    plan: Plan,
    small: ir.Model,
    source: ModelFolder,
    output: Path,
    overwrite: bool = False,
    *,
    folded: bool = False,
) -> None:
    """Write a resized model as its runtime loads it: weights, configs and the tokenizer's files.

    One that is joined of several files is written as these.

    The configs state the new sizes. Weights in other formats and other models of the folder are
    left out. Warns where a config cannot say a size.

    Args:
        graph: the network before.
        plan: what was removed.
        small: the resized network.
        source: the folder that it came from.
        output: the folder to write; replaced as a whole.
        overwrite: whether a model's folder may be replaced.
        folded: as for :func:`morphgraph.save`.

    Raises:
        FileError: the folder may not be written, or cannot.
        ModelError: a config contradicts the network, or its caches have a layout that is not known.
    """
    check_folder(output, overwrite, source)
    keep = plan.keep_channels(graph)
    files = _files(small, source)
    if source.parts and any(len(positions) == 0 for positions in keep.values()):
        raise ModelError(
            f"{escape(str(source.path))}: whole groups are gone, and with them what files hand on; "
            "keep a channel of each (--min-width 1)"
        )
    changes = SizeChanges(graph, keep, small, source.caches, escape(str(source.path / GENAI)))
    made = {}
    for name, config in source.configs.items():
        made[name], notes = rewritten(escape(str(source.path / name)), config, changes)
        if name == HUGGING_FACE and GENAI not in source.configs:
            notes += filter(None, [cache_note(config, made[name], changes)])
        for note in notes:
            warn(f"{name} {note}")
    if any(len(positions) == 0 for positions in keep.values()):
        _warn_of_layers(source.configs, changes)
    texts = {name: as_text(config) for name, config in made.items()}
    left_out: set[str] = set()
    for size in changes.before[VOCABULARY][:1]:
        if changes.after(VOCABULARY, size) != [size]:
            ids = token_ids(graph, keep, size)
            texts, left_out = renumbered_files(source, made, ids, size)
    if changes.layers_left != list(range(len(changes.layers_left))):
        files = {
            path: renumbered(model, source, changes.layers_left) for path, model in files.items()
        }
    with _appearing(output, overwrite) as folder:
        for file in _others(source):
            if file.name not in left_out:
                shutil.copy2(file, folder / file.name)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        for path, model in files.items():
            target = folder / path.absolute().relative_to(source.path.absolute())
            target.parent.mkdir(exist_ok=True)
            save(model, target, folded=folded)


def _files(small: ir.Model, source: ModelFolder) -> dict[Path, ir.Model]:
    """By file of the source the model that takes its place.

    Raises:
        ModelError: the source is several files, and the model is not, or the other way round.
        VerificationError: the files give something else than the model that they are split of.
    """
    noted = layouts(small)
    if noted is None and not source.parts:
        return {source.file: small}
    files = {} if noted is None else files_of(small)
    if files.keys() != {path.stem for path in source.parts}:
        names = ", ".join(f"'{escape(str(p.relative_to(source.path)))}'" for p in source.parts)
        raise ModelError(
            f"{escape(str(source.path))}: holds several models ({names or 'one file'}), and not "
            "those that were resized; give the ONNX file"
        )
    require_same_files(small, files)
    return {path: files[path.stem] for path in source.parts}


def _warn_of_layers(configs: Mapping[str, Any], changes: SizeChanges) -> None:
    """Say where what is left is no whole number of blocks, or nobody knows how many these are."""
    for name, config in configs.items():
        count = len(changes.layers) or stated_layers(config)
        gone = changes.blocks_gone(count)
        if len(gone) > 1:
            warn(
                f"parts of blocks are gone, and {name} counts whole ones: ONNX Runtime runs the "
                "model, what builds it from the config does not; plan with --depth blocks"
            )
        elif not changes.layers and not gone:
            warn(
                "whole layers are gone, and nothing says how many blocks are left: correct the "
                f"number of layers in {name} by hand"
            )


def _others(source: ModelFolder) -> Iterator[Path]:
    """The files beside the model that do not depend on its sizes."""
    for file in sorted(source.path.iterdir()):
        is_weight = file.suffix in _WEIGHTS or file.name.endswith((_INDEX, ".onnx_data"))
        is_known = file.name in source.configs or file.name.startswith(".")
        if file.is_file() and not is_weight and not is_known:
            yield file


def renumbered(model: ir.Model, source: ModelFolder, layers: list[int]) -> ir.Model:
    """The model with its caches numbered without gaps, as runtimes count them."""
    model = model.clone()
    new = {layer: place for place, layer in enumerate(layers)}
    for values, patterns in (
        (model.graph.inputs, source.caches),
        (model.graph.outputs, source.presents),
    ):
        for value in values:
            parts = cache_parts(value.name or "", patterns)
            if parts is not None and parts[1] in new:
                value.name = f"{parts[0]}{new[parts[1]]}{parts[2]}"
    return model


@contextmanager
def _appearing(output: Path, replaces: bool) -> Iterator[Path]:
    """A folder to write into, which takes its place when it is whole.

    Unless it ``replaces`` what is there, another run's folder that has come meanwhile stays.
    """
    where = escape(str(output))
    try:
        aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.absolute().parent))
        try:
            folder = aside / "new"
            folder.mkdir()
            yield folder
            old = aside / "old"
            if replaces and output.exists():
                output.rename(old)
            try:
                folder.rename(output)
            except OSError:
                if old.exists():
                    old.rename(output)
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise FileError(f"{where}: cannot be written: {error.strerror or error}") from error
