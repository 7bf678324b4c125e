"""Data sets and the cache: what users hold must load, once, and be noticed when it changes."""

import gzip
import hashlib
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import error_of, picture
from PIL import Image

import dcgan


def load(dataset, *argv, module=dcgan):
    args = module.get_args(["--dataset", str(dataset), "--workers", "0", *map(str, argv)])
    return (*module.load_data(args, quiet=True), args)


def test_digits_are_deterministic_and_different():
    images, labels, classes, _args = load("digits", "--max_images", 40)
    again, *_ = load("digits", "--max_images", 40, "--data_dir", "elsewhere")
    assert images.shape == (40, 32, 32, 1)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, again)
    assert labels.tolist() == list(range(10)) * 4
    assert classes == [str(d) for d in range(10)]
    assert len({image.tobytes() for image in images}) == 40
    assert images.reshape(40, -1).max(1).min() > 150  # something is drawn in each
    assert len(load("digits", "--max_images", 20, "--img_size", 16)[0]) == 20
    assert dcgan.find_source(dcgan.get_args([])).items == list(range(20000))


def test_folder_of_classes_and_zip_are_the_same(folder, tmp_path):
    images, labels, classes, args = load(folder, "--img_size", 16)
    assert images.shape == (24, 16, 16, 3)
    assert classes == ["cat", "dog"]
    assert labels.tolist() == [0] * 12 + [1] * 12
    assert args.hflip is False
    with zipfile.ZipFile("pets.zip", "w") as z:
        for f in sorted(folder.rglob("*.png")):
            z.write(f, f"wrapped/{f.relative_to(folder)}")
        z.writestr("__MACOSX/wrapped/cat/._000.png", b"junk")
        z.writestr("wrapped/readme.txt", b"text")
    zipped, zip_labels, zip_classes, _ = load("pets.zip", "--img_size", 16)
    np.testing.assert_array_equal(images, zipped)
    assert (zip_labels.tolist(), zip_classes) == (labels.tolist(), classes)


def test_flat_folder_has_no_labels(folder):
    images, labels, classes, args = load(folder / "cat")
    assert (len(images), labels, classes) == (12, None, [])
    assert (args.img_size, args.nc) == (16, 3)  # a power of two that 20x20 fills


def test_every_kind_of_picture(tmp_path):
    (tmp_path / "mixed").mkdir()
    picture(0, (40, 20)).save("mixed/a.jpg")
    picture(1, (17, 90), "L").save("mixed/b.bmp")
    picture(2, (300, 200), "P").save("mixed/c.gif")
    picture(3, mode="CMYK").save("mixed/d.tiff")
    picture(4).save("mixed/e.webp")
    Image.fromarray(np.full((20, 20), 40000, np.uint16)).save("mixed/f.png")
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save("mixed/g.png")
    sideways = Image.new("RGB", (20, 40))
    sideways.paste((255, 255, 255), (0, 10, 20, 30))
    sideways.getexif()[0x0112] = 6
    sideways.save("mixed/h.png", exif=sideways.getexif())
    for nc in (1, 3):
        images, *_ = load("mixed", "--img_size", 16, "--nc", nc)
        assert images.shape == (8, 16, 16, nc)
        assert (images[5] == 156).all()  # 16 bits: 40000 / 256
        assert (images[6] == 255).all()  # transparent is white
        assert (images[7][:, 2:14] == 255).all()  # turned upright, centre cropped


def test_resize_and_centre_crop():
    """A 48x16 picture in three parts: the crop is its middle."""
    img = Image.new("L", (48, 16))
    img.paste(200, (16, 0, 32, 16))
    os.mkdir("wide")
    img.save("wide/a.png")
    assert (load("wide", "--img_size", 16)[0] == 200).all()


def test_default_size_and_channels_follow_the_folder(tmp_path):
    for i in range(3):
        os.makedirs("grey", exist_ok=True)
        picture(i, (100, 70), "L").save(f"grey/{i}.png")
    *_, args = load("grey")
    assert (args.img_size, args.nc) == (64, 1)


