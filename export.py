"""A trained generator as one ONNX file that explains itself.

Takes the checkpoints of gan.py, dcgan.py and acgan.py, and other people's DCGAN state dicts. BatchNorm is
folded into the convolutions, the file carries its sizes, classes and origin as metadata, and nothing is
written that does not give PyTorch's pictures.

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
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import shlex
import signal
import sys
import tempfile
import warnings
from pathlib import Path, PureWindowsPath

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import acgan
import dcgan
import gan

SCRIPTS = {"gan": gan, "dcgan": dcgan, "acgan": acgan}
# From PyTorch's pictures: the greatest difference, in [-1, 1], and the least PSNR in dB.
TOLERANCE = {"fp32": (1e-4, 0), "fp16": (math.inf, 40), "int8": (math.inf, 35)}
# What the user can mend: main() makes one line of it. All else keeps its traceback.
MENDABLE = (OSError, MemoryError, KeyboardInterrupt, *(script.UserError for script in SCRIPTS.values()))

def number(kind, low, high, text):
    """argparse type, by functools.partial: an int or a float (kind) from low to high."""
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:  # nor NaN
        raise argparse.ArgumentTypeError(f"{text} is not a number from {low} to {high}")
    return value

def make_parser():
    layout = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser("export.py", description=__doc__, allow_abbrev=False, formatter_class=layout)
    integer = functools.partial(functools.partial, number, int)
    newest = onnx.defs.onnx_opset_version()
    add = p.add_argument
    add("checkpoint", help="checkpoint.pt, the folder of a run, or a DCGAN generator's state dict")
    add("-o", "--out", metavar="MODEL.onnx", help="where to write (beside the checkpoint)")
    add("--precision", choices=TOLERANCE, default="fp32", help="fp16: for GPUs, int8: for CPUs (fp32)")
    add("--uint8", action="store_true", help="the graph ends in pixels, uint8 (N, H, W, nc)")
    add("--phases", action="store_true",
        help="convolutions in place of transposed ones: for larger batches on CPUs; always in int8")
    add("--opset", type=integer(16, newest), default=17,
        help="ONNX operator set; ONNX Runtime 1.15 and later load 17 (17)")
    add("--batch_size", type=integer(1, 2**16), help="a fixed batch size (any)")
    add("--seed", type=integer(0, 2**63 - 1), default=0, help="of int8's calibration and of the check (0)")
    add("--no-verify", dest="verify", action="store_false", help="do not compare with PyTorch")
    return p

def get_args(argv=None):
    p = make_parser()
    args = p.parse_args(argv)
    if args.phases and args.precision == "fp16":
        p.error("--phases: it is for CPUs, and fp16 is for GPUs; choose fp32 or int8")
    args.checkpoint = dcgan.last_checkpoint(args.checkpoint)
    if args.out is None:
        suffix = "" if args.precision == "fp32" else f"_{args.precision}"
        args.out = f"{os.path.splitext(args.checkpoint)[0]}{suffix}.onnx"
    if Path(args.out).suffix != ".onnx":  # it could be the checkpoint's own name
        p.error(f"--out {args.out}: give a name that ends in .onnx")
    return args

# -------------------------------------------------------------------------------------------- model

def load(path):
    """(script's module, netG in eval mode, names of its classes, what the file says of the run)."""
    ckpt = dcgan.load_checkpoint(path, [*SCRIPTS, None])
    run = ckpt if ckpt.get("script") else {"script": "dcgan"}  # somebody else's
    script = SCRIPTS[run["script"]]
    netG, classes = script.load_generator(path)
    return script, netG, classes, run

def fold_batchnorm(net):
    """Each BatchNorm becomes part of the layer before it: the same function in fewer operations."""
    for parent in list(net.modules()):
        layers = parent._modules
        for first, second in itertools.pairwise(list(layers)):
            layer, norm = layers[first], layers[second]
            if isinstance(layer, nn.ConvTranspose2d) and isinstance(norm, nn.BatchNorm2d):
                layers[first] = fuse_conv_bn_eval(layer, norm, transpose=True)
                layers[second] = nn.Identity()
            elif isinstance(layer, nn.Linear) and isinstance(norm, nn.BatchNorm1d):
                layers[first] = fuse_linear_bn_eval(layer, norm)
                layers[second] = nn.Identity()
    return net

class Exported(nn.Module):
    """netG with the file's inputs and outputs: float32 outside, pixels at the end if `uint8`."""

    def __init__(self, netG, half, uint8):
        super().__init__()
        self.netG = netG.half() if half else netG
        self.half_inside = half
        self.uint8 = uint8

    def forward(self, z, labels=None):
        if self.half_inside:
            z = z.half()
        x = self.netG(z) if labels is None else self.netG(z, labels)
        x = x.float()
        if self.uint8:  # as to_uint8 in the three scripts
            x = (x * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        return x

def draw(script, netG, seed, start, n):
    """netG's inputs, by name: latents start to start + n - 1 of a seed, perhaps labels, in turn."""
    inputs = {"z": script.latents(seed, start, n, netG.config["nz"])}
    if "n_classes" in netG.config:
        inputs["labels"] = np.arange(start, start + n) % netG.config["n_classes"]
    return inputs

def to_onnx(net, inputs, batch_size, opset):
    """onnx.ModelProto of `net`, through torch.export. inputs: at least two examples, by name."""
    n = batch_size or 2  # a batch of 1 would be taken for a constant
    example = {name: torch.from_numpy(array[:n]) for name, array in inputs.items()}
    dynamic = None
    if batch_size is None:
        dynamic = {name: {0: torch.export.Dim("N")} for name in example}
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            net, (), kwargs=example, dynamo=True, dynamic_shapes=dynamic, opset_version=opset,
            input_names=list(example), output_names=["images"], verbose=False)
    model = program.model_proto
    written = model.opset_import[0].version
    if written != opset:
        raise dcgan.UserError(f"--opset {opset}: torch.onnx {torch.__version__} gives {written}; choose that")
    try:
        plain = reshape_plainly(copy.deepcopy(model))
        onnx.checker.check_model(plain)
    except onnx.checker.ValidationError:  # a netG of somebody's own, which does more with z
        return model
    return plain

# -------------------------------------------------------------------------------------------- graph

def constant(model, name, value):
    """Adds a tensor to the file, and returns its name."""
    model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
    return name

def replace_nodes(model, nodes):
    """Gives a model these nodes, and drops the tensors that no node uses any more."""
    graph = model.graph
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)

