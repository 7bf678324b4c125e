"""Data sets and the cache: what users hold loads, once; what changes is noticed; what is left out is said."""

import gzip
import hashlib
import os
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from conftest import POSIX, error_of, fill, picture, resume, train, words
from PIL import Image, TiffImagePlugin

import acgan
import dcgan

def load(*argv, script=dcgan, **kwargs):
    """(images, labels, classes), as a run gets them, at 16x16 unless a size is typed."""
    images, labels, classes = script.load_data(script.get_args(words("--img_size 16 --dataset", *argv)), **kwargs)
    return images.numpy(), labels.tolist(), classes

# -------------------------------------------------------------------------------------- data sets

def test_digits():
    images, labels, classes = load("digits --max_images 40")
    again, *_ = load("digits --max_images 40 --data_dir elsewhere")
    np.testing.assert_array_equal(images, again)
    assert (images.shape, labels, classes) == ((40, 16, 16, 1), list(range(10)) * 4, list("0123456789"))
    assert len({image.tobytes() for image in images}) == 40
    assert images.reshape(40, -1).max(1).min() > 100  # something is drawn in each

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
    images, labels, classes = load(name, "--img_size 32")
    assert (images.shape, labels, len(classes)) == ((30, 32, 32, 1), list(range(10)) * 3, 10)
    assert load(name, "--nc 3 --max_images 5")[0].shape == (5, 16, 16, 3)

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
    assert (images.shape, classes[3], labels) == ((20, 16, 16, 3), "c3", [1, 2, 3, 4] * 5)

@POSIX
@pytest.mark.parametrize("layout", ["celeba/img_align_celeba", "img_align_celeba", "a/img_align_celeba/img_align_celeba", "link"])
def test_celeba_as_people_hold_it(layout):
    if layout == "link":
        fill("elsewhere/img_align_celeba", 3)
        os.mkdir("data")
        os.symlink(Path("elsewhere").resolve(), "data/celeba")
    else:
        fill(f"data/{layout}", 3)
    assert load("celeba")[0].shape == (3, 16, 16, 3)

def test_downloads_are_torchvisions(monkeypatch, capfd):
    """With nothing on disk torchvision is asked; where that fails, or in several processes, one line says what to do."""
    from torchvision import datasets

    for name, cls, said in (("mnist", "MNIST", "no way"), ("celeba", "CelebA", "img_align_celeba")):
        failing = pytest.MonkeyPatch()
        failing.setattr(datasets, cls, lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("no way\nthere")))
        assert said in error_of(capfd, "dcgan", "--dataset", name)
        failing.undo()
    asked = []
    monkeypatch.setattr(datasets, "CelebA", lambda root, download: asked.append(download) or fill("data/celeba/img_align_celeba", 3))
    assert len(load("celeba")[0]) == 3
    assert asked == [True]
    shutil.rmtree("data")
    monkeypatch.setattr(dcgan, "WORLD_SIZE", 2)
    load("celeba")
    assert asked == [True, False]

def test_real_mnist_trains(script, data_dir):
    os.mkdir("data")
    os.symlink(data_dir / "MNIST", "data/MNIST")  # the cache is written beside it
    flags = "--dataset mnist --max_images 512 --img_size 32 --ngf 16 --ndf 16 --epochs 2 --batch_size 64 --gp_weight 0"
    ckpt = train(script, flags)
    assert (ckpt["step"], ckpt["config"]["nc"], len(ckpt["classes"])) == (16, 1, 10)

# ---------------------------------------------------------------------------------------- folders

def test_every_kind_of_picture():
    os.mkdir("mixed")
    picture(0, (40, 20)).save("mixed/a.jpg")
    picture(1, (17, 90), "L").save("mixed/b.bmp")
    picture(2, (300, 200), "P").save("mixed/c.gif")
    picture(3, mode="CMYK").save("mixed/d.tiff")
    picture(4).save("mixed/e.webp")
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save("mixed/f.png")
    wide = Image.new("L", (48, 16))  # in three parts: the crop is its middle
    wide.paste(200, (16, 0, 32, 16))
    wide.save("mixed/g.PNG")
    for nc in (1, 3):
        images, *_ = load("mixed --nc", nc)
        assert images.shape == (7, 16, 16, nc)
        assert images[:5].std((1, 2)).min() > 2
        assert (images[5] == 255).all()  # transparent is white
        assert (images[6] == 200).all()