def test_unreadable_images_are_named_and_skipped(folder, capfd):
    (folder / "cat" / "000.png").write_bytes(b"no picture")
    whole = (folder / "dog" / "003.png").read_bytes()
    (folder / "dog" / "003.png").write_bytes(whole[:60])
    images, labels, *_ = load(folder, "--img_size", 16)
    assert len(images) == len(labels) == 22
    assert labels.tolist() == [0] * 11 + [1] * 11
    err = capfd.readouterr().err
    assert "skipped 2 unreadable images" in err
    assert "cat/000.png" in err
    assert "dog/003.png" in err


def test_max_images_is_a_subset_of_all_classes(folder):
    images, labels, *_ = load(folder, "--max_images", 10)
    assert len(images) == 10
    assert set(labels.tolist()) == {0, 1}


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(workers):
    images, _labels, *_ = load("digits", "--max_images", 1500, "--img_size", 16, "--workers", workers)
    assert len(images) == 1500
    np.testing.assert_array_equal(
        images[1300, :, :, 0], np.asarray(dcgan.draw_digit(1300, 16).resize((16, 16), Image.Resampling.BICUBIC))
    )


def caches(folder="data/cache"):
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def test_cache_is_used_and_rebuilt(folder, monkeypatch, capfd):
    images, *_ = load(folder)
    assert isinstance(images, np.memmap)
    (name,) = caches()
    before = os.stat(f"data/cache/{name}").st_ino
    load(folder)
    assert os.stat(f"data/cache/{name}").st_ino == before  # nothing decoded again
    picture(999).save(folder / "cat" / "000.png")
    changed, *_ = load(folder)
    assert os.stat(f"data/cache/{name}").st_ino != before
    assert not np.array_equal(changed[0], images[0])
    picture(998).save(folder / "cat" / "new.png")
    assert len(load(folder)[0]) == 25
    assert caches() == [name]


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "tail"])
def test_damaged_cache_is_rebuilt(folder, damage):
    images = np.array(load(folder)[0])
    (name,) = caches()
    file = f"data/cache/{name}"
    content = bytearray(Path(file).read_bytes())
    if damage == "flip":
        content[1000] ^= 1
    elif damage == "tail":
        content[-1] ^= 0x7F
    Path(file).write_bytes(content[: {"truncate": 5000, "empty": 0}.get(damage, len(content))])
    np.testing.assert_array_equal(load(folder)[0], images)


def test_read_only_place(folder, monkeypatch, tmp_path):
    """Then the cache goes to the folder for temporary files, and with that read-only too, into memory."""
    monkeypatch.setattr(dcgan.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "data").mkdir(mode=0o555)
    images, *_ = load(folder)
    assert isinstance(images, np.memmap)
    assert not caches()
    expected = np.array(images)
    for root, dirs, files in os.walk(tmp_path / "tmp", topdown=False):
        [os.remove(os.path.join(root, f)) for f in files]
        [os.rmdir(os.path.join(root, d)) for d in dirs]
    (tmp_path / "tmp").chmod(0o555)
    images, labels, *_ = load(folder)
    assert not isinstance(images, np.memmap)
    np.testing.assert_array_equal(images, expected)
    assert labels.tolist() == [0] * 12 + [1] * 12
    assert not os.listdir(tmp_path / "tmp")


