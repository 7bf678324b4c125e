"""A trained generator as one ONNX file that explains itself.

Takes the checkpoints of gan.py, dcgan.py and acgan.py, and the weights of other people's DCGANs. The file
carries its sizes, classes and origin, and none is written that does not give PyTorch's pictures.

    python export.py runs/dcgan-digits                                # float32, runs everywhere
    python export.py runs/dcgan-digits --precision int8 --uint8       # for CPUs: small and fast
    python export.py runs/dcgan-digits --precision fp16 --uint8       # for GPUs; float32 goes in
    python export.py netG_epoch_24.pth -o faces.onnx                  # somebody else's weights

Input z (N, nz) float32 ~ N(0, 1), for acgan also labels (N) int64. Output images: (N, nc, H, W) float32 in
[-1, 1], or with --uint8 (N, H, W, nc) uint8.
"""

import argparse
import contextlib
import copy
import hashlib
import io
import json
import logging
import math
import os
import shlex
import sys
import tempfile
import warnings
from pathlib import Path, PureWindowsPath

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import helper
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import acgan
import dcgan
import gan
import infer_ort
from infer_ort import InputError

SCRIPTS = {"gan": gan, "dcgan": dcgan, "acgan": acgan}
LEAST_PSNR = {"fp32": 60, "fp16": 40, "int8": 35}  # of ONNX Runtime's pictures against PyTorch's, in dB