def reshape_plainly(model):
    """The same function, with one Reshape from (N, nz) to (N, nz, 1, 1) and one of embeddings.

    OpenCV 4 reads no Unsqueeze of two axes, knows no allowzero and takes labels (N) for (N, 1).
    """
    sizes = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    rows = {}  # name of a tensor with axes of size 1 -> of the (N, nz) tensor that it was made of
    nodes = []
    for node in model.graph.node:
        source, name = node.input[0], node.output[0]
        if node.op_type == "Unsqueeze":
            rows[name] = source
        elif node.op_type == "Transpose" and source in rows:
            rows[name] = rows[source]
        elif node.op_type == "Reshape":
            node.ClearField("attribute")  # allowzero
            node.input[0] = rows.get(source, source)
            nodes.append(node)
        elif node.op_type == "Gather" and len(sizes.get(source, ())) == 2:  # of embeddings: (N) -> (N, nz)
            node.output[0] = f"{name}.rows"
            shape = constant(model, f"{name}.shape", [-1, sizes[source][1]])
            nodes += [node, helper.make_node("Reshape", [f"{name}.rows", shape], [name])]
        else:
            if source in rows and node.op_type == "ConvTranspose":  # the first layer
                shape = constant(model, f"{source}.shape", [-1, sizes[node.input[1]][0], 1, 1])
                nodes.append(helper.make_node("Reshape", [rows[source], shape], [source]))
            nodes.append(node)
    replace_nodes(model, nodes)
    return model

def strip(model):
    """Removes what tools leave in a file: stack traces, with local paths in them."""
    graph = model.graph
    values = (*graph.value_info, *graph.input, *graph.output, *graph.initializer)
    for part in (model, graph, *graph.node, *values):
        del part.metadata_props[:]
        part.ClearField("doc_string")

# ------------------------------------------------------------------------------------------- phases