def test_cache_is_not_held_in_memory():
    """20,000 pictures of 64x64 RGB: 246 MB on disk, mapped and not read."""
    shape = [20000, 64, 64, 3]
    meta = {"key": "k", "shape": shape, "crc": 0, "skipped": []}
    with open("big.cache", "wb") as f:
        f.truncate(int(np.prod(shape)))
        f.seek(0, os.SEEK_END)
        crc = 0
        for _ in range(0, shape[0], 500):
            crc = dcgan.zlib.crc32(bytes(500 * 64 * 64 * 3), crc)
        text = dcgan.json.dumps(meta | {"crc": crc}).encode()
        f.write(text + len(text).to_bytes(8, "little"))

    def anonymous():
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) for line in f if line.startswith("RssAnon"))

    before = anonymous()
    images, _ = dcgan.open_cache("big.cache", "k")
    assert images[[5, 19999]].shape == (2, 64, 64, 3)
    assert anonymous() - before < 50_000  # kB


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
@pytest.mark.parametrize("packed", [False, True])
def test_mnist_as_downloaded(name, folder, packed, monkeypatch):
    """The files laid out as torchvision's download leaves them: train and t10k, images and labels, in raw/."""
    from torchvision import datasets

    rng = np.random.default_rng(0)
    os.makedirs(f"data/{folder}/raw")
    pixels = rng.integers(0, 256, (30, 28, 28), dtype=np.uint8)
    md5 = {}
    for part in ("train", "t10k"):
        for file, array in (
            (f"{part}-images-idx3-ubyte", pixels),
            (f"{part}-labels-idx1-ubyte", np.arange(30, dtype=np.uint8) % 10),
        ):
            content = gzip.compress(idx(array)) if packed else idx(array)
            md5[file] = hashlib.md5(content).hexdigest()
            with open(f"data/{folder}/raw/{file}" + ".gz" * packed, "wb") as f:
                f.write(content)
    cls = getattr(datasets, folder)
    monkeypatch.setattr(cls, "resources", [(file, md5.get(file.removesuffix(".gz"))) for file, _ in cls.resources])
    images, labels, classes, args = load(name)
    assert images.shape == (30, 32, 32, 1)
    assert labels.tolist() == [i % 10 for i in range(30)]
    assert len(classes) == 10
    assert args.hflip is False
    small, *_ = load(name, "--img_size", 32, "--nc", 3, "--max_images", 5)
    assert small.shape == (5, 32, 32, 3)


