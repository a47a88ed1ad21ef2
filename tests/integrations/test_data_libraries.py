"""pandas, Arrow, zarr and datasets on the file systems of fsspec."""

import datasets
import fsspec
import numpy as np
import pandas
import pyarrow.parquet
import pytest
import zarr

from tests import serving


@pytest.fixture(params=["dmabuf+file", "dmabuf"])
def place(request, tmp_path, tmp_path_factory):
    """A URL of a folder, and the options of its file system."""
    if request.param == "dmabuf+file":
        yield f"dmabuf+file://{tmp_path}", {"auto_mkdir": True}
        return
    socket = tmp_path_factory.mktemp("store") / "sock"
    with serving.in_a_thread(socket, 256 << 20):
        yield "dmabuf://folder", {"socket": str(socket)}


def a_table(rows=20_000):
    chance = np.random.default_rng(1)
    return pandas.DataFrame(
        {
            "number": chance.integers(0, 1 << 60, rows),
            "float": chance.random(rows),
            "text": [f"row {row}" for row in range(rows)],
        }
    )


@pytest.mark.parametrize("form", ["csv", "parquet", "feather"])
def test_pandas(place, form):
    url, options = place
    table = a_table()
    how = {"index": False} if form == "csv" else {}
    getattr(table, f"to_{form}")(f"{url}/table.{form}", storage_options=dict(options), **how)
    got = getattr(pandas, f"read_{form}")(f"{url}/table.{form}", storage_options=options)
    pandas.testing.assert_frame_equal(got, table)


def test_arrow_reads_some_columns_of_a_parquet_file(place):
    url, options = place
    a_table().to_parquet(f"{url}/table.parquet", storage_options=dict(options), row_group_size=1000)
    fs, path = fsspec.url_to_fs(f"{url}/table.parquet", **options)
    got = pyarrow.parquet.read_table(
        path, filesystem=fs, columns=["float"], filters=[("number", ">", 0)]
    )
    assert got.column_names == ["float"]
    assert np.array_equal(got["float"].to_numpy(), a_table()["float"].to_numpy())


def test_zarr(place):
    url, options = place
    values = np.random.default_rng(2).random((1000, 300), np.float32)
    group = zarr.open_group(f"{url}/group.zarr", mode="w", storage_options=options)
    array = group.create_array("values", shape=values.shape, chunks=(100, 100), dtype="f4")
    array[:] = values
    again = zarr.open_group(f"{url}/group.zarr", mode="r", storage_options=options)
    assert list(again.array_keys()) == ["values"]
    assert np.array_equal(again["values"][:], values)
    assert np.array_equal(again["values"][137:412, 55:], values[137:412, 55:])


def test_datasets(place, tmp_path_factory):
    datasets.disable_progress_bars()
    url, options = place
    table = a_table()
    table.to_parquet(f"{url}/data/part-0.parquet", storage_options=options)
    got = datasets.load_dataset(
        "parquet",
        data_files=f"{url}/data/*.parquet",
        storage_options=dict(options),
        cache_dir=str(tmp_path_factory.mktemp("cache")),
        split="train",
    )
    assert got.num_rows == len(table)
    assert got.to_pandas().equals(table)
    stream = datasets.load_dataset(
        "parquet",
        data_files=f"{url}/data/*.parquet",
        storage_options=dict(options),
        streaming=True,
        split="train",
    )
    assert [row["number"] for row in stream] == table["number"].tolist()
