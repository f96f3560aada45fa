"""Whether training in bfloat16 is faster: read off the processor and the network, not measured.

A measurement would depend on what else the machine does, and two runs of one command would differ.
"""

from collections.abc import Mapping

import torch

from morphgraph.graph import ChannelGraph

_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16")  # x86, x86, arm


def bf16_helps(graph: ChannelGraph, device: torch.device) -> bool:
    """Whether the device has instructions for it and the network no grouped convolutions.

    Grouped convolutions, depthwise ones above all, have hardly any arithmetic per byte; the
    conversions cost more than they bring there.
    """
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        known: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        able = any(known.get(name) for name in _INSTRUCTIONS)
    grouped = any(
        op.ir.op_type == "Conv" and op.ir.attributes.get_int("group", 1) > 1 for op in graph.ops
    )
    return bool(able) and not grouped
