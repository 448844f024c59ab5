"""The beton writer against FFCV's own reader and loader."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.beton_writer import BetonWriter, Sample
from pipeline.errors import UserError
from pipeline.ffcv_format import MIN_PAGE as PAGE
from tests.helpers.betons import ffcv_reader


def ramp(height: int, width: int) -> np.ndarray:
    """Pixels [H, W, 3] that encode their position."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x % 256, y % 256, (x + y) % 256], axis=-1).astype(np.uint8)


def jpeg(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def stored(path: Path) -> list[bytes]:
    """The samples' bytes, from FFCV's reader and allocation table."""
    reader, data = ffcv_reader(path), path.read_bytes()
    sizes = dict(zip(reader.alloc_table["ptr"], reader.alloc_table["size"], strict=True))
    pointers = reader.metadata["f0"]["data_ptr"]
    return [data[pointer : pointer + sizes[pointer]] for pointer in pointers]


sizes_near_a_page = st.one_of(
    st.integers(1, 3000),
    st.sampled_from([PAGE // 2, PAGE // 2 + 1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 2 * PAGE + 1]),
)


@settings(max_examples=15)
@given(sizes=st.lists(sizes_near_a_page, min_size=1, max_size=8))
def test_no_sample_crosses_a_page(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int]
) -> None:
    """FFCV's process cache reads page by page, and would return another sample's bytes."""
    path = tmp_path_factory.mktemp("pages") / "a.beton"
    samples = [bytes([i + 1]) * size for i, size in enumerate(sizes)]
    with BetonWriter(path, len(samples), page_size=PAGE) as writer:
        for index, sample in enumerate(samples):
            writer.append([Sample(sample, 1, 1, (index,))])
    reader = ffcv_reader(path)
    page = int(reader.page_size)
    first, last = reader.alloc_table["ptr"], reader.alloc_table["ptr"] + reader.alloc_table["size"]
    assert (first // page == (last - 1) // page).all()
    assert (np.diff(first.astype(np.int64)) > 0).all()
    assert page >= PAGE
    assert page.bit_count() == 1
    assert first[0] >= 24 + 2 * 1041 + reader.metadata.nbytes
    assert stored(path) == samples


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # ffcv's Numba code
@pytest.mark.parametrize("os_cache", [True, False], ids=["os-cache", "process-cache"])
@pytest.mark.parametrize("order", ["SEQUENTIAL", "QUASI_RANDOM"])
def test_plain_ffcv_reads_it(tmp_path: Path, os_cache: bool, order: str) -> None:
    """FFCV must read slotstream's betons with both of its memory managers."""
    loaders = pytest.importorskip("ffcv.loader", reason="needs ffcv")
    from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder

    images = [ramp(40, 56) + np.uint8(7 * i) for i in range(6)]
    path = tmp_path / "a.beton"
    with BetonWriter(path, 6, ("index", "label"), page_size=PAGE) as writer:
        for i, image in enumerate(images):
            writer.append([Sample(jpeg(image) if i % 2 else image, 40, 56, (i, 10 * i))])
    pipelines = {
        "image": [CenterCropRGBImageDecoder((40, 40), 1.0)],
        "index": [IntDecoder()],
        "label": [IntDecoder()],
    }
    loader = loaders.Loader(
        str(path),
        batch_size=2,
        num_workers=1,
        order=loaders.OrderOption[order],
        os_cache=os_cache,
        pipelines=pipelines,
    )
    seen = []
    for batch, index, label in loader:
        for pixels, i, value in zip(batch, index.ravel(), label.ravel(), strict=True):
            crop = images[i] if not i % 2 else np.asarray(Image.open(io.BytesIO(jpeg(images[i]))))
            error = np.abs(pixels.astype(int) - crop[:, 8:48].astype(int))
            assert error.max() <= (4 if i % 2 else 0)  # FFCV decodes with the fast, inexact DCT
            assert value == 10 * i
            seen.append(int(i))
    assert sorted(seen) == list(range(6))


def test_fields_and_metadata(tmp_path: Path) -> None:
    """Swapped height and width, or another order of fields, would crash or shear every image."""
    path = tmp_path / "a.beton"
    stream = jpeg(ramp(16, 24))
    with BetonWriter(path, 2, ("index", "label")) as writer:
        writer.append([Sample(stream, 16, 24, (0, 3)), Sample(ramp(5, 7), 5, 7, (1, 4))])
    reader = ffcv_reader(path)
    assert reader.field_names == ["image", "index", "label"]
    assert reader.metadata["f0"]["mode"].tolist() == [0, 1]
    assert reader.metadata["f0"]["height"].tolist() == [16, 5]
    assert reader.metadata["f0"]["width"].tolist() == [24, 7]
    assert reader.metadata["f1"].tolist() == [0, 1]
    assert reader.metadata["f2"].tolist() == [3, 4]
    assert reader.alloc_table["sample_id"].tolist() == [0, 1]
    assert stored(path) == [stream, ramp(5, 7).tobytes()]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    """A half-written beton with the final name would be used for training."""
    with (
        pytest.raises(RuntimeError, match="stop"),
        BetonWriter(tmp_path / "a.beton", 2) as writer,
    ):
        writer.append([Sample(b"x", 1, 1, (0,))])
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_sample_leaves_nothing(tmp_path: Path) -> None:
    """Otherwise the last metadata entries would be zeros: position 0, which is the header."""
    with (
        pytest.raises(ValueError, match="1 of 2"),
        BetonWriter(tmp_path / "a.beton", 2) as writer,
    ):
        writer.append([Sample(b"x", 1, 1, (0,))])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("image", "height", "width"),
    [(b"", 1, 1), (b"x", 0, 1), (b"x", 1, 65536), (ramp(4, 5), 5, 4), (ramp(4, 5) * 1.0, 4, 5)],
    ids=["empty", "no height", "too wide", "sheared", "float"],
)
def test_what_the_format_cannot_hold(tmp_path: Path, image: bytes, height: int, width: int) -> None:
    """65,536 would be stored as 0, and pixels of a wrong shape would be read beyond their end."""
    with (
        pytest.raises(ValueError, match=r"sides|uint8|fit a page"),
        BetonWriter(tmp_path / "a.beton", 1) as writer,
    ):
        writer.append([Sample(image, height, width, (0,))])


def test_one_write_or_many_give_the_same_file(tmp_path: Path) -> None:
    """Neighbours in the file are written with one call. A call must not cross a page boundary."""
    samples = [Sample(bytes([i]) * (PAGE // 3), 1, 1, (i,)) for i in range(8)]
    for name, step in (("one", 1), ("all", 8)):
        with BetonWriter(tmp_path / name, 8, page_size=PAGE) as writer:
            for start in range(0, 8, step):
                writer.append(samples[start : start + step])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "all").read_bytes()


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    """If a job is started twice by mistake, the samples must not interleave."""
    path = tmp_path / "a.beton"
    with BetonWriter(path, 1) as writer:
        with pytest.raises(UserError, match="another process is writing"), BetonWriter(path, 1):
            pass
        writer.append([Sample(b"x", 1, 1, (0,))])
    assert stored(path) == [b"x"]


@pytest.mark.parametrize("page_size", [1 << 20, 3 << 20, 1 << 32])
def test_page_size_is_checked(tmp_path: Path, page_size: int) -> None:
    """FFCV computes a page by bit shifts: other sizes would read from a wrong position."""
    with pytest.raises(ValueError, match="page_size"):
        BetonWriter(tmp_path / "a.beton", 1, page_size=page_size)
