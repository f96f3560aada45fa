"""Datasets from tiny files, against what was written into them and against Pillow and numpy."""

import gzip
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from morphgraph.errors import DataError, FileError, MorphError
from morphgraph.recipes.data import Augmentation, Dataset, Preprocessing, load_data
from morphgraph.recipes.readers import FASHION_FOLDER

torch.set_num_threads(1)


def _arrays(
    *, train: int = 12, test: int = 5, shape: tuple[int, ...] = (6, 5, 3)
) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    return {
        "x_train": generator.integers(0, 256, (train, *shape), dtype=np.uint8),
        "y_train": np.arange(train) % 3,
        "x_test": generator.integers(0, 256, (test, *shape), dtype=np.uint8),
        "y_test": np.arange(test, dtype=np.uint8) % 3,
    }


def _npz(folder: Path, **changes: Any) -> Path:
    path = folder / "data.npz"
    np.savez(path, **{k: v for k, v in (_arrays() | changes).items() if v is not None})
    return path


def _write_images(
    folder: Path, count: int, *, size: tuple[int, int] = (6, 4), seed: int = 0
) -> None:
    """Random colour images of (width, height), as PNG."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for index in range(count):
        pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:03}.png")


# ---- .npz


def test_npz_is_what_was_saved(tmp_path: Path) -> None:
    arrays = _arrays()
    data = load_data(_npz(tmp_path))
    assert data.name == "data"
    assert data.classes == ("0", "1", "2")
    for key, array in arrays.items():
        found = getattr(data, key)
        assert np.array_equal(found, array)
        assert found.dtype == (np.uint8 if key[0] == "x" else np.int64)
    scaled = arrays["x_train"].astype(np.float64) / 255
    assert data.preprocessing.size == (6, 5)
    assert data.preprocessing.mean == pytest.approx(scaled.mean((0, 1, 2)))
    assert data.preprocessing.std == pytest.approx(scaled.std((0, 1, 2)))


def test_gray_and_column_labels(tmp_path: Path) -> None:
    arrays = _arrays(shape=(6, 5))
    arrays["y_train"] = arrays["y_train"][:, None]
    data = load_data(_npz(tmp_path, **arrays))
    assert data.x_train.shape == (12, 6, 5, 1)
    assert data.y_train.shape == (12,)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"y_test": None}, "there is no y_test; needed are"),
        ({"x_train": np.zeros((12, 6, 5, 3), np.float32)}, "x_train: images are float32"),
        ({"x_test": np.zeros((5, 3, 6, 5), np.uint8)}, r"x_test: shape \(5, 3, 6, 5\) is neither"),
        ({"x_train": np.zeros((12, 30), np.uint8)}, r"x_train: shape \(12, 30\) is neither"),
        ({"x_test": np.zeros((5, 7, 5, 3), np.uint8)}, "x_test: images are"),
        ({"x_train": np.zeros((12, 0, 5, 3), np.uint8)}, "have no pixels"),
        ({"y_train": np.zeros(12)}, "y_train: labels are float64"),
        ({"y_train": np.zeros(11, np.int64)}, "y_train: shape .* there are 12 images"),
        ({"y_train": np.arange(12) - 1}, "y_train: label -1 is out of range"),
        ({"y_train": np.arange(12) + 10**12}, "y_train: label 10+11 is out of range"),
        ({"y_test": np.array([0, 1, 2, 3, 0])}, "y_test: label 3 is out of range"),
        ({"x_train": np.array([[1], None], dtype=object)}, "pickled"),
        (
            {"x_test": np.zeros((0, 6, 5, 3), np.uint8), "y_test": np.zeros(0, int)},
            "no test images",
        ),
    ],
)
def test_a_wrong_npz_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        load_data(_npz(tmp_path, **changes))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3


def test_a_pickled_npz_is_never_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    path = _npz(tmp_path, y_train=np.array([Bomb()], dtype=object))
    with pytest.raises(DataError, match="pickled"):
        load_data(path)
    assert not (tmp_path / "exploded").exists()


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    good = _npz(tmp_path).read_bytes()
    broken = tmp_path / "broken.npz"
    for content in (b"", b"<html>", good[: len(good) // 2], good[:200] + b"\xff" * 40 + good[240:]):
        broken.write_bytes(content)
        with pytest.raises(MorphError, match=r"broken\.npz: ") as caught:
            load_data(broken)
        assert "\n" not in str(caught.value)
    with zipfile.ZipFile(broken, "w") as archive:
        for key in _arrays():
            header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({2**45}, 8, 8), }}"
            body = header.ljust(117).encode() + b"\n"
            archive.writestr(
                f"{key}.npy", b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body
            )
    with pytest.raises(DataError, match=r"broken\.npz: cannot be read"):
        load_data(broken)


def test_what_is_not_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="nowhere: there is no such file"):
        load_data(tmp_path / "nowhere")
    (tmp_path / "data.csv").write_text("1,2")
    with pytest.raises(DataError, match=r"data\.csv: not a folder and not an \.npz"):
        load_data(tmp_path / "data.csv")


# ---- digits and Fashion-MNIST


def test_digits_are_split_by_class() -> None:
    data = load_data("digits")
    assert data.x_train.shape[1:] == (8, 8, 1)
    assert len(data.x_train) + len(data.x_test) == 1797
    for label in range(10):
        train, test = (np.count_nonzero(y == label) for y in (data.y_train, data.y_test))
        assert test == pytest.approx(0.2 * (train + test), abs=0.6)
    whole = np.concatenate([data.x_train, data.x_test]).reshape(1797, -1)
    assert whole.max() == 255
    assert len(np.unique(whole, axis=0)) == 1797  # none in both parts
    again = load_data("digits")
    assert np.array_equal(data.x_test, again.x_test)
    # A nearest-neighbour classifier is good only where every image kept its own label.
    known, new = (x.reshape(len(x), -1).astype(np.float64) for x in (data.x_train, data.x_test))
    distance = (known**2).sum(1)[:, None] - 2 * known @ new.T  # squared, but for what `new` adds
    assert (data.y_train[distance.argmin(0)] == data.y_test).mean() > 0.97


def _idx(folder: Path, name: str, array: np.ndarray[Any, Any]) -> None:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    content = bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes()
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)


def _fashion(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    generator = np.random.default_rng(0)
    parts = {}
    for part, count in (("train", 20), ("t10k", 10)):
        parts[part] = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        _idx(folder, f"{part}-images-idx3-ubyte.gz", parts[part])
        _idx(folder, f"{part}-labels-idx1-ubyte", labels)
    return parts


def test_idx_files_compressed_or_not(tmp_path: Path) -> None:
    parts = _fashion(tmp_path)
    data = load_data("fashion-mnist", data_dir=tmp_path)
    assert np.array_equal(data.x_train[..., 0], parts["train"])
    assert np.array_equal(data.x_test[..., 0], parts["t10k"])
    assert data.y_test.tolist() == list(range(10))
    assert data.classes[9] == "Ankle boot"


def test_wrong_idx_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"no train-images-idx3-ubyte or .*\.gz; install Debian's"):
        load_data("fashion-mnist", data_dir=tmp_path)
    _fashion(tmp_path)
    images, labels = tmp_path / "train-images-idx3-ubyte.gz", tmp_path / "train-labels-idx1-ubyte"
    good = gzip.decompress(images.read_bytes())
    for content, words in (
        (gzip.compress(good[:-1]), "needs 15680 bytes, the file has 15679"),
        (gzip.compress(good + b"x"), "the file has more"),
        (gzip.compress(b"\x00\x00\x0d\x03" + good[4:]), "not an IDX file"),
        (gzip.compress(good)[:-40], "damaged"),
        (b"<html>", "damaged"),
        (gzip.compress(good[:4] + b"\xff" * 12), "damaged|needs"),
    ):
        images.write_bytes(content)
        with pytest.raises(DataError, match=words):
            load_data("fashion-mnist", data_dir=tmp_path)
    images.write_bytes(gzip.compress(good))
    for wrong, words in ((np.zeros(19), "20 images but 19 labels"), (np.full(20, 10), "label 10")):
        _idx(tmp_path, labels.name, wrong.astype(np.uint8))
        with pytest.raises(DataError, match=words):
            load_data("fashion-mnist", data_dir=tmp_path)


@pytest.mark.skipif(not FASHION_FOLDER.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_fashion_mnist_itself() -> None:
    data = load_data("fashion-mnist")
    assert data.x_train.shape == (60000, 28, 28, 1)
    assert np.bincount(data.y_test).tolist() == [1000] * 10
    # Figures that are published with the dataset's baselines: mean 0.2860, deviation 0.3530.
    assert data.preprocessing.mean == pytest.approx([0.2860], abs=1e-4)
    assert data.preprocessing.std == pytest.approx([0.3530], abs=1e-4)


# ---- folders


def test_a_folder_of_classes_is_split(tmp_path: Path) -> None:
    for seed, (name, count) in enumerate({"ant": 10, "bee": 5, "cat": 2}.items()):
        _write_images(tmp_path / name, count, seed=seed)
    (tmp_path / ".cache").mkdir()
    (tmp_path / "ant" / "notes.txt").write_text("not an image")
    data = load_data(tmp_path)
    assert data.classes == ("ant", "bee", "cat")
    assert np.bincount(data.y_train).tolist() == [8, 4, 1]
    assert np.bincount(data.y_test).tolist() == [2, 1, 1]
    assert data.x_train.shape[1:] == (4, 6, 3)
    # Every image is there once, with the label of its folder.
    images = np.concatenate([data.x_train, data.x_test])
    labels = np.concatenate([data.y_train, data.y_test])
    found = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    for label, name in enumerate(data.classes):
        for file in (tmp_path / name).glob("*.png"):
            assert found.pop(np.asarray(Image.open(file)).tobytes()) == label
    assert not found
    assert np.array_equal(load_data(tmp_path).x_test, data.x_test)


@pytest.mark.parametrize("held", ["test", "val"])
def test_a_folder_that_is_split_already(tmp_path: Path, held: str) -> None:
    for part, count in (("train", 3), (held, 2)):
        for seed, name in enumerate(("ant", "bee")):
            _write_images(tmp_path / part / name, count, seed=seed)
    data = load_data(tmp_path)
    assert data.classes == ("ant", "bee")
    assert data.y_train.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.y_test.tolist() == [0, 0, 1, 1]
    _write_images(tmp_path / held / "cow", 1)
    with pytest.raises(DataError, match="class 'cow' is in"):
        load_data(tmp_path)


def test_images_of_many_sizes_and_kinds(tmp_path: Path) -> None:
    _write_images(tmp_path / "ant", 3, size=(40, 30))
    _write_images(tmp_path / "bee", 3, size=(9, 17))
    Image.fromarray(np.full((5, 5), 77, np.uint8)).save(tmp_path / "bee" / "gray.png")
    with pytest.raises(DataError, match=r"bee/.*\.png: the image is 17x9, .* is 30x40"):
        load_data(tmp_path)
    data = load_data(tmp_path, size=(8, 12))
    assert data.x_train.shape[1:] == (8, 12, 3)
    images = np.concatenate([data.x_train, data.x_test])
    assert (images == 77).all((1, 2, 3)).sum() == 1  # the gray one, in colour
    for file in (tmp_path / "ant").glob("*.png"):
        oracle = np.asarray(Image.open(file).resize((12, 8), Image.Resampling.BILINEAR), int)
        assert np.abs(images - oracle).max((1, 2, 3)).min() <= 1


def test_turned_photographs_are_set_upright(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        _write_images(tmp_path / name, 2, size=(4, 6))
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[:, 0] = 255  # left column
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "bee" / "photo.png", exif=exif)
    data = load_data(tmp_path)
    upright = np.rot90(pixels, -1)
    assert any(np.array_equal(image, upright) for image in (*data.x_train, *data.x_test))


def test_wrong_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are 0 classes"):
        load_data(tmp_path)
    _write_images(tmp_path / "ant", 3)
    with pytest.raises(DataError, match="there are 1 classes"):
        load_data(tmp_path)
    (tmp_path / "bee").mkdir()
    with pytest.raises(DataError, match="bee: there are no images"):
        load_data(tmp_path)
    broken = tmp_path / "bee" / "b.png"
    good = (tmp_path / "ant" / "000.png").read_bytes()
    for content in (b"", b"<html>", good[:60]):
        broken.write_bytes(content)
        with pytest.raises(DataError, match=r"b\.png: not an image") as caught:
            load_data(tmp_path)
        assert "\n" not in str(caught.value)
    Image.fromarray(np.zeros((4, 6), np.uint16)).save(broken)
    with pytest.raises(DataError, match=r"b\.png: its pixels have more than 8 bits"):
        load_data(tmp_path)


# ---- preprocessing and batches


def _dataset(images: np.ndarray[Any, Any], preprocessing: Preprocessing | None = None) -> Dataset:
    labels = np.arange(len(images))
    channels = images.shape[3]
    preprocessing = preprocessing or Preprocessing(
        images.shape[1:3], (0.0,) * channels, (1 / 255,) * channels
    )
    return Dataset("tiny", ("a",), images, labels, images, labels, preprocessing)


def test_preprocessing_standardizes_and_survives_json(tmp_path: Path) -> None:
    data = load_data(_npz(tmp_path))
    inputs = data.preprocessing(data.x_train)
    assert inputs.shape == (12, 3, 6, 5)
    assert inputs.dtype == torch.float32
    assert inputs.is_contiguous()
    assert inputs.mean((0, 2, 3)).tolist() == pytest.approx([0] * 3, abs=1e-5)
    assert inputs.std((0, 2, 3), correction=0).tolist() == pytest.approx([1] * 3, abs=1e-5)
    plain = msgspec.json.encode(data.preprocessing)
    again = msgspec.json.decode(plain, type=Preprocessing)
    assert again == data.preprocessing
    assert torch.equal(again(data.x_train), inputs)


def test_a_channel_without_contrast_does_not_explode(tmp_path: Path) -> None:
    arrays = _arrays()
    arrays["x_train"][..., 1] = 9
    data = load_data(_npz(tmp_path, **arrays))
    inputs = data.preprocessing(data.x_train)
    assert inputs[:, 1].abs().max() < 1e-4
    assert torch.isfinite(inputs).all()


def test_images_are_brought_to_the_network(tmp_path: Path) -> None:
    path = _npz(tmp_path)
    small, large = load_data(path, size=(3, 4)), load_data(path, size=(12, 10))
    assert small.x_train.shape == (12, 3, 4, 3)  # made smaller once
    assert large.x_train.shape == (12, 6, 5, 3)  # made larger batch by batch
    for data, size in ((small, (3, 4)), (large, (12, 10))):
        assert data.preprocessing.size == size
        inputs, _ = next(data.test_batches(5))
        assert inputs.shape == (5, 3, *size)
        oracle = [
            np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR), int)
            for image in _arrays()["x_test"]
        ]
        found = data.preprocessing.fit(data.x_test).numpy().astype(int)
        assert np.abs(found - np.stack(oracle)).max() <= 1


def test_channels_are_brought_to_the_network(tmp_path: Path) -> None:
    path = _npz(tmp_path)
    gray = load_data(path, channels=1)
    oracle = [np.asarray(Image.fromarray(image).convert("L")) for image in _arrays()["x_train"]]
    assert np.abs(gray.x_train[..., 0].astype(int) - np.stack(oracle)).max() <= 1
    assert len(gray.preprocessing.mean) == 1
    arrays = _arrays(shape=(6, 5))
    colour = load_data(_npz(tmp_path, **arrays), channels=3)
    assert all(np.array_equal(colour.x_train[..., c], arrays["x_train"]) for c in range(3))
    with pytest.raises(DataError, match="3 channels, the network takes 4"):
        load_data(path.with_name(_npz(tmp_path).name), channels=4)


def test_an_epoch_is_every_image_once_and_follows_the_seed() -> None:
    data = _dataset(np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1))

    def epoch(seed: int, batch_size: int = 3) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        batches = list(data.training_batches(batch_size, generator))
        for inputs, labels in batches:
            assert torch.allclose(inputs.flatten(), labels.float())
        return [labels.tolist() for _, labels in batches]

    assert [len(batch) for batch in epoch(0)] == [3, 3, 3]
    assert len({label for batch in epoch(0) for label in batch}) == 9
    assert epoch(0) == epoch(0) != epoch(1)
    assert [len(batch) for batch in epoch(0, 64)] == [10]
    assert [len(batch) for batch in epoch(0, 5)] == [5, 5]
    tested = [labels.tolist() for _, labels in data.test_batches(4)]
    assert tested == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_augmentation_draws_every_crop_and_flip_and_nothing_else() -> None:
    image = np.random.default_rng(0).integers(1, 256, (1, 4, 3, 2), dtype=np.uint8)
    data = _dataset(np.repeat(image, 600, axis=0))
    crop = 1
    padded = np.pad(image[0], ((crop, crop), (crop, crop), (0, 0)))
    allowed = {
        view[:, ::step].tobytes()
        for top in range(3)
        for left in range(3)
        for step in (1, -1)
        for view in [padded[top : top + 4, left : left + 3]]
    }

    def drawn(augmentation: Augmentation, seed: int = 0) -> list[bytes]:
        generator = torch.Generator().manual_seed(seed)
        ((inputs, _),) = data.training_batches(600, generator, augmentation)
        return [one.tobytes() for one in inputs.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()]

    both = Augmentation(crop=crop, flip=True)
    assert set(drawn(both)) == allowed
    assert len(allowed) == 18
    assert drawn(both) == drawn(both) != drawn(both, seed=1)
    mirrored = image[0][:, ::-1].tobytes()
    flips = drawn(Augmentation(flip=True))
    assert set(flips) == {image[0].tobytes(), mirrored}
    assert flips.count(mirrored) == pytest.approx(300, abs=60)
    assert set(drawn(Augmentation())) == {image[0].tobytes()}