class Dense(nn.Module):
    """A transposed convolution of 1x1 pictures as a matrix product: (N, nz, 1, 1) -> (N, C, 4, 4)."""

    def __init__(self, conv):
        super().__init__()
        pixels = math.prod(conv.kernel_size)
        self.shape = (conv.out_channels, *conv.kernel_size)
        self.linear = nn.Linear(conv.in_channels, conv.out_channels * pixels)
        self.linear.weight.data = conv.weight.data.flatten(1).T.contiguous()
        self.linear.bias.data = conv.bias.data.repeat_interleave(pixels)

    def forward(self, z):
        return self.linear(z.flatten(1)).unflatten(1, self.shape)

def to_phases(model):
    """Rewrites every 4x4 stride-2 transposed convolution, exactly, as four 2x2 convolutions.

    But for the last one, which has 1 or 3 channels and little work. Returns groups, lists of names of
    tensors: in int8 a group needs one range, for its bytes are joined. The second is after ReLU.
    """
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    convs = [node.output[0] for node in model.graph.node if node.op_type == "ConvTranspose"][:-1]
    relu_after = {node.input[0]: node for node in model.graph.node if node.op_type == "Relu"}
    nodes, groups = [], []
    size = 4  # of the pictures that the next one takes
    for node in model.graph.node:
        source, name = node.input[0], node.output[0]
        if name in convs:
            output = relu_after[name].output[0]
            phases, group = as_phases(model, node, weights[node.input[1]], size, output)
            nodes += phases
            groups.append(group)
            size *= 2
        elif node.op_type == "Relu" and source in convs:
            continue  # it has become four
        else:
            nodes.append(node)
            if node.op_type == "Relu":
                groups.append([source, name])
    replace_nodes(model, nodes)
    return groups

def as_phases(model, conv, weight, size, output):
    """(nodes, group): `output` = ReLU(conv) of pictures size x size, by convolutions that int8 has.

    In one dimension y[2i] = x[i-1] w[3] + x[i] w[1] and y[2i+1] = x[i] w[2] + x[i+1] w[0]: so one for
    each parity of row and column. NHWC interleaves the four by copying runs of bytes.
    """
    name = conv.output[0]
    bias = conv.input[2:]
    channels = weight.shape[1]  # of (in, out, 4, 4)
    taps = ([3, 1], [2, 0])
    nodes, group, rows = [], [], []

    def add(op, inputs, result, **attributes):
        nodes.append(helper.make_node(op, inputs, [result], result, **attributes))
        return result

    def reshape(source, result, shape):
        return add("Reshape", [source, constant(model, f"{result}.shape", shape)], result)

    for a in (0, 1):  # the parity of the row
        columns = []
        for b in (0, 1):  # and of the column
            phase = f"{name}.{a}{b}"
            kernel = weight[:, :, taps[a]][:, :, :, taps[b]].transpose(1, 0, 2, 3)
            kernel = constant(model, f"{phase}.weight", kernel)
            pads = [1 - a, 1 - b, a, b]
            y = add("Conv", [conv.input[0], kernel, *bias], phase, kernel_shape=[2, 2], pads=pads)
            relu = add("Relu", [y], f"{phase}.relu")
            group += [y, relu]
            columns.append(add("Transpose", [relu], f"{phase}.nhwc", perm=[0, 2, 3, 1]))
        joined = add("Concat", columns, f"{name}.{a}.columns", axis=3)
        group.append(joined)
        rows.append(reshape(joined, f"{name}.{a}.row", [0, size, 1, 2 * size * channels]))
    joined = add("Concat", rows, f"{name}.rows", axis=2)
    group.append(joined)
    nhwc = reshape(joined, f"{name}.nhwc", [0, 2 * size, 2 * size, channels])
    add("Transpose", [nhwc], output, perm=[0, 3, 1, 2])
    return nodes, group

# --------------------------------------------------------------------------------------------- int8

