"""Images become inputs as options or metadata say; torchvision and Pillow are the oracles."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from morphgraph.calibration import ImageOptions, Samples
from morphgraph.calibration.images import stated
from morphgraph.errors import ArgumentError, DataError, ModelError, MorphWarning, UnsupportedError
from morphgraph.recipes.data import Preprocessing
from morphgraph.testing import model_from_text

Array = np.ndarray[Any, Any]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NORMAL = ImageOptions(mean=MEAN, std=STD)


def model_of(shape: str, dtype: str = "float", **metadata: str) -> ir.Model:
    text = f"net ({dtype}[{shape}] x) => ({dtype}[{shape}] y) {{ y = Identity(x) }}"
    model = model_from_text(text, ("x",))
    model.metadata_props.update({name.replace("__", "."): v for name, v in metadata.items()})
    return model


def pictures(count: int = 6, height: int = 30, width: int = 40) -> Array:
    """Smooth colours, so that kinds of interpolation hardly differ."""
    random = np.random.default_rng(0)
    coarse = torch.from_numpy(random.integers(0, 256, (count, 3, 4, 5)).astype(np.float32))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return smooth.clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, (pixels, suffix) in enumerate(
        zip(pictures(), ("png", "bmp", "PNG", "tif", "ppm", "webp"), strict=True)
    ):
        place = tmp_path / "images" / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
        Image.fromarray(pixels).save(place / f"{number}.{suffix}", **options)
    (tmp_path / "images" / "labels.txt").touch()
    (tmp_path / "images" / ".hidden.png").touch()
    return tmp_path / "images"


def test_links_are_followed_once(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "all").symlink_to(folder)
    (folder / "class0" / "up").symlink_to(folder)
    assert Samples.of(tmp_path / "linked", model_of("N,3,30,40"), images=NORMAL).count == 6


ORDER = [0, 2, 4, 1, 3, 5]  # of the files by their paths


def inputs(samples: Samples) -> Array:
    return np.concatenate([feed["x"] for feed in samples.batches(4)])


def expected(*steps: v2.Transform) -> Array:
    """What torchvision makes of the pictures, in the order of their files."""
    transform = v2.Compose([v2.ToImage(), *steps, v2.ToDtype(torch.float32, scale=True)])
    images = [transform(Image.fromarray(pixels)) for pixels in pictures()[ORDER]]
    return torch.stack(images).numpy()


def normalised(images: Array) -> Array:
    mean, std = (np.array(each, np.float32)[:, None, None] for each in (MEAN, STD))
    return (images - mean) / std


@pytest.mark.parametrize(
    ("resize", "steps"),
    [
        ("stretch", [v2.Resize((16, 16))]),
        ("crop", [v2.CenterCrop((30, 30)), v2.Resize((16, 16))]),
        ("pad", [v2.Pad((0, 5), fill=0), v2.Resize((16, 16))]),
    ],
)
def test_images_are_brought_to_the_size_of_the_input(
    resize: Any, steps: list[v2.Transform], folder: Path
) -> None:
    options = ImageOptions(mean=MEAN, std=STD, resize=resize, border=0)
    samples = Samples.of(folder, model_of("N,3,16,16"), images=options)
    found = inputs(samples)
    assert found.dtype == np.float32
    error = np.abs(found - normalised(expected(*steps)))
    edge = 3 if resize == "pad" else 0  # where borders begin, one blends and the other does not
    inner = error[:, :, edge : 16 - edge]
    assert inner.mean() < 0.02
    assert inner.max() < 0.15
    words = {"stretch": "resized", "crop": "resized and cropped", "pad": "resized and padded"}
    assert samples.described == (
        f"6 images of {folder}, {words[resize]} to 16x16, divided by 255, mean 0.485,0.456,0.406, "
        "std 0.229,0.224,0.225, RGB (as given)"
    )


def test_images_of_the_right_size_are_exact(folder: Path) -> None:
    samples = Samples.of(folder, model_of("N,3,30,40"), images=NORMAL)
    np.testing.assert_allclose(inputs(samples), normalised(expected()), atol=1e-6)


def test_channels_may_stand_last_and_in_another_order(folder: Path) -> None:
    options = ImageOptions(channels="BGR", scale=False)
    found = inputs(Samples.of(folder, model_of("N,30,40,3"), images=options))
    np.testing.assert_array_equal(found, pictures()[ORDER][..., ::-1].astype(np.float32))
    # Numbers are in the order in which the network takes the colours.
    options = ImageOptions(channels="BGR", scale=False, mean=(1, 2, 3))
    found = inputs(Samples.of(folder, model_of("N,3,30,40"), images=options))
    wanted = pictures()[ORDER][..., ::-1].astype(np.float32) - np.array([1, 2, 3], np.float32)
    np.testing.assert_array_equal(found, wanted.transpose(0, 3, 1, 2))


def test_gray_networks_get_gray_images(folder: Path) -> None:
    found = inputs(Samples.of(folder, model_of("N,1,30,40"), images=ImageOptions(scale=False)))
    gray = [np.asarray(Image.fromarray(pixels).convert("L")) for pixels in pictures()[ORDER]]
    np.testing.assert_array_equal(found[:, 0], np.stack(gray))


@pytest.mark.parametrize(
    ("mean", "divides"), [(None, True), ((0.5,), True), ((127.5,), False), (MEAN, True)]
)
def test_the_scale_follows_from_the_numbers(
    mean: tuple[float, ...] | None, divides: bool, folder: Path
) -> None:
    options = ImageOptions(mean=mean, channels="RGB")
    found = inputs(Samples.of(folder, model_of("N,3,30,40"), images=options))
    pixels = pictures()[ORDER].astype(np.float32) / (255 if divides else 1)
    wanted = (pixels - np.array(mean or 0, np.float32)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_what_is_assumed_is_said(folder: Path) -> None:
    with pytest.warns(MorphWarning, match=r"images: nothing says what is done to images.*--mean"):
        samples = Samples.of(folder, model_of("N,3,30,40"))
    assert samples.described.endswith("resized to 30x40, divided by 255, RGB (assumed)")
    np.testing.assert_allclose(inputs(samples), expected(), atol=1e-6)


@pytest.mark.parametrize("shape", ["2,3,30,40", "3,30,40", "N,3,H,W"])
def test_images_for_other_batches(shape: str, folder: Path) -> None:
    size = (30, 40) if "H" in shape else None
    options = ImageOptions(size=size, mean=MEAN, std=STD)
    samples = Samples.of(folder, model_of(shape), images=options)
    assert samples.count == 6
    found = np.concatenate([feed["x"].reshape(-1, 3, 30, 40) for feed in samples.batches(4)])
    np.testing.assert_allclose(found, normalised(expected()), atol=1e-6)


@pytest.mark.parametrize(
    "data",
    [
        pictures()[ORDER],
        pictures()[ORDER].transpose(0, 3, 1, 2),
        list(pictures()[ORDER]),
        list(torch.from_numpy(pictures()[ORDER]).permute(0, 3, 1, 2)),
        [(Image.fromarray(pixels), 7) for pixels in pictures()[ORDER]],
        {"x": pictures()[ORDER]},
    ],
)
def test_pixels_in_arrays(data: object, tmp_path: Path) -> None:
    model = model_of("N,3,30,40")
    found = inputs(Samples.of(data, model, images=NORMAL))
    np.testing.assert_allclose(found, normalised(expected()), atol=1e-6)
    with pytest.raises(ModelError, match=r"'x' is uint8 .* if these are pixels, give --mean and"):
        Samples.of(data, model)


def test_pixels_in_files(tmp_path: Path) -> None:
    pixels = pictures()[ORDER]
    np.savez_compressed(tmp_path / "all.npz", x=pixels)
    np.save(tmp_path / "all.npy", pixels)
    (tmp_path / "each").mkdir()
    for number, image in enumerate(pixels):
        np.save(tmp_path / "each" / f"{number}.npy", image)
    for name in ("all.npz", "all.npy", "each"):
        samples = Samples.of(tmp_path / name, model_of("N,3,30,40"), images=NORMAL)
        np.testing.assert_allclose(inputs(samples), normalised(expected()), atol=1e-6)
    some = Samples.of(tmp_path / "all.npz", model_of("N,3,30,40"), limit=3, images=NORMAL)
    assert some.count == 3


def test_networks_that_take_bytes_get_bytes(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MorphWarning)
        found = inputs(Samples.of(folder, model_of("N,30,40,3", "uint8")))
    np.testing.assert_array_equal(found, pictures()[ORDER])
    assert found.dtype == np.uint8
    with pytest.raises(ArgumentError, match="takes pixels as they are; leave out --mean"):
        Samples.of(folder, model_of("N,30,40,3", "uint8"), images=NORMAL)


# ---- what files state


def test_what_morph_records_is_read(folder: Path) -> None:
    record = {"size": [30, 40], "mean": MEAN, "std": STD, "layout": "NCHW"}
    model = model_of("N,3,H,W", morphgraph__preprocessing=json.dumps(record))
    samples = Samples.of(folder, model)
    theirs = Preprocessing((30, 40), MEAN, STD)(pictures()[ORDER]).numpy()
    np.testing.assert_allclose(inputs(samples), theirs, atol=1e-6)
    assert samples.described.endswith("RGB (from the model's metadata)")
    changed = Samples.of(folder, model, images=ImageOptions(channels="BGR"))
    assert changed.described.endswith("BGR (as given, and from the model's metadata)")


@pytest.mark.parametrize(
    ("metadata", "low", "high", "is_bgr"),
    [
        ({"Image__NominalPixelRange": "NominalRange_0_255"}, 0, 255, False),
        ({"image__nominalpixelrange": "Normalized_0_1"}, 0, 1, False),
        (
            {"Image__NominalPixelRange": "normalized_1_1", "Image__BitmapPixelFormat": "Bgr8"},
            -1,
            1,
            True,
        ),
        ({"Image__NominalPixelRange": "NominalRange_16_235"}, 16, 235, False),
        ({"author": "Ultralytics", "imgsz": "[30, 40]", "task": "detect"}, 0, 1, False),
        ({"author": "Ultralytics", "imgsz": "[30, 40]", "task": "classify"}, 0, 1, False),
    ],
)
def test_keys_that_others_write(
    metadata: dict[str, str], low: float, high: float, is_bgr: bool, folder: Path
) -> None:
    found = inputs(Samples.of(folder, model_of("N,3,30,40", **metadata)))
    pixels = pictures()[ORDER].astype(np.float64)
    wanted = low + (high - low) * (pixels[..., ::-1] if is_bgr else pixels) / 255
    np.testing.assert_allclose(found, wanted.transpose(0, 3, 1, 2), atol=1e-4)


def test_ultralytics_pads_and_states_the_size(folder: Path) -> None:
    metadata = {"author": "Ultralytics", "imgsz": "[40, 40]", "task": "detect"}
    found = inputs(Samples.of(folder, model_of("N,3,H,W", **metadata)))
    np.testing.assert_allclose(found[:, :, 5:35], expected(), atol=1e-6)
    np.testing.assert_allclose(found[:, :, :5], 114 / 255, atol=1e-6)


def test_the_size_of_the_input_counts_more_than_the_stated_one(folder: Path) -> None:
    record = {"size": [8, 8], "mean": MEAN, "std": STD}
    model = model_of("N,3,30,40", morphgraph__preprocessing=json.dumps(record))
    np.testing.assert_allclose(inputs(Samples.of(folder, model)), normalised(expected()), atol=1e-6)


def test_numbers_of_the_user_replace_the_scale_that_is_stated(folder: Path) -> None:
    model = model_of("N,3,30,40", Image__NominalPixelRange="NominalRange_0_255")
    found = inputs(Samples.of(folder, model, images=NORMAL))
    np.testing.assert_allclose(found, normalised(expected()), atol=1e-6)


@pytest.mark.parametrize("text", ["[]", "{", '{"size": 3}', '{"size": [2, 2], "mean": 1}'])
def test_a_damaged_record(text: str) -> None:
    model = model_of("N,3,8,8", morphgraph__preprocessing=text)
    if text == "[]":
        assert not stated(model)
        return
    with pytest.raises(DataError, match=r"'morphgraph.preprocessing' cannot be read"):
        stated(model)


# ---- what is refused


@pytest.mark.parametrize(
    ("shape", "options", "error", "message"),
    [
        ("N,3,H,W", NORMAL, ArgumentError, "leaves height and width open; say with --size HxW"),
        ("N,C,H,W", NORMAL, ArgumentError, "does not say where the channels stand.*--layout"),
        ("N,4,8,8", NORMAL, UnsupportedError, "has 4 channels, images have 1 or 3"),
        ("N,8", NORMAL, UnsupportedError, "images do not fit input 'x'"),
        ("N,3,8,8", ImageOptions(size=(9, 9)), ArgumentError, r"--size 9x9: the model takes 'x'"),
        ("N,3,8,8", ImageOptions(mean=(1, 2)), ArgumentError, "--mean 1,2: .* 3 channels"),
        ("N,3,8,8", ImageOptions(std=(0,)), ArgumentError, "--std 0: give numbers above 0"),
    ],
)
def test_options_that_do_not_fit(
    shape: str, options: ImageOptions, error: type[Exception], message: str, folder: Path
) -> None:
    with pytest.raises(error, match=message):
        Samples.of(folder, model_of(shape), images=options)


def test_a_layout_for_open_axes(folder: Path) -> None:
    options = ImageOptions(mean=MEAN, std=STD, layout="NHWC", size=(30, 40))
    found = inputs(Samples.of(folder, model_of("N,H,W,C"), images=options))
    np.testing.assert_allclose(found.transpose(0, 3, 1, 2), normalised(expected()), atol=1e-6)


def test_images_that_cannot_be_read(folder: Path) -> None:
    model = model_of("N,3,30,40")
    for number in range(6):
        (folder / f"copy{number}").mkdir()
        for file in (folder / "class0").iterdir():
            (folder / f"copy{number}" / file.name).write_bytes(file.read_bytes())
    (folder / "class1" / "broken.png").write_bytes(b"no image")
    with pytest.warns(MorphWarning, match=r"broken\.png: not an image.*1 such images of 25 are"):
        samples = Samples.of(folder, model, images=NORMAL)
    assert samples.count == 24
    for number in range(6):
        (folder / "class1" / f"cut{number}.png").write_bytes(
            (folder / "class0" / "0.png").read_bytes()[:300]
        )
    with pytest.raises(DataError, match=r"7 of 31 images cannot be read: .*broken\.png"):
        Samples.of(folder, model, images=NORMAL)


def test_a_network_with_a_second_input(folder: Path) -> None:
    text = "net (float[N,3,8,8] x, float[N,2] z) => (float[N,3,8,8] y) { y = Relu(x) }"
    model = model_from_text(text, ("x", "z"))
    with pytest.raises(ModelError, match=r"one input, but the model takes 2: 'x', 'z'; give an"):
        Samples.of(folder, model, images=NORMAL)
    given = {"x": pictures(4, 8, 8), "z": np.ones((4, 2))}
    (feed,) = Samples.of(given, model, images=NORMAL).batches(4)
    assert feed["x"].shape == (4, 3, 8, 8)
    assert feed["x"].min() < 0


def test_a_limit_decodes_no_more(folder: Path) -> None:
    told: list[tuple[str, int, int]] = []
    samples = Samples.of(
        folder,
        model_of("N,3,30,40"),
        limit=3,
        images=NORMAL,
        progress=lambda *state: told.append(state),
    )
    assert samples.count == 3
    assert told == [("reading images", done, 3) for done in (1, 2, 3)]
