"""A trained generator as one ONNX file that explains itself.

Takes the checkpoints of gan.py, dcgan.py and acgan.py, and other people's DCGAN state dicts. BatchNorm is folded into
the convolutions, the file carries its sizes, classes and origin as metadata, and nothing is written that does not give
PyTorch's pictures.

    python export.py runs/dcgan-digits                                   # float32
    python export.py runs/dcgan-digits --precision int8 --uint8 -o digits.onnx      # for CPUs: small and fast
    python export.py netG_epoch_24.pth --precision fp16                  # for GPUs; float32 at the edges

Input z (N, nz) float32 ~ N(0, 1), for acgan also labels (N) int64. Output images: (N, nc, H, W) float32 in [-1, 1], or
with --uint8 (N, H, W, nc) uint8.
"""

import argparse
import contextlib
import copy
import hashlib
import itertools
import json
import logging
import math
import shlex
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
# How far ONNX Runtime's pictures may be from PyTorch's: greatest difference in [-1, 1], or least PSNR in dB.
TOLERANCE = {"fp32": (1e-4, 0), "fp16": (math.inf, 40), "int8": (math.inf, 35)}

def get_args(argv=None):
    p = argparse.ArgumentParser(prog="export.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("checkpoint", help="checkpoint.pt, the folder of a run, or a DCGAN generator's state dict")
    p.add_argument("-o", "--out", metavar="MODEL.onnx", help="where to write (beside the checkpoint)")
    p.add_argument("--precision", choices=TOLERANCE, default="fp32", help="fp16 is for GPUs, int8 for CPUs (fp32)")
    p.add_argument("--uint8", action="store_true", help="the graph ends in pixels, uint8 (N, H, W, nc)")
    p.add_argument("--phases", action=argparse.BooleanOptionalAction,
                   help="transposed convolutions as phases, faster on CPUs (for fp32 and int8)")
    p.add_argument("--opset", type=int, default=17, help="ONNX operator set; ONNX Runtime 1.15 and later load 17 (17)")
    p.add_argument("--batch_size", type=int, help="a fixed batch size (any)")
    p.add_argument("--seed", type=int, default=0, help="of the latents for int8's calibration and for the check (0)")
    p.add_argument("--no-verify", dest="verify", action="store_false", help="do not compare with PyTorch")
    args = p.parse_args(argv)
    if args.precision == "int8" and args.phases is False:
        p.error("--no-phases: ONNX Runtime has no int8 transposed convolution; choose fp32 or fp16")
    args.phases = args.precision != "fp16" if args.phases is None else args.phases
    args.checkpoint = dcgan.last_checkpoint(args.checkpoint)
    suffix = "" if args.precision == "fp32" else f"_{args.precision}"
    args.out = args.out or f"{Path(args.checkpoint).with_suffix('')}{suffix}.onnx"
    if Path(args.out).suffix != ".onnx":  # it could be the checkpoint's own name
        p.error(f"--out {args.out}: give a name that ends in .onnx")
    return args

# -------------------------------------------------------------------------------------------------------- model

def load(path):
    """(module of the script, netG in eval mode, names of its classes, what else the file says of its training)."""
    ckpt = dcgan.load_checkpoint(path, [*SCRIPTS, None])
    run = ckpt if "script" in ckpt else {"script": "dcgan"}  # somebody else's
    script = SCRIPTS[run["script"]]
    return script, *script.load_generator(path), run

def fold_batchnorm(net):
    """Each BatchNorm becomes part of the layer before it: the same function in fewer operations."""
    for parent in list(net.modules()):
        names = list(parent._modules)
        for a, b in itertools.pairwise(names):
            conv, bn = parent._modules[a], parent._modules[b]
            if isinstance(conv, nn.ConvTranspose2d) and isinstance(bn, nn.BatchNorm2d):
                parent._modules[a], parent._modules[b] = fuse_conv_bn_eval(conv, bn, transpose=True), nn.Identity()
            elif isinstance(conv, nn.Linear) and isinstance(bn, nn.BatchNorm1d):
                parent._modules[a], parent._modules[b] = fuse_linear_bn_eval(conv, bn), nn.Identity()
    return net

class Exported(nn.Module):
    """netG with the file's inputs and outputs: float32 outside whatever it is inside, pixels at the end if `uint8`."""

    def __init__(self, netG, half, uint8):
        super().__init__()
        self.netG, self.half_inside, self.uint8 = netG.half() if half else netG, half, uint8

    def forward(self, z, labels=None):
        z = z.half() if self.half_inside else z
        x = (self.netG(z) if labels is None else self.netG(z, labels)).float()
        if self.uint8:  # as to_uint8 in the three scripts
            x = (x * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        return x

def draw(script, netG, seed, start, n):
    """Inputs of netG, by name: latents start to start + n - 1 of the seed, and labels in turn where it takes them."""
    inputs = {"z": script.latents(seed, start, n, netG.config["nz"])}
    if "n_classes" in netG.config:
        inputs["labels"] = np.arange(start, start + n) % netG.config["n_classes"]
    return inputs

def to_onnx(net, inputs, batch_size, opset):
    """onnx.ModelProto of `net`, through torch.export. inputs: at least two examples, by name."""
    example = {k: torch.from_numpy(v[:batch_size or 2]) for k, v in inputs.items()}  # 1 would be taken for a constant
    dynamic = None if batch_size else {k: {0: torch.export.Dim("N")} for k in example}
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        model = torch.onnx.export(net, (), kwargs=example, dynamo=True, dynamic_shapes=dynamic, opset_version=opset,
                                  input_names=list(example), output_names=["images"], verbose=False).model_proto
    written = model.opset_import[0].version
    if written != opset:
        raise OSError(f"--opset {opset}: torch.onnx {torch.__version__} gives {written} for this net; choose that")
    reshape_plainly(model)
    return model

def reshape_plainly(model):
    """The same function for OpenCV 4, which reads no Unsqueeze of two axes and takes labels (N) for (N, 1)."""
    made_by, nodes = {n.output[0]: n for n in model.graph.node}, []
    nz = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    for n in model.graph.node:
        x, name = n.input[0], n.output[0]
        if n.op_type == "Gather":  # of embeddings: (N) -> (N, nz)
            n.output[0] = f"{name}.rows"
            shape = constant(model, f"{name}.shape", [-1, nz])
            nodes += [n, helper.make_node("Reshape", [f"{name}.rows", shape], [name])]
        elif n.op_type == "Unsqueeze":  # of z: (N, nz) -> (N, nz, 1, 1)
            shape = constant(model, f"{name}.shape", [-1, nz, 1, 1])
            nodes.append(helper.make_node("Reshape", [x, shape], [name]))
        else:
            nodes.append(n)
        if n.op_type == "Reshape":
            n.ClearField("attribute")  # allowzero
            if x in made_by and made_by[x].op_type == "Unsqueeze":
                n.input[0] = made_by[x].input[0]
    used = {x for n in nodes for x in n.input} | {"images"}
    replace_nodes(model, [n for n in nodes if n.output[0] in used])

def constant(model, name, value):
    """Adds a tensor to the file, and returns its name."""
    model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
    return name

def replace_nodes(model, nodes):
    """Gives a model these nodes, and drops what no node uses any more."""
    used = {i for n in nodes for i in n.input}
    keep = [t for t in model.graph.initializer if t.name in used]
    for field, values in ((model.graph.node, nodes), (model.graph.initializer, keep), (model.graph.value_info, [])):
        del field[:]
        field.extend(values)

# ------------------------------------------------------------------------------------------------------- phases

class Dense(nn.Module):
    """A transposed convolution of 1x1 pictures as the matrix product that it is: (N, nz, 1, 1) -> (N, C, 4, 4)."""

    def __init__(self, conv):
        super().__init__()
        self.shape = (conv.out_channels, *conv.kernel_size)
        self.linear = nn.Linear(conv.in_channels, math.prod(self.shape))
        self.linear.weight.data = conv.weight.data.flatten(1).T.contiguous()
        self.linear.bias.data = conv.bias.data.repeat_interleave(math.prod(conv.kernel_size))

    def forward(self, z):
        return self.linear(z.flatten(1)).unflatten(1, self.shape)

def to_phases(model):
    """Rewrites every 4x4 stride-2 transposed convolution but the last, exactly, as four 2x2 convolutions: one for each
    parity of the output's row and column.

    In one dimension y[2i] = x[i-1] w[3] + x[i] w[1], y[2i+1] = x[i] w[2] + x[i+1] w[0]. The four are interleaved in
    NHWC, where that is copying runs of bytes. On CPUs this is faster than ConvTranspose, and ONNX Runtime has it in
    int8. The last one has 1 or 3 channels and little work: it stays.

    Returns lists of tensors that an int8 model must give one range, for their bytes are joined; the second of each
    list is after ReLU.
    """
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    relu_after = {n.input[0]: n for n in model.graph.node if n.op_type == "Relu"}
    convs = [n for n in model.graph.node if n.op_type == "ConvTranspose"][:-1]
    done, groups, size = [], [], 4

    def node(op, inputs, output, **attributes):
        done.append(helper.make_node(op, inputs, [output], output, **attributes))
        return output

    for n in model.graph.node:
        name = n.output[0]
        if n.op_type == "Relu" and any(n.input[0] == conv.output[0] for conv in convs):
            continue  # it has become four
        if n not in convs:
            done.append(n)
            groups += [[n.input[0], name]] if n.op_type == "Relu" else []
            continue
        w, bias, group, rows = weights[n.input[1]], n.input[2:], [], []  # w: (in, out, 4, 4)
        for a in (0, 1):
            columns = []
            for b in (0, 1):
                taps, phase = ([3, 1], [2, 0]), f"{name}.{a}{b}"
                kernel = w[:, :, taps[a]][:, :, :, taps[b]].transpose(1, 0, 2, 3)
                y = node("Conv", [n.input[0], constant(model, f"{phase}.weight", kernel), *bias], phase,
                         kernel_shape=[2, 2], pads=[1 - a, 1 - b, a, b])
                group += [y, node("Relu", [y], f"{phase}.relu")]
                columns.append(node("Transpose", [group[-1]], f"{phase}.nhwc", perm=[0, 2, 3, 1]))
            group.append(node("Concat", columns, f"{name}.{a}.columns", axis=3))
            shape = constant(model, f"{name}.{a}.shape", [0, size, 1, 2 * size * w.shape[1]])
            rows.append(node("Reshape", [group[-1], shape], f"{name}.{a}.row"))
        group.append(node("Concat", rows, f"{name}.rows", axis=2))
        size *= 2
        shape = constant(model, f"{name}.shape", [0, size, size, w.shape[1]])
        nhwc = node("Reshape", [group[-1], shape], f"{name}.nhwc")
        node("Transpose", [nhwc], relu_after[name].output[0], perm=[0, 3, 1, 2])
        groups.append(group)
    replace_nodes(model, done)
    return groups

# --------------------------------------------------------------------------------------------------------- int8

def store_first_in_int8(model):
    """The first matrix as int8 in the file, float in memory: latents suffer most from 8 bits, so they are spared them.

    ONNX Runtime computes the float matrix once, when it loads the file.
    """
    first = next(n for n in model.graph.node if n.op_type == "Gemm")
    w = numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == first.input[1]))  # (out, in)
    scale = np.maximum(np.abs(w).max(1, keepdims=True), 1e-12) / 127
    name = first.output[0]
    int8 = constant(model, f"{name}.int8", np.round(w / scale).astype(np.int8))
    first.input[1] = f"{name}.weight"
    replace_nodes(model, [
        helper.make_node("Cast", [int8], [f"{name}.cast"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{name}.cast", constant(model, f"{name}.scale", scale)], [f"{name}.weight"]),
        *model.graph.node])

def best_range(x):
    """The upper end t of [0, t] at which rounding x >= 0 to 255 steps of it makes the least squared error."""
    tops = max(float(x.max()), 1e-6) * np.linspace(0.5, 1, 26)
    return min(tops, key=lambda t: np.square(np.minimum(np.round(x * (255 / t)), 255) * (t / 255) - x).mean())

def quantize(model, groups, batches):
    """The int8 form of a float32 model: activations uint8, weights int8 for each channel.

    groups: what to_phases returned. batches: inputs, by name. No data set is needed: what a generator is fed is known,
    z ~ N(0, 1).
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    store_first_in_int8(model)
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    tensors = [t for group in groups for t in group if t.endswith(".relu") or t == group[1]]
    probe.graph.output.extend(onnx.ValueInfoProto(name=t) for t in tensors)
    session = ort.InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    seen = {t: [] for t in tensors}
    for batch in batches:
        for t, x in zip(tensors, session.run(tensors, batch)):
            seen[t].append(x.ravel()[::max(1, x.size >> 16)])
    ranges = {}
    for group in groups:
        top = best_range(np.concatenate([x for t in group for x in seen.get(t, ())]))
        ranges |= {t: [{"rmin": np.float32(0), "rmax": np.float32(top)}] for t in group}

    class Reader(CalibrationDataReader):  # for the tensors that have no range yet
        def __init__(self):
            self.left = batches[:]

        def get_next(self):
            return self.left.pop() if self.left else None

    in_float = [n.name for n in model.graph.node if n.op_type == "ConvTranspose"]
    in_float += [n.name for n in model.graph.node if n.op_type == "Gemm"][:1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "int8.onnx")
        quantize_static(model, path, Reader(), per_channel=True, activation_type=QuantType.QUInt8,
                        weight_type=QuantType.QInt8, nodes_to_exclude=in_float,
                        op_types_to_quantize=["Conv", "Gemm", "Relu", "Transpose", "Concat", "Reshape"],
                        extra_options={"TensorQuantOverrides": ranges})
        return onnx.load(path)

# --------------------------------------------------------------------------------------------------------- file

def describe(args, netG, classes, run):
    """The file's metadata, str -> str: all that a program needs to use it, and where it comes from; no local path."""
    layout, values = ("NHWC", "0 to 255") if args.uint8 else ("NCHW", "-1 to 1")
    config, dataset = netG.config, str(run.get("args", {}).get("dataset", "unknown"))
    meta = {
        "format_version": 1, "script": run["script"], "nz": config["nz"], "nc": config["nc"],
        "img_size": config["img_size"], "n_classes": config.get("n_classes", 0),
        "classes": json.dumps(classes), "layout": layout, "value_range": values,
        "precision": args.precision, "latent": "N(0, 1)",
        "dataset": PureWindowsPath(dataset).name,  # slashes of both kinds end a folder
        "steps": run.get("step", "unknown"), "weights": "ema" if "netG_ema" in run else "unknown",
        "checkpoint_sha256": hashlib.sha256(Path(args.checkpoint).read_bytes()).hexdigest(),
        "versions": f"torch {torch.__version__}, onnx {onnx.__version__}",
    }
    return {k: str(v) for k, v in meta.items()}

def strip(model):
    """Removes stack traces, with the local paths in them, and whatever else tools leave in a file."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
        part.ClearField("doc_string")

def compare(script, netG, path, args):
    """Runs PyTorch and ONNX Runtime on the same latents; says how far they are apart. OSError if that is too far."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    worst, squares, n = 0.0, [], 0
    fixed = args.batch_size
    for size in [fixed] * max(2, 26 // fixed) if fixed else (1, 2, 7, 16):
        inputs = draw(script, netG, args.seed, n, size)
        (got,) = session.run(["images"], inputs)
        with torch.no_grad():
            want = netG(*map(torch.from_numpy, inputs.values()))
        if not want.isfinite().all():
            raise OSError(f"{args.checkpoint}: makes pictures that are not finite; its training diverged")
        want = script.to_uint8(want) if args.uint8 else want.numpy()
        difference = (got.astype(np.float64) - want) / (127.5 if args.uint8 else 1)
        worst, n = max(worst, np.abs(difference).max()), n + size
        squares.append(np.square(difference).ravel())
    error = np.concatenate(squares).mean()
    psnr = 10 * math.log10(4 / error) if error else math.inf
    most, least = TOLERANCE[args.precision]
    most = max(most, 1 / 127.5 + 1e-9) if args.uint8 else most
    level = f"{worst * 127.5:.0f} levels of 255" if args.uint8 else f"{worst:.2g} in [-1, 1]"
    result = f"greatest difference from PyTorch {level}, PSNR {psnr:.1f} dB over {n} pictures"
    if not (worst <= most and psnr >= least):  # nor NaN
        allowed = f"at least {least} dB" if least else f"at most {most:.2g} in [-1, 1]"
        raise OSError(f"{args.out}: not written, {result}; {args.precision} has to keep to {allowed}; "
                      "try another --precision")
    return result

def export(args):
    """The file args.out, or none: what does not give PyTorch's pictures never gets that name."""
    script, netG, classes, run = load(args.checkpoint)
    net = fold_batchnorm(copy.deepcopy(netG))
    if args.phases and isinstance(net.main[0], nn.ConvTranspose2d):
        net.main[0] = Dense(net.main[0])
    for layer in net.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = False  # or the graph gets one more Reshape
    net = Exported(net, args.precision == "fp16", args.uint8).eval()
    model = to_onnx(net, draw(script, netG, args.seed, 0, max(2, args.batch_size or 0)), args.batch_size, args.opset)
    groups = to_phases(model) if args.phases else []
    if args.precision == "int8":
        n = args.batch_size or 16
        batches = [draw(script, netG, args.seed, 2**40 + i, n) for i in range(0, max(n, 256), n)]
        model = quantize(model, groups, batches)
    strip(model)
    model.ir_version = helper.find_min_ir_version_for(model.opset_import)  # old runtimes refuse files of a newer one
    facts = describe(args, netG, classes, run)
    helper.set_model_props(model, {k: v.encode(errors="backslashreplace").decode() for k, v in facts.items()})
    onnx.checker.check_model(model, full_check=True)
    with dcgan.atomic_write(Path(args.out)) as f:
        f.write(model.SerializeToString())
        f.flush()
        result = compare(script, netG, f.name, args) if args.verify else "not compared with PyTorch"
    print(f"{args.out}: {Path(args.out).stat().st_size / 1e6:.2f} MB, {args.precision}, opset {args.opset}, "
          f"BatchNorm folded; {result}\nnext: python infer_ort.py {shlex.quote(args.out)}")

def main():
    """One line for what the user can mend, as in the training scripts."""
    logging.disable(logging.WARNING)  # of torch.onnx and onnxruntime.quantization, about how they work inside
    try:
        export(get_args())
    except (OSError, MemoryError, KeyboardInterrupt, RuntimeError) as e:
        if isinstance(e, RuntimeError) and "loading state_dict" not in str(e):
            raise
        sys.exit(f"export.py: error: {' '.join(str(e).split()) or type(e).__name__}")

if __name__ == "__main__":
    main()