@pytest.mark.parametrize("damage", ["none", "rational", "garbage"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_a_picture_also_where_other_entries_are_damaged(orientation, damage):
    """The white corner of an upright picture is at its upper left."""
    os.mkdir("photos")
    upright = np.zeros((32, 32, 3), np.uint8)
    upright[:16, :16] = 255
    stored = [upright, upright[:, ::-1], upright[::-1, ::-1], upright[::-1], upright.transpose(1, 0, 2),
              np.rot90(upright), np.rot90(upright, 2).transpose(1, 0, 2), np.rot90(upright, -1)][orientation - 1]
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = orientation, TiffImagePlugin.IFDRational(72, 1)  # and XResolution
    data = bytearray(exif.tobytes())
    if damage == "rational":  # the type of XResolution becomes text
        order = "<H" if b"II" in data else ">H"
        at = data.index(struct.pack(order, 0x011A), 6)
        data[at + 2:at + 4] = struct.pack(order, 2)
    if damage == "garbage":
        data = bytearray(b"Exif\0\0nothing of the kind")
    Image.fromarray(np.ascontiguousarray(stored)).save("photos/a.jpg", exif=bytes(data), quality=95)
    if damage == "garbage" and orientation > 1:
        return  # nothing tells how it is to be turned; that it is taken was seen with 1
    image = load("photos --nc 1")[0][0, :, :, 0]
    assert image[:7, :7].min() > 240
    assert max(image[9:].max(), image[:, 9:].max()) < 15

def test_a_class_is_the_folder_that_a_picture_lies_in(pets, capfd):
    """Also where train and test lie above. acgan.py leaves out what is in none, and says so."""
    for part in ("train", "test"):
        shutil.copytree(pets, f"split/{part}")
    assert load("split", script=acgan, labelled=True)[1:] == ([0] * 12 + [1] * 12 + [0] * 12 + [1] * 12, ["cat", "dog"])
    assert load("pets/cat")[1:] == ([-1] * 12, [])
    picture(7).save("pets/preview.jpg")
    assert len(load("pets")[0]) == 25
    capfd.readouterr()
    images, labels, classes = load("pets", script=acgan, labelled=True)
    assert (len(images), set(labels), classes) == (24, {0, 1}, ["cat", "dog"])
    assert "left out 1: 1 in no class's folder (preview.jpg)" in capfd.readouterr().err
    assert "no classes" in error_of(capfd, "acgan", "--dataset pets/cat")

@POSIX
def test_folders_behind_links(pets):
    """Classes that are links, only links, and a link in circles."""
    os.makedirs("d")
    shutil.copytree("pets/cat", "d/cat")
    os.symlink(Path("pets/dog").resolve(), "d/dog")
    os.symlink(Path("d").resolve(), "d/cat/round")
    images, labels, classes = load("d")
    assert (len(images), labels, classes) == (24, [0] * 12 + [1] * 12, ["cat", "dog"])
    os.makedirs("links/only")
    for file in Path("pets/cat").resolve().iterdir():
        os.symlink(file, f"links/only/{file.name}")
    assert len(load("links")[0]) == 12

@POSIX
def test_what_is_left_out_is_counted_with_reasons(pets, capfd, monkeypatch):
    """Damaged, deep, no images, links to nothing, folders that may not be entered, pages; at each start."""
    for k, data in enumerate((b"no picture", Path("pets/cat/000.png").read_bytes()[:60])):
        Path(f"pets/cat/{k:03d}.png").write_bytes(data)
    Image.fromarray(np.full((20, 20), 40000, np.uint16)).save("pets/cat/deep.png")
    Path("pets/dog/notes.txt").touch()
    os.symlink("nothing", "pets/dog/gone.png")
    fill("pets/closed", 1)
    pages = [picture(i) for i in range(12)]
    pages[0].save("pets/dog/scan.tif", save_all=True, append_images=pages[1:])
    pages[0].save("pets/dog/telephone.mpo", "MPO", save_all=True, append_images=pages[1:2])
    os.rename("pets/dog/telephone.mpo", "pets/dog/telephone.jpg")
    scandir = os.scandir

    def forbidden(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    for _ in range(2):
        assert len(load("pets")[0]) == 24 - 2 + 2
        said = capfd.readouterr().err
        for text in ("left out 17: 11 pages or frames after the first (dog/scan.tif)", "1 with more than 8 bits a channel",
                     "1 no image, by its name (dog/notes.txt)", "1 a link to nothing", "(pets/closed)"):
            assert text in said, said
    shutil.rmtree("pets/closed")
    for i in range(30):
        Path(f"pets/cat/{i:03d}.png").write_bytes(b"")
    assert "30 cannot identify image file" in (load("pets"), capfd.readouterr().err)[1]

def test_the_pictures_of_a_run_are_no_data(pets, monkeypatch, capfd):
    """Runs below the folder of images, killed ones, too; acgan.py gets no class "samples" of them."""
    monkeypatch.chdir("pets")
    for flags in ("--out_dir runs/a", "--out_dir b", ""):
        acgan.train(acgan.get_args(words("--dataset . --img_size 16 --ngf 2 --ndf 2 --batch_size 8 --device cpu --max_steps 1", flags)))
    said = capfd.readouterr().err
    assert "2 a run's folder (./runs/a)" in said
    assert (len(load(".")[0]), load(".")[2]) == (24, ["cat", "dog"])

@pytest.mark.parametrize("kind", ["icons", "masks"])
def test_images_that_hardly_differ_are_warned_of(kind, pets, capfd):
    """White on transparent, which becomes white; masks of 0 and 1."""
    os.mkdir(kind)
    for i in range(4):
        if kind == "icons":
            icon = Image.new("RGBA", (16, 16), (255, 255, 255, 0))
            icon.paste((255, 255, 255, 255), (i, i, i + 5, i + 5))
            icon.save(f"icons/{i}.png")
        else:
            Image.fromarray(np.roll(np.eye(16, dtype=np.uint8), i, 1)).save(f"masks/{i}.png")
    load(kind)
    assert "hardly differ" in capfd.readouterr().err
    load(pets)
    assert "hardly differ" not in capfd.readouterr().err

# ------------------------------------------------------------------------------------------ cache

def test_the_cache_is_used_and_is_one_file(pets, monkeypatch):
    images, *_ = load(pets)
    assert len(os.listdir("data/cache")) == 1
    with monkeypatch.context() as patch:
        patch.setattr(dcgan, "decode", None)  # nothing is decoded again
        np.testing.assert_array_equal(load(pets)[0], images)
    assert load(pets, "--max_images 10")[0].shape == (10, 16, 16, 3)

def moved_there(pets):
    picture(999).save("other.png")
    os.utime("other.png", (10**9, 10**9))
    os.replace("other.png", "pets/cat/000.png")  # with the size and the time of the one that was there

@pytest.mark.parametrize("change", [
    lambda pets: picture(999).save("pets/cat/000.png"), lambda pets: picture(999).save("pets/cat/new.png"), moved_there,
    lambda pets: os.rename("pets/cat", "pets/ant")])
def test_the_cache_notices_a_change(change, pets):
    picture(0).save("pets/cat/000.png")
    os.utime("pets/cat/000.png", (10**9, 10**9))
    before = load(pets)
    change(pets)
    after = load(pets)
    assert before[2] != after[2] or not np.array_equal(before[0], after[0])

def test_the_cache_notices_an_edit(pets, monkeypatch):
    """Of to_pixels, also where only a name in it is another one; and of draw_digit."""
    text = Path(dcgan.__file__).read_text()
    for old, new, dataset in (("Resampling.BICUBIC).tobytes", "Resampling.LANCZOS).tobytes", "pets"), ("uniform(-6, 6)", "uniform(-60, 60)", "digits")):
        assert text.count(old) == 1
        Path("edited.py").write_text(text.replace(old, new))
        monkeypatch.syspath_prepend(".")
        monkeypatch.delitem(__import__("sys").modules, "edited", raising=False)
        import edited
        assert not np.array_equal(load(dataset, "--max_images 20")[0], load(dataset, "--max_images 20", script=edited)[0])

def test_torchvision_files_that_were_exchanged(monkeypatch):
    class Set(list):
        classes, targets = ["a"], [0, 0]

    for value in (100, 200):
        data = Set([(Image.new("L", (28, 28), value), 0)] * 2)
        data.data = np.full((2, 28, 28), value, np.uint8)
        monkeypatch.setattr(dcgan, "download", lambda kind, args, data=data: data)
        assert load("mnist")[0].max() == value

def test_each_process_has_its_own_share(monkeypatch):
    """Of all classes: digits are in turn."""
    whole, shares = load("digits --max_images 400")[0], []
    monkeypatch.setattr(dcgan, "WORLD_SIZE", 2)
    for rank in range(2):
        monkeypatch.setattr(dcgan, "RANK", rank)
        images, labels, _ = load("digits --max_images 400")
        assert (len(images), set(labels)) == (200, set(range(10)))
        shares += [image.tobytes() for image in images]
    assert sorted(shares) == sorted(image.tobytes() for image in whole)

def test_pixels_survive_the_round_trip(pets):
    """What Run hands out are the images, in [-1, 1], each with its label."""
    images, labels, _ = load(pets)
    run = dcgan.Run(dcgan.get_args(words("--dataset pets --img_size 16 --nz 8 --batch_size 24 --device cpu --max_steps 2")))
    for _, real, told in run.steps(netG_ema=dcgan.Generator(8, 2, 3, 16).eval()):
        run.log({"loss": real.mean()})
        assert (real.min() >= -1, real.max() <= 1) == (True, True)
        got = (real * 127.5 + 127.5).round().permute(0, 2, 3, 1).byte().numpy()
        assert {x.tobytes(): int(k) for x, k in zip(got, told)} == {x.tobytes(): k for x, k in zip(images, labels)}

def test_other_classes_are_refused(pets, capfd):
    train(acgan, "--max_steps 1 --nc 3 --dataset pets --max_images 24")
    os.rename("pets/cat", "pets/zebra")
    said = error_of(capfd, "acgan", "--resume run --max_steps 2")
    assert "cat, dog" in said
    assert "dog, zebra" in said
    os.rename("pets/zebra", "pets/cat")
    assert resume(acgan, "--max_steps 2")["step"] == 2