def test_cifar10_as_downloaded(monkeypatch):
    """cifar-10-batches-py/ as its archive unpacks; only the checksums are our own."""
    from torchvision import datasets

    os.makedirs("data/cifar-10-batches-py")
    rng, md5 = np.random.default_rng(0), {}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]:
        content = pickle.dumps(
            {"label_names": [f"c{i}" for i in range(10)]}
            if "meta" in name
            else {"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [1, 2, 3, 4]}
        )
        md5[name] = hashlib.md5(content).hexdigest()
        with open(f"data/cifar-10-batches-py/{name}", "wb") as f:
            f.write(content)
    cls = datasets.CIFAR10
    monkeypatch.setattr(cls, "train_list", [[n, md5[n]] for n, _ in cls.train_list])
    monkeypatch.setattr(cls, "test_list", [[n, md5[n]] for n, _ in cls.test_list])
    monkeypatch.setattr(cls, "meta", cls.meta | {"md5": md5["batches.meta"]})
    images, _labels, classes, args = load("cifar10")
    assert images.shape == (20, 32, 32, 3)
    assert classes[3] == "c3"
    assert args.hflip is True


ATTRIBUTES = {"000001.jpg": (1, -1), "000002.jpg": (-1, -1), "000003.jpg": (1, 1)}


def lay_out_celeba(layout, attr="txt"):
    """What people hold of CelebA: torchvision's folders, a bare folder, the zip, Kaggle's doubled folder with .csv."""
    folder = {
        "torchvision": "data/celeba/img_align_celeba",
        "bare": "data/img_align_celeba",
        "zip": "data",
        "deep zip": "data/CelebA/Img",
        "kaggle": "data/archive/img_align_celeba/img_align_celeba",
    }[layout]
    os.makedirs(folder)
    for i, name in enumerate(ATTRIBUTES):
        picture(i, (178, 218)).save(name)
    if "zip" in layout:
        with zipfile.ZipFile(f"{folder}/img_align_celeba.zip", "w") as z:
            for name in ATTRIBUTES:
                z.write(name, f"img_align_celeba/{name}")
    for name in ATTRIBUTES:
        os.remove(name) if "zip" in layout else os.rename(name, f"{folder}/{name}")
    if attr == "txt":
        rows = [f"{name} {a: d} {b: d}" for name, (a, b) in ATTRIBUTES.items()]
        text = "\n".join([str(len(rows)), "Smiling Male", *rows]) + "\n"
    else:
        rows = [f"{name},{a},{b}" for name, (a, b) in ATTRIBUTES.items()]
        text = "\n".join(["image_id,Smiling,Male", *rows])
    with open(f"{folder.split('/img_align')[0]}/list_attr_celeba.{attr}", "w") as f:
        f.write(text)


@pytest.mark.parametrize("layout", ["torchvision", "bare", "zip", "deep zip", "kaggle"])
def test_celeba_as_people_hold_it(layout):
    import acgan

    lay_out_celeba(layout, "csv" if layout == "kaggle" else "txt")
    images, labels, classes, args = load("celeba")
    assert images.shape == (3, 64, 64, 3)
    assert (labels, classes, args.hflip) == (None, [], True)
    _, labels, classes, _ = load("celeba", "--attr", "Smiling", module=acgan)
    assert (labels.tolist(), classes) == ([1, 0, 1], ["not Smiling", "Smiling"])
    _, labels, classes, _ = load("celeba", "--attr", "Smiling", "Male", module=acgan)
    assert labels.tolist() == [1, 0, 3]
    assert classes == ["not Smiling + not Male", "Smiling + not Male", "not Smiling + Male", "Smiling + Male"]


def test_celeba_download_is_torchvisions(monkeypatch):
    """With nothing on disk torchvision is asked, and what it lays down is found."""
    from torchvision import datasets

    def download(root, split, download):
        assert (str(root), split, download) == ("./data", "all", True)
        lay_out_celeba("torchvision")

    monkeypatch.setattr(datasets, "CelebA", download)
    assert len(load("celeba")[0]) == 3


def test_failed_downloads_say_what_to_put_where(monkeypatch, capfd):
    from torchvision import datasets

    def no_network(*args, **kwargs):
        raise RuntimeError("Error downloading\nlong story")

    for name in ("CelebA", "MNIST", "FashionMNIST", "CIFAR10"):
        monkeypatch.setattr(datasets, name, no_network)
    no_network.__name__ = "MNIST"
    message = error_of(capfd, load, "celeba")
    assert "img_align_celeba.zip" in message
    assert "put it into ./data" in message
    assert "MNIST/raw/" in error_of(capfd, load, "mnist")
    assert "cifar-10-python.tar.gz" in error_of(capfd, load, "cifar10")


def test_pixels_survive_the_round_trip():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    np.testing.assert_array_equal(dcgan.to_uint8(dcgan.to_float(torch.from_numpy(pixels), torch.device("cpu"))), pixels)


def test_real_mnist(data_dir):
    images, labels, _classes, _ = load("mnist", "--data_dir", data_dir, "--max_images", 500)
    assert images.shape == (500, 32, 32, 1)
    assert set(labels.tolist()) == set(range(10))
    assert not (data_dir / "cache").exists()  # read-only: nothing is written there
    assert 20 < images.mean() < 40


def test_real_cifar10_zip(data_dir):
    images, labels, classes, _args = load(data_dir / "cifar10_train.zip", "--max_images", 300)
    assert images.shape == (300, 32, 32, 3)
    assert len(classes) == 10
    assert set(labels.tolist()) == set(range(10))


def test_attributes_share_the_cache_and_are_read_anew():
    import acgan

    lay_out_celeba("bare")
    load("celeba")
    load("celeba", "--attr", "Male", module=acgan)
    assert len(caches()) == 1
    table = Path("data/list_attr_celeba.txt")
    table.write_text(table.read_text().replace("000001.jpg  1", "000001.jpg -1"))
    assert load("celeba", "--attr", "Smiling", module=acgan)[1].tolist() == [0, 0, 1]


def test_small_pictures_get_the_nearest_size(tmp_path):
    (tmp_path / "small").mkdir()
    picture(0, (28, 28)).save("small/a.png")
    assert load("small")[-1].img_size == 32


def test_absolute_names_in_a_zip():
    with zipfile.ZipFile("odd.zip", "w") as z:
        for k, name in enumerate(("/x/cat/a.png", "x/dog/../../../b.png", "x/dog/c.png")):
            picture(k).save("p.png")
            z.writestr(zipfile.ZipInfo(name), Path("p.png").read_bytes())
    before = set(os.listdir())
    images, _, classes, _ = load("odd.zip")
    assert (len(images), classes) == (2, ["cat", "dog"])  # ".." is no folder of pictures
    assert set(os.listdir()) - before == {"data"}  # nothing is extracted
