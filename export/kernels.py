"""Which kernels a compiler made: attention that it may take apart, and what an engine's file lists."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from ppcl_fx.export.tensorrt_api import Api

_KERNEL = re.compile(rb"\n {2}(function|fully_connected|convolution|matmul)=\{ name=\"?([^\s\"]+)")
_HASH = re.compile(r"_0x[0-9a-f]{16,}")
FUSED_ATTENTION = "_gemm_mha_v2"
"""What TensorRT for RTX calls its kernel of a whole attention."""


def let_take_apart(api: Api, network: Any) -> int:
    """Let the compiler write attention out where it has no kernel for its type and head size; return how many there
    are. Where it has one it takes that as before.
    """
    if not api.has("IAttentionBoundaryLayer"):
        return 0
    count = 0
    for index in range(api.get("INetworkDefinition.num_layers", network) or 0):
        layer = api.call("INetworkDefinition.get_layer", network, index=index)
        if api.get("ILayer.type", layer) == api.value("LayerType.ATTENTION_INPUT"):
            layer.__class__ = api.value("IAttentionBoundaryLayer")  # a parsed network hands out plain layers
            api.set("IAttention.decomposable", api.get("IAttentionBoundaryLayer.attention", layer), True)
            count += 1
    return count


def kernels(engine: bytes) -> Counter[str]:
    """Count the kernels that an engine of TensorRT for RTX lists, by name; ``__myl_MulSum`` is a product and a sum in
    one. The list is text in the file, which NVIDIA does not document; its own report needs the engine on a GPU.
    """
    names = (match[2] if match[1] == b"function" else match[1] for match in _KERNEL.finditer(engine))
    return Counter(_HASH.sub("", name.decode("ascii", "replace")) for name in names)
