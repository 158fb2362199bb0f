"""What RWKV programs build by `torch.utils.cpp_extension.load`, as data.

An extension is functions without autograd: forward and backward are two of them. Those of the
recurrences write into tensors that they are given, those of the steps around them return theirs.
Each is written here as the list of its arguments, and of what it returns, in upstream's order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

# Arguments that are no tensors: the sizes of a recurrence's call, and those of other functions.
SIZES = ("B", "T", "C", "H")
INTEGERS = (*SIZES, "head_size", "chunk_rows")


@dataclass(frozen=True, slots=True, kw_only=True)
class Extension:
    """One extension.

    name: what `load` is called with, and the namespace of its functions in torch.ops.
    op: the operator behind it, or what is composed of several.
    functions: the arguments of each. `INTEGERS` are ints, the rest tensors; "q:r" is
        upstream's q and our r; "y!" is written into. "s" and "sa" are buffers in which upstream
        keeps what its backward reads. "w:factor" is the decay itself, "ww:log" its logarithm.
        After "->" stands what is returned: "dx:fp32" is dx in another dtype than ours, and "rstd-"
        something that upstream's backward reads and ours does not, a tensor without elements.
    decay: what "w" is.
    """

    name: str
    op: str
    functions: Mapping[str, str]
    decay: str = "loglog"


_CLAMPED = {
    "forward": "r w k v a b y! s! sa!",
    "backward": "r w k v a b dy s sa dr! dw! dk! dv! da! db!",
}
_BONUS_GRADIENTS = "gy:dy gr:dr! gk:dk! gv:dv! gw:dw! gu:du!"
_MIXED = "x x_r x_w x_k x_v x_a x_g"
_MIX6 = {
    "forward": f"{_MIXED} -> r w k v a g",
    "backward": "grad_r:dr grad_w:dw grad_k:dk grad_v:dv grad_a:da grad_g:dg "
    f"{_MIXED} -> dx dx_r dx_w dx_k dx_v dx_a dx_g",
}
_OF_KEYS = "grad_new_k:dnew_k grad_neg_kk:dneg_kk grad_kka:dkk_a k k_k a k_a"
_KEYS = "k k_k a k_a head_size -> new_k neg_kk kk_a"
_RESIDUAL = "v v_first v0 v12:x"
_READ = "x:y r k v r_k weight bias g"
_CHANNELS = "x x_k key_weight value_weight"
_CHANNEL_MIX = {
    "forward": f"{_CHANNELS} -> out mixed products",
    "backward": f"grad_out:dout {_CHANNELS} mixed act:products "
    "-> dx dx_k dkey_weight dvalue_weight",
}
_LOSS = {
    "forward": "logits targets -> loss lse maximum argmax",
    "backward": "grad_loss:dloss logits targets lse max_vals:maximum argmax -> dlogits",
}
_INFERENCE = dict.fromkeys(
    ("forward_bf16", "forward_fp16", "forward_fp32"), "B T C H state! r k v w:factor u y!"
)

_ALL = (
    Extension(
        name="wind_backstepping",
        op="wkv7",
        functions={
            "forward": "w q:r k v z:a a:b y! s! sa!",
            "backward": "w q:r k v z:a a:b dy s sa dw! dq:dr! dk! dv! dz:da! da:db!",
        },
    ),
    Extension(name="rwkv7_clampw", op="wkv7", functions=_CLAMPED, decay="logit"),
    Extension(name="rwkv7_clampw_v3", op="wkv7", functions=_CLAMPED, decay="logit"),
    Extension(
        name="rwkv7_state_clampw",
        op="wkv7",
        functions={
            "forward": "s0:initial_state r w k v a b y! s! sa!",
            "backward": "r w k v a b dy s sa ds0:dinitial_state! dr! dw! dk! dv! da! db!",
        },
        decay="logit",
    ),
    Extension(
        name="rwkv7_statepassing_clampw",
        op="wkv7",
        functions={
            "forward": "s0:initial_state r w k v a b y! sT:final_state! s! sa!",
            "backward": "r w k v a b dy dsT:dfinal_state s sa "
            "ds0:dinitial_state! dr! dw! dk! dv! da! db!",
        },
        decay="logit",
    ),
    Extension(name="wkv7", op="wkv7", functions={"forward": "B T C H r w k v a b y!"}),
    Extension(
        name="wkv7s",
        op="wkv7",
        functions=dict.fromkeys(
            ("forward", "forward_bf16", "forward_fp16", "forward_fp32"),
            "B T C H state! r w k v a b y!",
        ),
    ),
    Extension(
        name="wkv6",
        op="wkv6",
        functions={
            "forward": "B T C H r k v w u y!",
            "backward": f"B T C H r k v w u {_BONUS_GRADIENTS}",
        },
    ),
    Extension(
        name="wkv6state",
        op="wkv6",
        functions={
            "forward": "B T C H r k v w u s:initial_state y!",
            "backward": f"B T C H r k v w u s:initial_state {_BONUS_GRADIENTS} gs:dinitial_state!",
        },
    ),
    Extension(
        name="wkv5",
        op="wkv5",
        functions={
            "forward": "B T C H r k v w:factor u y!",
            "backward": f"B T C H r k v w:factor ww:log u {_BONUS_GRADIENTS}",
        },
    ),
    Extension(name="rwkv6", op="wkv6", functions=_INFERENCE),
    Extension(name="rwkv5", op="wkv5", functions=_INFERENCE),
    Extension(name="rwkv7_tmix_mix6_bf16_v2", op="token_shift_mix", functions=_MIX6),
    Extension(name="rwkv7_tmix_mix6_bf16_v5", op="token_shift_mix", functions=_MIX6),
    Extension(
        name="rwkv7_tmix_kk_pre_bf16_v2",
        op="kk_pre",
        functions={
            "forward": f"{_KEYS} denom-",
            "backward": f"{_OF_KEYS} neg_kk denom head_size -> dk dk_k da dk_a",
        },
    ),
    Extension(
        name="rwkv7_tmix_kk_pre_bf16_v5",
        op="kk_pre",
        functions={
            "forward": f"{_KEYS} inv_d-",
            "backward": f"{_OF_KEYS} inv_d head_size -> dk dk_k da dk_a",
        },
    ),
    Extension(
        name="rwkv7_tmix_a_gate_bf16",
        op="a_gate",
        functions={
            "forward": "a0 a12:x -> y",
            "backward": "grad_out:dy a0 a12:x -> da0 dx",
        },
    ),
    Extension(
        name="rwkv7_tmix_vres_gate_bf16_v1",
        op="vres_gate",
        functions={
            "forward": f"{_RESIDUAL} -> y",
            "backward": f"grad_out:dy {_RESIDUAL} -> dv dv_first dx:fp32",
        },
    ),
    Extension(
        name="rwkv7_tmix_vres_gate_bf16_v3",
        op="vres_gate",
        functions={
            "forward": f"{_RESIDUAL} -> y",
            "backward": f"grad_out:dy {_RESIDUAL} -> dv dv_first dv0 dx",
        },
    ),
    Extension(
        name="rwkv7_tmix_lnx_rkvres_xg_bf16_v1",
        op="readout",
        functions={
            "forward": f"{_READ} -> out mean- rstd-",
            "backward": f"grad_xg:dout {_READ} mean rstd -> dy dr dk dv dr_k dweight dbias dg",
        },
    ),
    Extension(name="rwkv7_cmix_bf16_v2", op="channel_mix", functions=_CHANNEL_MIX),
    Extension(name="rwkv7_cmix_bf16_v5", op="channel_mix", functions=_CHANNEL_MIX),
    Extension(name="rwkv7_l2wrap_ce_bf16_v1", op="l2wrap_cross_entropy", functions=_LOSS),
    Extension(name="rwkv7_l2wrap_ce_bf16_v2", op="l2wrap_cross_entropy", functions=_LOSS),
    Extension(
        name="rwkv7_head_l2wrap_ce_bf16_v4",
        op="head_l2wrap_cross_entropy",
        functions={"forward": "hidden weight targets chunk_rows -> loss dhidden dweight"},
    ),
)
EXTENSIONS: Mapping[str, Extension] = MappingProxyType(
    {extension.name: extension for extension in _ALL}
)


@dataclass(frozen=True, slots=True)
class Function:
    """One function of an extension.

    arguments: upstream's name, our name, and whether it is written into, for each.
    returns: our name and the mark behind it, for each: a dtype, "-" or nothing.
    """

    extension: Extension
    name: str
    arguments: tuple[tuple[str, str, bool], ...] = field(init=False)
    returns: tuple[tuple[str, str], ...] = field(init=False)

    def __post_init__(self) -> None:
        words, _, returned = self.extension.functions[self.name].partition("->")
        pairs = [(word, word.rstrip("!").partition(":")) for word in words.split()]
        parsed = tuple((head, ours or head, word[-1] == "!") for word, (head, _, ours) in pairs)
        object.__setattr__(self, "arguments", parsed)
        marked = [word.replace("-", ":-").partition(":") for word in returned.split()]
        object.__setattr__(self, "returns", tuple((name, mark) for name, _, mark in marked))

    @property
    def title(self) -> str:
        """What a program calls it."""
        return f"torch.ops.{self.extension.name}.{self.name}"

    @property
    def schema(self) -> str:
        """For torch.library, as "forward(int B, Tensor r, Tensor(a!) y) -> ()"."""
        letters = iter("abcdefghijklmnop")
        parts = [
            f"{'int' if name in INTEGERS else f'Tensor({next(letters)}!)' if written else 'Tensor'}"
            f" {name}"
            for name, _, written in self.arguments
        ]
        returned = {0: "()", 1: "Tensor"}.get(len(self.returns), "Tensor[]")
        return f"{self.name}({', '.join(parts)}) -> {returned}"
