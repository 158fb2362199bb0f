"""The gates of RWKV-7, and the activation of its channel mixing."""

from __future__ import annotations

from .elementwise import Schedule, channels, elementwise, parameter

_X = channels("x", "what the gate is made of")
_A0 = parameter("a0", "added to x")
_V0 = parameter("v0", "added to x")
_V = channels("v", "value")
_V_FIRST = channels("v_first", "value of the first layer")
_Y = channels("y", "result")
_KEY = channels("x", "any values")

A_GATE = elementwise(
    name="a_gate",
    summary="RWKV-7's gate of the in-context learning rate",
    formula="y = sigmoid(a0 + x)",
    inputs=(_X, _A0),
    outputs=(_Y,),
    saved=(_X, _A0),
    schedules={"forward": Schedule(4), "backward": Schedule(4)},
)
VRES_GATE = elementwise(
    name="vres_gate",
    summary="RWKV-7's gate between a layer's values and those of the first layer",
    formula="y = v + (v_first - v) * sigmoid(v0 + x)",
    inputs=(_V, _V_FIRST, _X, _V0),
    outputs=(_Y,),
    saved=(_V, _V_FIRST, _X, _V0),
    schedules={"forward": Schedule(2), "backward": Schedule(2)},
)
RELU_SQUARED = elementwise(
    name="relu_squared",
    summary="the activation of RWKV's channel mixing",
    formula="y = max(x, 0)^2",
    inputs=(_KEY,),
    outputs=(_Y,),
    saved=(_KEY,),
    schedules={"forward": Schedule(4), "backward": Schedule(4)},
)