def cpu_session(model):
    """onnxruntime.InferenceSession of a path or of bytes."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as e:  # ONNX Runtime has exceptions without a common name
        raise dcgan.UserError(f"onnxruntime {ort.__version__} does not load the file, perhaps for its --opset: {e}") from e

def store_first_in_int8(model):
    """The first matrix as int8 in the file, float in memory, made when ONNX Runtime loads it.

    Latents suffer most from 8 bits, so they are spared them.
    """
    first = next(node for node in model.graph.node if node.op_type == "Gemm")
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == first.input[1])
    weight = numpy_helper.to_array(weight)  # (out, in)
    scale = np.maximum(np.abs(weight).max(1, keepdims=True), 1e-12) / 127
    name = first.output[0]
    int8 = constant(model, f"{name}.int8", np.round(weight / scale).astype(np.int8))
    scale = constant(model, f"{name}.scale", scale)
    cast = helper.make_node("Cast", [int8], [f"{name}.cast"], to=TensorProto.FLOAT)
    scaled = helper.make_node("Mul", [f"{name}.cast", scale], [f"{name}.weight"])
    first.input[1] = f"{name}.weight"
    replace_nodes(model, [cast, scaled, *model.graph.node])

def best_range(x):
    """The t for which x >= 0 in 255 steps from 0 to t has the least squared error."""
    def error(top):
        steps = np.minimum(np.round(x * (255 / top)), 255)
        return np.square(steps * (top / 255) - x).mean()

    return min(max(float(x.max()), 1e-6) * np.linspace(0.5, 1, 26), key=error)

def measure_ranges(model, groups, batches):
    """For quantize_static: one range for each group, from what its tensors after ReLU hold."""
    names = [t for group in groups for t in group if t.endswith(".relu") or t == group[1]]
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = cpu_session(probe.SerializeToString())
    seen = {name: [] for name in names}
    for batch in batches:
        for name, x in zip(names, session.run(names, batch)):
            few = x.ravel()[::max(1, x.size >> 16)]
            seen[name].append(few)
    ranges = {}
    for group in groups:
        values = [x for name in group if name in seen for x in seen[name]]
        top = best_range(np.concatenate(values))
        for name in group:
            ranges[name] = [{"rmin": np.float32(0), "rmax": np.float32(top)}]
    return ranges

def quantize(model, groups, batches):
    """The int8 form of a float32 model: activations uint8, weights int8 for each channel.

    groups: what to_phases returned. batches: inputs, by name. No data set is needed: z ~ N(0, 1).
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # for the tensors that have no range yet
        left = iter(batches)

        def get_next(self):
            return next(self.left, None)

    store_first_in_int8(model)
    ranges = measure_ranges(model, groups, batches)
    in_float = [node.name for node in model.graph.node if node.op_type == "ConvTranspose"]
    in_float += [node.name for node in model.graph.node if node.op_type == "Gemm"][:1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "int8.onnx")
        quantize_static(
            model, path, Reader(), per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            op_types_to_quantize=["Conv", "Gemm", "Relu", "Transpose", "Concat", "Reshape"],
            nodes_to_exclude=in_float, extra_options={"TensorQuantOverrides": ranges})
        return onnx.load(path)

# --------------------------------------------------------------------------------------------- file

