"""Data sets and the cache: what users hold must load, once, and be noticed when it changes."""

import gzip
import hashlib
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import error_of, picture, words
from PIL import Image

import acgan
import dcgan

def load(*argv, module=dcgan):
    return module.load_data(module.get_args(words("--dataset", *argv)))

def test_digits_are_deterministic_and_different():
    images, labels, classes = load("digits --max_images 40")
    again, *_ = load("digits --max_images 40 --data_dir elsewhere")
    assert (images.shape, images.dtype) == ((40, 32, 32, 1), np.uint8)
    np.testing.assert_array_equal(images, again)
    assert (labels.tolist(), classes) == (list(range(10)) * 4, list("0123456789"))
    assert len({image.tobytes() for image in images}) == 40
    assert images.reshape(40, -1).max(1).min() > 150  # something is drawn in each

def test_folder_of_classes_and_zip_are_the_same(folder):
    images, labels, classes = load(folder, "--img_size 16")
    assert (images.shape, classes) == ((24, 16, 16, 3), ["cat", "dog"])
    assert (labels.dtype, labels.tolist()) == (np.int64, [0] * 12 + [1] * 12)
    with zipfile.ZipFile("pets.zip", "w") as z:
        for f in sorted(folder.rglob("*.png")):
            z.write(f, f"wrapped/{f.relative_to(folder)}")
        z.writestr("__MACOSX/wrapped/cat/000.png", b"junk")
        z.writestr("wrapped/readme.txt", b"text")
        z.writestr("wrapped/../../outside.png", (folder / "cat" / "000.png").read_bytes())  # nothing is extracted
    for module in (dcgan, acgan):
        zipped, zip_labels, zip_classes = load("pets.zip --img_size 16", module=module)
        np.testing.assert_array_equal(images, zipped)
        assert (zip_labels.tolist(), zip_classes) == (labels.tolist(), classes)
    images, labels, classes = load(folder / "cat")  # flat
    assert (images.shape, labels.tolist(), classes) == ((12, 64, 64, 3), [-1] * 12, [])

@pytest.mark.parametrize(("flags", "expected"), [
    ("--dataset my_images", (64, 3, False, 24000, 2e-3, 1e-3, "r1")), ("--dataset celeba", (64, 3, True, 24000, 2e-3, 1e-3, "r1")),
    ("--dataset mnist --lr 1 --lr_d 0", (32, 1, False, 6000, 1, 0, "r1")),
    ("--dataset cifar10 --recipe paper", (32, 3, True, 24000, 2e-4, 2e-4, "none")),
    ("--recipe paper --img_size 16 --nc 3 --hflip --lr_g 3 --epochs 2", (16, 3, True, None, 3, 2e-4, "none"))])
def test_recipes(flags, expected):
    """One for all data; the data set's size, channels, flips and length over it; flags over both."""
    args = dcgan.get_args(words(flags))
    assert (args.img_size, args.nc, args.hflip, args.max_steps, args.lr_g, args.lr_d, args.gp) == expected

def test_every_kind_of_picture():
    os.mkdir("mixed")
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
    wide = Image.new("L", (48, 16))  # in three parts: the crop is its middle
    wide.paste(200, (16, 0, 32, 16))
    wide.save("mixed/i.PNG")
    for nc in (1, 3):
        images, *_ = load("mixed --img_size 16 --nc", nc)
        assert images.shape == (9, 16, 16, nc)
        assert images[:5].std((1, 2)).min() > 2
        assert (images[5] == 156).all()  # 16 bits: 40000 / 256
        assert (images[6] == 255).all()  # transparent is white
        assert (images[7][:, 2:14] == 255).all()  # turned upright, centre cropped
        assert (images[8] == 200).all()

def test_unreadable_images_are_named_and_skipped(folder, capfd):
    (folder / "cat" / "000.png").write_bytes(b"no picture")
    (folder / "dog" / "003.png").write_bytes((folder / "dog" / "003.png").read_bytes()[:60])
    images, labels, _ = load(folder, "--img_size 16")
    assert (len(images), labels.tolist()) == (22, [0] * 11 + [1] * 11)
    for _ in range(2):  # at the next start, from the cache, too
        err = capfd.readouterr().err
        assert all(text in err for text in ("left out 2 images", "cat/000.png", "dog/003.png"))
        load(folder, "--img_size 16")

def test_cache_is_used_and_rebuilt(folder, monkeypatch):
    images, *_ = load(folder)
    assert isinstance(images, np.memmap)
    assert len(os.listdir("data/cache")) == 1
    with monkeypatch.context() as patch:
        patch.setattr(dcgan, "decode", None)  # nothing is decoded again
        np.testing.assert_array_equal(load(folder)[0], images)
    picture(999).save(folder / "cat" / "000.png")
    changed, *_ = load(folder)
    assert not np.array_equal(changed[0], images[0])
    np.testing.assert_array_equal(changed[1:], images[1:])
    picture(998).save(folder / "cat" / "new.png")
    assert len(load(folder)[0]) == 25
    some, labels, _ = load(folder, "--max_images 10")
    assert (len(some), set(labels.tolist())) == (10, {0, 1})
    assert len(os.listdir("data/cache")) == 4

