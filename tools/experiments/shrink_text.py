"""Text to shrink and judge with: sentences of the standard library, and pictures of lines."""

import ast
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

LENGTH = 32  # tokens; shorter sentences are padded and masked
_APART = {"idlelib", "lib2to3", "site-packages", "dist-packages", "test", "tests", "turtledemo"}
_WORDS = re.compile(r"[A-Za-z][A-Za-z ,;:'()-]+[.!?]?")


def sentences() -> list[str]:
    """First sentences of the docstrings of the standard library, each once, in a fixed order."""
    found: dict[str, None] = {}
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if not _APART & set(path.relative_to(library).parts):
            found.update(dict.fromkeys(_first_sentences(path)))
    return list(found)


def _first_sentences(path: Path) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_bytes())):
        text = ast.get_docstring(node) if isinstance(node, documented) else None
        if text:
            first = re.split(r"(?<=[.!?])\s", " ".join(text.split("\n\n")[0].split()))[0]
            if 8 <= len(first.split()) <= 40:
                yield first


def tokens(texts: Sequence[str], tokenizer: Path) -> dict[str, NDArray[np.int64]]:
    """Ids and mask of sentences, each ``[N, LENGTH]``, by the names of the encoder's inputs."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer))
    encoder.enable_truncation(LENGTH)
    encoder.enable_padding(length=LENGTH)
    coded = encoder.encode_batch(list(texts))
    return {
        "input_ids": np.array([each.ids for each in coded], np.int64),
        "attention_mask": np.array([each.attention_mask for each in coded], np.int64),
    }


def lines(
    texts: Sequence[str], rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Pictures of lines of text as rapidocr's classifier takes them, and which are upside down.

    Returns:
        ``[N, 3, 48, 192]`` on a scale of -1 to 1, and 0 or 1 for each.
    """
    turned = rng.permutation(np.arange(len(texts)) % 2)
    pictures = [_line(text, bool(turn), rng) for text, turn in zip(texts, turned, strict=True)]
    return np.stack(pictures), turned


def _line(text: str, turned: bool, rng: np.random.Generator) -> NDArray[np.float32]:
    """One line in a gray on another, slightly turned, blurred and noisy; black behind its end."""
    words = " ".join(_WORDS.findall(text))[: rng.integers(6, 25)].strip() or "text"
    font = ImageFont.load_default(float(rng.integers(18, 40)))
    left, top, right, bottom = (int(edge) for edge in font.getbbox(words))
    border = int(rng.integers(2, 10))
    size = (right - left + 2 * border, bottom - top + 2 * border)
    paper, ink = rng.permutation([rng.integers(0, 90), rng.integers(160, 256)])
    picture = Image.new("L", size, int(paper))
    ImageDraw.Draw(picture).text((border - left, border - top), words, int(ink), font)
    picture = picture.rotate(rng.uniform(-3, 3), Image.Resampling.BILINEAR, fillcolor=int(paper))
    picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1)))
    if turned:
        picture = picture.transpose(Image.Transpose.ROTATE_180)
    width = min(192, round(48 * picture.width / picture.height))
    gray = np.asarray(picture.resize((width, 48), Image.Resampling.BILINEAR), np.float32)
    gray = np.clip(gray + rng.normal(0, rng.uniform(0, 12), gray.shape), 0, 255)
    full = np.zeros((3, 48, 192), np.float32)
    full[:, :, :width] = gray / 127.5 - 1
    return full