def sha256_of(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()

def describe(args, netG, classes, run, sha256):
    """The file's metadata, str -> str: what it takes to use it, and its origin; no local path."""
    config = netG.config
    dataset = str(run.get("args", {}).get("dataset", "unknown"))
    meta = {
        "format_version": 1,
        "script": run["script"],
        "nz": config["nz"],
        "nc": config["nc"],
        "img_size": config["img_size"],
        "n_classes": config.get("n_classes", 0),
        "classes": json.dumps(classes),
        "layout": "NHWC" if args.uint8 else "NCHW",
        "value_range": "0 to 255" if args.uint8 else "-1 to 1",
        "precision": args.precision,
        "latent": "N(0, 1)",
        "dataset": PureWindowsPath(dataset).name,  # slashes of both kinds end a folder
        "steps": run.get("step", "unknown"),
        "weights": "ema" if "netG_ema" in run else "unknown",
        "checkpoint_sha256": sha256,
        "versions": f"torch {torch.__version__}, onnx {onnx.__version__}",
    }
    # A file's name may hold what is no UTF-8, and a protobuf may not.
    return {key: str(value).encode(errors="backslashreplace").decode() for key, value in meta.items()}

def compare(script, netG, path, args):
    """Says how far ONNX Runtime's pictures are from PyTorch's. OSError if that is too far."""
    session = cpu_session(path)
    sizes = [1, 2, 7, 16]
    if args.batch_size:
        sizes = [args.batch_size] * max(2, 26 // args.batch_size)
    worst, squares, n = 0.0, [], 0
    for size in sizes:
        inputs = draw(script, netG, args.seed, n, size)
        (got,) = session.run(["images"], inputs)
        with torch.no_grad():
            want = netG(*map(torch.from_numpy, inputs.values()))
        if args.uint8:
            difference = (got.astype(np.float64) - script.to_uint8(want)) / 127.5
        else:
            difference = got.astype(np.float64) - want.numpy()
        worst = max(worst, np.abs(difference).max())
        squares.append(np.square(difference).ravel())
        n += size
    error = np.concatenate(squares).mean()
    psnr = 10 * math.log10(4 / error) if error else math.inf

    most, least = TOLERANCE[args.precision]
    apart = f"{worst:.2g} in [-1, 1]"
    if args.uint8:
        most = max(most, 1 / 127.5 + 1e-9)  # a level
        apart = f"{worst * 127.5:.0f} levels of 255"
    result = f"greatest difference from PyTorch {apart}, PSNR {psnr:.1f} dB over {n} pictures"
    if not (worst <= most and psnr >= least):  # nor NaN
        allowed = f"at least {least} dB" if least else f"at most {most:.2g} in [-1, 1]"
        raise dcgan.UserError(f"{args.out}: not written, {result}; {args.precision} has to keep to {allowed}; "
                      "try another --precision")
    return result

def export(args):
    """The file args.out, or none: what does not give PyTorch's pictures never gets that name."""
    sha256 = sha256_of(args.checkpoint)
    script, netG, classes, run = load(args.checkpoint)
    if sha256_of(args.checkpoint) != sha256:
        raise dcgan.UserError(f"{args.checkpoint}: its run saved it meanwhile; start export.py again")
    n = args.batch_size or 16
    inputs = draw(script, netG, args.seed, 0, max(2, n))
    with torch.no_grad():
        images = netG(*map(torch.from_numpy, inputs.values()))
    if not images.isfinite().all():
        raise dcgan.UserError(f"{args.checkpoint}: its pictures are not finite; its training diverged")

    net = fold_batchnorm(copy.deepcopy(netG))
    convolutional = isinstance(net.main[0], nn.ConvTranspose2d)
    if args.phases and not convolutional:
        raise dcgan.UserError(f"--phases: {args.checkpoint} has no transposed convolution; leave it away")
    phases = args.phases or args.precision == "int8"
    if phases and convolutional:
        net.main[0] = Dense(net.main[0])
    for layer in net.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = False  # or the graph gets one more Reshape
    net = Exported(net, args.precision == "fp16", args.uint8).eval()

    model = to_onnx(net, inputs, args.batch_size, args.opset)
    groups = to_phases(model) if phases else []
    if args.precision == "int8":
        batches = [draw(script, netG, args.seed, 2**40 + i, n) for i in range(0, max(n, 256), n)]
        model = quantize(model, groups, batches)
    strip(model)
    model.ir_version = helper.find_min_ir_version_for(model.opset_import)  # for old runtimes
    helper.set_model_props(model, describe(args, netG, classes, run, sha256))
    onnx.checker.check_model(model, full_check=True)
    with dcgan.atomic_write(Path(args.out)) as f:
        f.write(model.SerializeToString())
        f.flush()
        result = compare(script, netG, f.name, args) if args.verify else "not compared with PyTorch"
    megabytes = Path(args.out).stat().st_size / 1e6
    print(f"{args.out}: {megabytes:.2f} MB, {args.precision}, opset {args.opset}; {result}")
    if netG.config["nc"] in (1, 3):
        print(f"next: python infer_ort.py {shlex.quote(args.out)}")

def main():
    """One line, exit code 1, for what the user can mend, as in the training scripts."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show a file's name
            stream.reconfigure(errors="backslashreplace")
    logging.disable(logging.WARNING)  # of torch.onnx and onnxruntime.quantization
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or temporary files would stay
    try:
        export(get_args())
    except MENDABLE as e:
        sys.exit(f"export.py: error: {' '.join(str(e).split()) or type(e).__name__}")

if __name__ == "__main__":
    main()
