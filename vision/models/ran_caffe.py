"""Weights of Residual Attention Network that were trained with the authors' Caffe definitions.

The authors published the network definitions (fwang91/residual-attention-network) and no weights.
Whoever holds a `.caffemodel` of these definitions can read it here without Caffe.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checkpoint import CheckpointError, listing
from .ran_blocks import AttentionModule, PreActUnit

# Field numbers of caffe.proto.
_NET_LAYER, _NET_V1_LAYERS = 100, 2
_LAYER_NAME, _LAYER_BLOBS = 1, 7
_BLOB_LEGACY_SHAPE, _BLOB_DATA, _BLOB_SHAPE, _SHAPE_DIM = (1, 2, 3, 4), 5, 7, 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

_BN_EPS = 1e-5


def read_caffemodel(path: str | Path) -> dict[str, Tensor]:
    """Read the parameters in a `.caffemodel` file.

    Args:
        path: binary protocol buffer of Caffe's NetParameter.

    Returns:
        "LAYER/i" -> float32 tensor, the i-th blob of each layer that has any.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is truncated, of Caffe's first format, or holds no parameters.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"the checkpoint {path} does not exist")
    found: dict[str, Tensor] = {}
    try:
        for number, layer in _fields(memoryview(path.read_bytes())):
            if number == _NET_V1_LAYERS:
                raise CheckpointError(
                    f"{path} has layers of Caffe's first format (before 2014); "
                    "upgrade_net_proto_binary of Caffe renews it"
                )
            if number == _NET_LAYER:
                name = next(bytes(v).decode() for n, v in _fields(layer) if n == _LAYER_NAME)
                blobs = [v for n, v in _fields(layer) if n == _LAYER_BLOBS]
                found |= {f"{name}/{i}": _blob(blob) for i, blob in enumerate(blobs)}
    except (IndexError, ValueError, StopIteration) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) is truncated or no .caffemodel: {error}"
        ) from error
    if not found:
        raise CheckpointError(f"{path} holds no layer with parameters; is it a .caffemodel?")
    return found


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _fields(data: Any) -> Iterator[tuple[int, Any]]:
    """Field numbers and values of a protocol buffer message, in order."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == _BYTES:
            length, at = _varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            length = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"byte {at}: no field has the wire type {kind}")
        if at + length > len(data):
            raise ValueError(f"byte {at}: a field of {length} bytes ends behind the file")
        yield number, data[at : at + length]
        at += length


def _packed_varints(data: Any) -> list[int]:
    if isinstance(data, int):
        return [data]
    numbers, at = [], 0
    while at < len(data):
        number, at = _varint(data, at)
        numbers.append(number)
    return numbers


def _blob(data: memoryview) -> Tensor:
    """A BlobProto as a float32 tensor."""
    pieces, shape, legacy = [], None, dict.fromkeys(_BLOB_LEGACY_SHAPE, 1)
    for number, value in _fields(data):
        if number == _BLOB_DATA:
            pieces.append(bytes(value))  # packed, or one piece a number
        elif number == _BLOB_SHAPE:
            shape = [d for n, v in _fields(value) if n == _SHAPE_DIM for d in _packed_varints(v)]
        elif number in legacy:
            legacy[number] = value
    values = np.frombuffer(b"".join(pieces), "<f4").copy()
    return torch.from_numpy(values).reshape(list(legacy.values()) if shape is None else shape)


def is_caffe(state: Mapping[str, Tensor]) -> bool:
    """Whether parameters are those of `read_caffemodel`."""
    return "conv1/0" in state


def caffe_layers(model: Any) -> dict[str, str]:
    """The Caffe definition's layers with parameters -> modules of a `ResidualAttentionNet`.

    Args:
        model: a network of the published structure (p = 1, r = 1, three stages with modules and a
            fourth without).
    """
    namer = _Names(isinstance(model.stages[0][0], PreActUnit))
    found = {"conv1": "stem.conv", "conv1/bn": "stem.bn", "classifier": "head.fc"}
    source = "pool1_3x3_s2"
    for i, stage in enumerate(model.stages):
        units = modules = 0
        for j, block in enumerate(stage):
            path = f"stages.{i}.{j}"
            if isinstance(block, AttentionModule):
                modules += 1
                name = f"Attention{'ABC'[i]}_{modules}"
                found |= namer.attention(block, path, name, source)
            else:
                units += 1
                name = f"pre_res_{i + 1}" if i < 3 else f"post_res_4_{units}"
                found |= namer.unit(block, path, name, source)
            source = name
    if namer.pre_activation:
        found[f"{source}/bn"] = "norm.0"
    return found


class _Names:
    """Layer names of the pre-activation or of the ResNeXt definition."""

    def __init__(self, pre_activation: bool) -> None:
        self.pre_activation = pre_activation
        self.tail = "_sample" if pre_activation else ""

    def unit(self, unit: Any, path: str, name: str, source: str) -> dict[str, str]:
        """Layers of a residual unit that reads the blob `source`."""
        branch, shortcut = f"{name}/branch1", f"{name}/branch2/conv1_1x1"
        convs = [f"{branch}/conv{i}" for i in ("1_1x1", "2_3x3", "3_1x1")]
        # A pre-activation norm is named after the blob that it reads.
        norms = [source, *convs[:2]] if self.pre_activation else convs
        found = {layer: f"{path}.conv{i}" for i, layer in enumerate(convs, 1)}
        found |= {f"{layer}/bn": f"{path}.bn{i}" for i, layer in enumerate(norms, 1)}
        if isinstance(unit.proj, torch.nn.Conv2d):
            found[shortcut] = f"{path}.proj"
            if not self.pre_activation:
                found[f"{shortcut}/bn"] = f"{path}.proj_bn"
        return found

    def attention(self, module: Any, path: str, name: str, source: str) -> dict[str, str]:
        """Layers of an attention module that reads the blob `source`."""
        found: dict[str, str] = {}
        rows = [(f"{path}.pre.{i}", u) for i, u in enumerate(module.pre)]
        rows += [(f"{path}.trunk.{i}", u) for i, u in enumerate(module.trunk)]
        for i, (place, unit) in enumerate(rows, 1):
            found |= self.unit(unit, place, f"{name}/trunk/res{i}", source)
            source = f"{name}/trunk/res{i}"
        found |= self._mask(module.mask, f"{path}.mask", f"{name}/mask")
        return found | self.unit(module.post[0], f"{path}.post.0", name, f"{name}/fusion")

    def _mask(self, mask: Any, path: str, name: str) -> dict[str, str]:
        down, up = f"{name}/down{self.tail}", f"{name}/up{self.tail}"
        found: dict[str, str] = {}
        for k, row in enumerate(mask.down, 1):
            source = f"{down}/pool{k}_3x3_s2"
            for q, unit in enumerate(row, 1):
                place = f"{path}.down.{k - 1}.{q - 1}"
                found |= self.unit(unit, place, f"{down}/res{k}_{q}", source)
                source = f"{down}/res{k}_{q}"
        for k, (skip, row) in enumerate(zip(mask.skip, mask.up, strict=True), 1):
            level = f"{down}/res{k}_{len(mask.down[k - 1])}"
            found |= self.unit(skip, f"{path}.skip.{k - 1}", f"{name}/skip/res{k}", level)
            found |= self.unit(row[0], f"{path}.up.{k - 1}.0", f"{up}/res{k}_1", f"{up}{k}")
        head = f"{path}.head"
        found |= {f"{name}/linear_{i}": f"{head}.conv{i}" for i in (1, 2)}
        found[f"{name}/linear_1/bn"] = f"{head}.bn"
        if self.pre_activation:
            found[f"{up}/interp_1/bn"] = f"{head}.norm.0"
        return found


def from_caffe(state: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Caffe's blobs as the state of a `ResidualAttentionNet`.

    A convolution has one blob, the classifier weight and bias, a norm scale, shift, and the running
    means of the mean and of the inverse standard deviation.

    Args:
        state: as `read_caffemodel` gives it.
        model: the network that will load the result.

    Raises:
        CheckpointError: layers or blobs that do not fit the model.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    layers = caffe_layers(model)
    strangers = sorted({key.rpartition("/")[0] for key in state} - set(layers))
    missing = sorted(name for name in layers if f"{name}/0" not in state)
    if strangers or missing:
        raise CheckpointError(
            "the Caffe weights do not fit this model.\n"
            f"  layers not in the model ({len(strangers)}): {listing(strangers) or '-'}\n"
            f"  layers not in the file ({len(missing)}): {listing(missing) or '-'}\n"
            "Check the model's name: ran56, ran92, ranext56 or ranext92."
        )
    found: dict[str, Tensor] = {}
    for layer, path in layers.items():
        module, blobs = modules[path], _blobs(state, layer)
        names = [name for name, _ in module.named_parameters()]
        if isinstance(module, torch.nn.BatchNorm2d):
            names += ["running_mean", "running_var"]
            found[f"{path}.num_batches_tracked"] = torch.tensor(0)
        wanted = [getattr(module, name) for name in names]
        if [b.numel() for b in blobs] != [w.numel() for w in wanted]:
            raise CheckpointError(
                f"layer {layer}: wanted blobs of {[tuple(w.shape) for w in wanted]}, got "
                f"{[tuple(b.shape) for b in blobs]}"
            )
        for name, blob, w in zip(names, blobs, wanted, strict=True):
            if name == "running_var":
                blob = (blob.double().pow(-2) - _BN_EPS).clamp_min(0).float()
            # Caffe pads the shapes of vectors and matrices with ones.
            found[f"{path}.{name}"] = blob.reshape(w.shape)
    return found


def _blobs(state: Mapping[str, Tensor], layer: str) -> list[Tensor]:
    found: list[Tensor] = []
    while f"{layer}/{len(found)}" in state:
        found.append(state[f"{layer}/{len(found)}"])
    return found