def get_args(argv=None):
    p = argparse.ArgumentParser("export.py", usage="%(prog)s checkpoint [flags]", description=__doc__,
                                allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("checkpoint", help="a run's folder, a checkpoint, or somebody's DCGAN weights")
    add("-o", "--out", metavar="MODEL.onnx", help="where to write (beside the checkpoint)")
    add("--precision", choices=LEAST_PSNR, default="fp32", help="fp16: for GPUs, int8: for CPUs (fp32)")
    add("--uint8", action="store_true", help="the graph ends in pixels, uint8 (N, H, W, nc)")
    add("--opset", type=int, default=18, help="ONNX operator set, 18 or more (18)")
    args = p.parse_args(argv)
    args.checkpoint = dcgan.checkpoint_in(args.checkpoint)
    if args.out is None:
        suffix = "" if args.precision == "fp32" else f"_{args.precision}"
        args.out = f"{args.checkpoint.with_suffix('')}{suffix}.onnx"
    if not args.out.endswith(".onnx"):  # it could be the checkpoint's own name
        p.error(f"--out {args.out}: give a name that ends in .onnx")
    if not 18 <= args.opset <= onnx.defs.onnx_opset_version():
        p.error(f"--opset {args.opset}: give 18 to {onnx.defs.onnx_opset_version()}")
    return args

# ------------------------------------------------------------------------------------- checkpoint

def load(path):
    """netG in eval mode, what the checkpoint says of its run, and its sha256. No code in it is run."""
    data = Path(path).read_bytes()
    try:
        ckpt = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as e:  # damaged files make torch raise nearly anything
        raise InputError(f"{path}: damaged, or more than tensors: save netG.state_dict()") from e
    script = ckpt.get("script") if isinstance(ckpt, dict) else None
    if script in SCRIPTS:
        netG = SCRIPTS[script].load_generator(ckpt)
    elif script is not None:
        raise InputError(f"{path} is of {script}.py: add that to SCRIPTS in export.py")
    else:
        netG = find_generator(ckpt)
        ckpt = {"script": "dcgan", "classes": []}
    if netG is None:
        raise InputError(f"{path}: no weights of a DCGAN's generator: 4x4 transposed convolutions in a row")
    return netG, ckpt, hashlib.sha256(data).hexdigest()

def find_generator(state, depth=4):
    """The first Foreign in somebody's dict, or in a dict in it, under whatever names; or None."""
    if not isinstance(state, dict) or depth == 0:
        return None
    layers = {}  # {name: {"weight": tensor, "bias": tensor, ...}}
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            layer, _, part = str(name).rpartition(".")
            layers.setdefault(layer, {})[part] = value
    chains, channels = [[]], 0
    for layer in layers.values():
        weight = layer.get("weight", torch.zeros(0))
        if weight.ndim == 4:  # (in, out, height, width)
            if len(weight) != channels:  # it does not take what the one before makes: another net
                chains.append([])
            channels = weight.shape[1]
        if weight.ndim == 4 or "running_mean" in layer:
            chains[-1].append(layer)
    for chain in chains:
        if len(chain) > 2 and chain[-1]["weight"].shape[1:2] in ((1,), (3,)):
            with contextlib.suppress(RuntimeError):  # of other shapes
                return Foreign(chain)
    for value in state.values():
        netG = find_generator(value, depth - 1)
        if netG is not None:
            return netG
    return None

class Foreign(nn.Module):
    """Somebody's DCGAN generator, of any width and depth, made from its weights: transposed convolutions,
    the first of stride 1 and the others of stride 2, BatchNorm where it is, ReLU, and Tanh at the end."""

    def __init__(self, chain):
        super().__init__()
        layers = []
        for weights, following in zip(chain, [*chain[1:], None]):
            shape = weights["weight"].shape
            if len(shape) == 1:
                layer = nn.BatchNorm2d(shape[0])
            else:
                stride, padding = (2, 1) if layers else (1, 0)
                layer = nn.ConvTranspose2d(*shape[:2], shape[2:], stride, padding)
                nn.init.zeros_(layer.bias)  # which may not be among the weights
            layer.load_state_dict(weights, strict=False)
            layers.append(layer)
            if following is None:
                layers.append(nn.Tanh())
            elif following["weight"].ndim == 4:
                layers.append(nn.ReLU(inplace=True))
        self.main = nn.Sequential(*layers)
        nz = len(chain[0]["weight"])
        _, nc, img_size, _ = self.eval().main(torch.zeros(1, nz, 1, 1)).shape
        self.config = {"nz": nz, "nc": nc, "img_size": img_size}

    def forward(self, z):
        return self.main(z.view(-1, z.shape[1], 1, 1))

# ------------------------------------------------------------------------------------------ graph

class Exported(nn.Module):
    """netG with the file's inputs and outputs: float32 outside, pixels at the end if `uint8`."""

    def __init__(self, netG, half, uint8):
        super().__init__()
        self.netG = netG.half() if half else netG
        self.half, self.uint8 = half, uint8

    def forward(self, z, labels=None):
        if self.half:
            z = z.to(torch.float16)
        x = self.netG(z) if labels is None else self.netG(z, labels)
        x = x.float()
        if self.uint8:  # as in generate() of the three scripts
            x = (x * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        return x

def to_onnx(net, inputs, opset):
    """onnx.ModelProto of `net`, for any N, with BatchNorm folded (by torch.onnx)."""
    example = {name: torch.from_numpy(x) for name, x in inputs.items()}
    with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(None):
        program = torch.onnx.export(
            net, (), kwargs=example, dynamo=True, opset_version=opset, verbose=False,
            dynamic_shapes={name: {0: torch.export.Dim("N")} for name in example},
            input_names=list(example), output_names=["images"])
    model = program.model_proto
    if model.opset_import[0].version != opset:
        raise InputError(f"--opset {opset}: torch {torch.__version__} has none of it; take a lower one")
    graph = model.graph
    values = (*graph.value_info, *graph.input, *graph.output, *graph.initializer)
    for part in (model, graph, *graph.node, *values):
        part.ClearField("metadata_props")  # stack traces, with local paths in them
        part.ClearField("doc_string")
    model.ir_version = helper.find_min_ir_version_for(model.opset_import)  # for old runtimes
    return model

# ------------------------------------------------------------------------------------------- int8

class Dense(nn.Module):
    """The first transposed convolution, of 1x1 pictures, as a matrix product. Its weights are int8 in the
    file and float in memory: latents suffer most from 8 bits, and are spared them."""

    def __init__(self, conv):
        super().__init__()
        weight = conv.weight.data.flatten(1).T  # (out * 4 * 4, nz)
        self.shape = (conv.out_channels, *conv.kernel_size)
        self.scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        self.weight = (weight / self.scale).round().to(torch.int8)
        self.bias = conv.bias.data.repeat_interleave(math.prod(conv.kernel_size))

    def forward(self, z):
        weight = self.weight.float() * self.scale
        return F.linear(z.flatten(1), weight, self.bias).unflatten(1, self.shape)

class Phases(nn.Module):
    """ReLU of a 4x4 stride-2 transposed convolution, exactly, as four 2x2 convolutions, which int8 has.

    In one dimension y[2i] = x[i-1] w[3] + x[i] w[1] and y[2i+1] = x[i] w[2] + x[i+1] w[0]: so one for each
    parity of row and column. NHWC interleaves the four by copying runs of bytes.
    """

    def __init__(self, conv):
        super().__init__()
        taps = ([3, 1], [2, 0])
        weight = conv.weight.data.transpose(0, 1)  # (out, in, 4, 4)
        self.weights = {(a, b): weight[:, :, taps[a]][..., taps[b]] for a in (0, 1) for b in (0, 1)}
        self.bias = conv.bias.data

    def forward(self, x):
        phases = []
        for (a, b), weight in self.weights.items():  # the parity of the row, and of the column
            padded = F.pad(x, (1 - b, b, 1 - a, a))
            y = F.conv2d(padded, weight, self.bias).relu()
            phases.append(y.permute(0, 2, 3, 1))
        height, width = x.shape[2:]
        channels = len(self.bias)
        y = torch.cat(phases, 3).reshape(-1, height, width, 2, 2, channels)
        y = y.transpose(2, 3).reshape(-1, 2 * height, 2 * width, channels)
        return y.permute(0, 3, 1, 2)

def for_int8(main):
    """netG's layers, with BatchNorm folded, and transposed convolutions as what ONNX Runtime has in int8;
    but for the last one, which has 1 or 3 channels and little work."""
    layers = []
    for layer, following in zip(main, [*main[1:], None]):
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            continue  # it is in the layer before
        if isinstance(following, nn.BatchNorm1d):
            layer = fuse_linear_bn_eval(layer, following)
        if isinstance(following, nn.BatchNorm2d):
            layer = fuse_conv_bn_eval(layer, following, transpose=True)
        if isinstance(layer, nn.ConvTranspose2d) and not isinstance(following, nn.Tanh):
            layer = Phases(layer) if layers else Dense(layer)
        layers.append(layer)
    return nn.Sequential(*layers)

def quantize(model, batches):
    """The int8 form of a float32 model: activations uint8, weights int8 for each channel. No data set is
    needed to measure ranges: z ~ N(0, 1)."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        left = iter(batches)

        def get_next(self):
            return next(self.left, None)

    in_float = [node.name for node in model.graph.node if node.op_type == "ConvTranspose"]
    in_float += [node.name for node in model.graph.node if node.op_type == "Gemm"][:1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "int8.onnx")
        quantize_static(model, path, Reader(), per_channel=True, nodes_to_exclude=in_float,
                        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                        op_types_to_quantize=["Conv", "Gemm", "Relu", "Transpose", "Concat", "Reshape"])
        return onnx.load(path)

# ------------------------------------------------------------------------------------------- file

def draw(netG, start, n):
    """netG's inputs, by name: latents start to start + n - 1 of seed 0, and classes in turn."""
    inputs = {"z": infer_ort.latents(0, start, n, netG.config["nz"])}
    if "n_classes" in netG.config:
        inputs["labels"] = np.arange(start, start + n) % netG.config["n_classes"]
    return inputs

def describe(args, netG, ckpt, sha256):
    """The file's metadata, str -> str: what it takes to use it, and its origin; no local path."""
    config = netG.config
    n_classes = config.get("n_classes", 0)
    dataset = str(ckpt.get("args", {}).get("dataset", "unknown"))
    meta = {
        "format_version": 1,
        "script": ckpt["script"],
        "nz": config["nz"],
        "nc": config["nc"],
        "img_size": config["img_size"],
        "n_classes": n_classes,
        "classes": json.dumps(ckpt["classes"][:n_classes]),
        "layout": "NHWC" if args.uint8 else "NCHW",
        "value_range": "0 to 255" if args.uint8 else "-1 to 1",
        "precision": args.precision,
        "latent": "N(0, 1)",
        "dataset": PureWindowsPath(dataset).name,  # slashes of both kinds end a folder
        "steps": ckpt.get("step", "unknown"),
        "checkpoint_sha256": sha256,
        "versions": f"torch {torch.__version__}, onnx {onnx.__version__}",
    }
    # A file's name may hold what is no UTF-8, and a protobuf may not.
    return {key: str(value).encode(errors="backslashreplace").decode() for key, value in meta.items()}

def compare(netG, file, args):
    """Says how near ONNX Runtime's pictures are to PyTorch's. InputError if they are not."""
    session = infer_ort.open_session(file, "cpu")
    reference = Exported(netG, False, args.uint8)
    squares = []
    for start, n in ((0, 1), (1, 7), (8, 16)):
        inputs = draw(netG, start, n)
        with torch.no_grad():
            want = reference(*map(torch.from_numpy, inputs.values())).numpy()
        difference = session.run(None, inputs)[0].astype(np.float64) - want
        squares.append(np.square(difference / (127.5 if args.uint8 else 1)).mean())
    psnr = 10 * math.log10(4 / max(np.max(squares), 1e-15))
    least = LEAST_PSNR[args.precision]
    if not psnr >= least:  # nor NaN
        raise InputError(f"{args.out}: not written: PSNR {psnr:.1f} dB against PyTorch's pictures, "
                         f"{args.precision} has to have {least}; diverged? or try another --precision")
    return f"PSNR {psnr:.1f} dB against PyTorch"

def export(args):
    """The file args.out, or none: what does not give PyTorch's pictures never gets that name."""
    netG, ckpt, sha256 = load(args.checkpoint)
    net = copy.deepcopy(netG)
    if args.precision == "int8":
        net.main = for_int8(net.main)
    net = Exported(net, args.precision == "fp16", args.uint8).eval()
    model = to_onnx(net, draw(netG, 0, 2), args.opset)
    if args.precision == "int8":
        model = quantize(model, [draw(netG, 2**40 + i, 16) for i in range(0, 256, 16)])
    helper.set_model_props(model, describe(args, netG, ckpt, sha256))
    onnx.checker.check_model(model, full_check=True)
    with dcgan.new_file(Path(args.out)) as f:
        f.write(model.SerializeToString())
        f.flush()
        result = compare(netG, f.name, args)
    print(f"{args.out}: {os.path.getsize(args.out) / 1e6:.2f} MB, {args.precision}, {result}")
    print(f"next: python infer_ort.py {shlex.quote(args.out)}")

def main():
    logging.disable(logging.WARNING)  # of torch.onnx and onnxruntime.quantization
    try:
        export(get_args())
    except (InputError, OSError, MemoryError, KeyboardInterrupt) as e:
        sys.exit(f"export.py: error: {' '.join(str(e).split()) or type(e).__name__}")

if __name__ == "__main__":
    main()
