"""What RWKV programs build by `torch.utils.cpp_extension.load`, as data.

An extension is functions that read tensors and write into others, without autograd: forward and
backward are two of them. Each is written here as the list of its arguments in upstream's order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

# Arguments that are no tensors.
SIZES = ("B", "T", "C", "H")


@dataclass(frozen=True, slots=True, kw_only=True)
class Extension:
    """One extension.

    op: the operator behind it.
    namespace: of its functions in torch.ops.
    functions: the arguments of each. Capital letters are ints, the rest tensors; "q:r" is
        upstream's q and our r; "y!" is written into. "s" and "sa" are buffers in which upstream
        keeps what its backward reads. "w:factor" is the decay itself, "ww:log" its logarithm.
    decay: what "w" is.
    """

    op: str
    namespace: str
    functions: Mapping[str, str]
    decay: str = "loglog"


_CLAMPED = {
    "forward": "r w k v a b y! s! sa!",
    "backward": "r w k v a b dy s sa dr! dw! dk! dv! da! db!",
}
_BONUS_GRADIENTS = "gy:dy gr:dr! gk:dk! gv:dv! gw:dw! gu:du!"
_INFERENCE = dict.fromkeys(
    ("forward_bf16", "forward_fp16", "forward_fp32"), "B T C H state! r k v w:factor u y!"
)

# By the name that `load` is called with.
EXTENSIONS: Mapping[str, Extension] = MappingProxyType({
    "wind_backstepping": Extension(
        op="wkv7",
        namespace="wind_backstepping",
        functions={
            "forward": "w q:r k v z:a a:b y! s! sa!",
            "backward": "w q:r k v z:a a:b dy s sa dw! dq:dr! dk! dv! dz:da! da:db!",
        },
    ),
    "rwkv7_clampw": Extension(
        op="wkv7", namespace="rwkv7_clampw", functions=_CLAMPED, decay="logit"
    ),
    "rwkv7_clampw_v3": Extension(
        op="wkv7", namespace="rwkv7_clampw_v3", functions=_CLAMPED, decay="logit"
    ),
    "rwkv7_state_clampw": Extension(
        op="wkv7",
        namespace="rwkv7_state_clampw",
        functions={
            "forward": "s0:initial_state r w k v a b y! s! sa!",
            "backward": "r w k v a b dy s sa ds0:dinitial_state! dr! dw! dk! dv! da! db!",
        },
        decay="logit",
    ),
    "rwkv7_statepassing_clampw": Extension(
        op="wkv7",
        namespace="rwkv7_statepassing_clampw",
        functions={
            "forward": "s0:initial_state r w k v a b y! sT:final_state! s! sa!",
            "backward": "r w k v a b dy dsT:dfinal_state s sa "
            "ds0:dinitial_state! dr! dw! dk! dv! da! db!",
        },
        decay="logit",
    ),
    "wkv7": Extension(
        op="wkv7", namespace="wkv7", functions={"forward": "B T C H r w k v a b y!"}
    ),
    "wkv7s": Extension(
        op="wkv7",
        namespace="wkv7s",
        functions=dict.fromkeys(
            ("forward", "forward_bf16", "forward_fp16", "forward_fp32"),
            "B T C H state! r w k v a b y!",
        ),
    ),
    "wkv6": Extension(
        op="wkv6",
        namespace="wkv6",
        functions={
            "forward": "B T C H r k v w u y!",
            "backward": f"B T C H r k v w u {_BONUS_GRADIENTS}",
        },
    ),
    "wkv6state": Extension(
        op="wkv6",
        namespace="wkv6state",
        functions={
            "forward": "B T C H r k v w u s:initial_state y!",
            "backward": f"B T C H r k v w u s:initial_state {_BONUS_GRADIENTS} gs:dinitial_state!",
        },
    ),
    "wkv5": Extension(
        op="wkv5",
        namespace="wkv5",
        functions={
            "forward": "B T C H r k v w:factor u y!",
            "backward": f"B T C H r k v w:factor ww:log u {_BONUS_GRADIENTS}",
        },
    ),
    "rwkv6": Extension(op="wkv6", namespace="rwkv6", functions=_INFERENCE),
    "rwkv5": Extension(op="wkv5", namespace="rwkv5", functions=_INFERENCE),
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Function:
    """One function of an extension.

    arguments: upstream's name, our name, and whether it is written into, for each.
    """

    extension: Extension
    name: str
    arguments: tuple[tuple[str, str, bool], ...] = field(init=False)

    def __post_init__(self) -> None:
        words = self.extension.functions[self.name].split()
        pairs = [(word, word.rstrip("!").partition(":")) for word in words]
        parsed = tuple((head, ours or head, word[-1] == "!") for word, (head, _, ours) in pairs)
        object.__setattr__(self, "arguments", parsed)

    @property
    def schema(self) -> str:
        """For torch.library, as "forward(int B, Tensor r, Tensor(a!) y) -> ()"."""
        letters = iter("abcdefghijklmnop")
        parts = [
            f"{'int' if name in SIZES else f'Tensor({next(letters)}!)' if written else 'Tensor'} "
            f"{name}"
            for name, _, written in self.arguments
        ]
        return f"{self.name}({', '.join(parts)}) -> ()"