def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()

@pytest.mark.parametrize(("name", "folder", "packed"), [("mnist", "MNIST", False), ("fashion_mnist", "FashionMNIST", True)])
def test_mnist_as_downloaded(name, folder, packed, monkeypatch):
    """The files laid out as torchvision's download leaves them: train and t10k, images and labels, in raw/."""
    from torchvision import datasets

    os.makedirs(f"data/{folder}/raw")
    pixels, md5 = np.random.default_rng(0).integers(0, 256, (30, 28, 28), dtype=np.uint8), {}
    for part in ("train", "t10k"):
        for file, array in ((f"{part}-images-idx3-ubyte", pixels),
                            (f"{part}-labels-idx1-ubyte", np.arange(30, dtype=np.uint8) % 10)):
            content = gzip.compress(idx(array)) if packed else idx(array)
            md5[file] = hashlib.md5(content).hexdigest()
            Path(f"data/{folder}/raw/{file}" + ".gz" * packed).write_bytes(content)
    cls = getattr(datasets, folder)
    monkeypatch.setattr(cls, "resources", [(file, md5.get(file.removesuffix(".gz"))) for file, _ in cls.resources])
    images, labels, classes = load(name)
    assert (images.shape, labels.tolist(), len(classes)) == ((30, 32, 32, 1), list(range(10)) * 3, 10)
    assert load(name, "--img_size 16 --nc 3 --max_images 5")[0].shape == (5, 16, 16, 3)

def test_cifar10_as_downloaded(monkeypatch):
    """cifar-10-batches-py/ as its archive unpacks; only the checksums are our own."""
    from torchvision.datasets import CIFAR10

    os.makedirs("data/cifar-10-batches-py")
    rng, md5 = np.random.default_rng(0), {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        content = pickle.dumps({"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [1, 2, 3, 4],
                                "label_names": [f"c{i}" for i in range(10)]})
        md5[name] = hashlib.md5(content).hexdigest()
        Path("data/cifar-10-batches-py", name).write_bytes(content)
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(CIFAR10, part, [[name, md5[name]] for name, _ in getattr(CIFAR10, part)])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5["batches.meta"]})
    images, labels, classes = load("cifar10")
    assert (images.shape, classes[3]) == ((20, 32, 32, 3), "c3")
    assert labels.tolist() == [1, 2, 3, 4] * 5

def lay_out_celeba(folder):
    """CelebA's pictures in a folder, or in the zip of that name."""
    path = Path("data", folder)
    path.with_suffix("").mkdir(parents=True)
    for i in range(3):
        picture(i, (178, 218)).save(path.with_suffix("") / f"{i:06d}.jpg")
    if path.suffix:
        shutil.make_archive(path.with_suffix(""), "zip", path.parent, path.stem)
        shutil.rmtree(path.with_suffix(""))

@pytest.mark.parametrize("layout", ["celeba/img_align_celeba", "img_align_celeba", "CelebA/Img/img_align_celeba.zip",
                                    "archive/img_align_celeba/img_align_celeba"])
def test_celeba_as_people_hold_it(layout):
    lay_out_celeba(layout)
    images, labels, classes = load("celeba")
    assert (images.shape, labels.tolist(), classes) == ((3, 64, 64, 3), [-1, -1, -1], [])

def test_downloads_are_torchvisions(monkeypatch, capfd):
    """With nothing on disk torchvision is asked; where that fails, one line says what to put where."""
    from torchvision import datasets

    def download(root, download):
        lay_out_celeba("celeba/img_align_celeba")
        return type("CelebA", (), {"root": root})

    def no_network(*args, **kwargs):
        raise RuntimeError("Error downloading\nlong story")

    for name, cls, files in (("celeba", "CelebA", "img_align_celeba.zip"), ("mnist", "MNIST", "MNIST/raw"),
                             ("cifar10", "CIFAR10", "cifar-10-python.tar.gz")):
        monkeypatch.setattr(datasets, cls, no_network)
        assert files in error_of(capfd, load, name)
    monkeypatch.setattr(datasets, "CelebA", download)
    assert len(load("celeba")[0]) == 3

def test_pixels_survive_the_round_trip(folder):
    """What Run hands out and to_uint8 takes back are the same pixels."""
    images, labels, _ = load(folder, "--img_size 16")
    run = dcgan.Run(dcgan.get_args(words("--dataset", folder, "--img_size 16 --batch_size 24 --device cpu --max_steps 2")))
    for _, real, told in run.steps(netG_ema=dcgan.Generator(100, 2, 3, 16).eval(), netD=dcgan.Discriminator(3, 2, 16)):
        run.log({"loss": real.mean()})
        assert (real.min() >= -1, real.max() <= 1) == (True, True)
        got = {image.tobytes(): int(label) for image, label in zip(dcgan.to_uint8(real), told)}
        assert got == {image.tobytes(): label for image, label in zip(np.array(images), labels.tolist())}
