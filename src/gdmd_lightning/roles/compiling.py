"""Regional compilation: ``torch.compile`` of the repeated blocks of a network, in place.

Names in state dicts stay, and blocks with equal code and shapes share what is compiled, in all roles.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

LIMIT = 64
"""Variants of a block that may be compiled; one more is an error.

Torch's own limit is 8. An update of DMD needs 11 where a network has two kinds of blocks: with gradient for weights,
for the input or for nothing, and for as many samples as each role is given.
"""


def compile_blocks(network: nn.Module, kinds: Sequence[str], hooked: nn.Module | None = None) -> None:
    """Let each block of a network be compiled when it is called; nothing is compiled yet.

    Args:
        network: The network.
        kinds: Names of the blocks' classes.
        hooked: A block that is not compiled, since hooks are added to it later, which compiled code would not call.
    """
    from torch._dynamo import config  # takes long to import

    config.recompile_limit = max(config.recompile_limit, LIMIT)
    for module in network.modules():
        if type(module).__name__ in kinds and module is not hooked:
            # The whole block or an error: nobody would see that torch left out a part of it.
            module.compile(fullgraph=True)
