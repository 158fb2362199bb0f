"""Continuous batching: requests come and go, prompts and decoding share steps of one fixed size.

    python tools/serve_demo.py

The model is a small RWKV-7 with random weights. Every step runs the same buffers, in which rows
that nobody has are empty, so that on a GPU one captured CUDA graph serves all of them. At the end
each request is run by itself, and its tokens, logits and last states are compared, bit for bit.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rwkv7_model import HEAD_SIZE, RWKV7, Block
from rwkv_jit import StatePool, get_op

VOCABULARY = 256
PIECE = 32  # tokens of a prompt that go into one step: always the same ones
# Requests of each kind in a step. Rows and requests are multiples of 8: matrix products may take
# rows that are left over another way than the others, and a request must not notice which it has.
PROMPTS, DECODES = 8, 8


@dataclass
class Request:
    """A prompt, the step at which it arrives, and how many tokens are wanted after it.

    done: tokens of the prompt that the state has. logits: of each token that was answered.
    states: after the last token, all that a layer remembers.
    """

    prompt: list[int]
    wanted: int
    arrives: int
    slot: int = -1
    done: int = 0
    answer: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)

    def fresh(self) -> Request:
        """The same request before anything was done, arriving at once."""
        return Request(self.prompt, self.wanted, 0)


class Buffers:
    """What the host fills in for a step; the model reads nothing else.

    tokens: [rows], first those of prompts, packed, then one of each request that decodes.
    bounds: [sequences + 1], of what is packed in all rows: prompts, rows that nobody has, and each
        row behind them.
    slots: [sequences], whose they are; `nobody` where they are no request's.
    prompt_slots, decode_slots: what the operators on the pool take; -1 is nobody's.
    ends: [requests], the last row of each.
    """

    def __init__(self, nobody: int, device: str) -> None:
        self.nobody = nobody
        rows, requests = PROMPTS * PIECE + DECODES, PROMPTS + DECODES
        self.host = {
            "tokens": torch.zeros(rows, dtype=torch.int64),
            "bounds": torch.zeros(requests + 2, dtype=torch.int32),
            "slots": torch.zeros(requests + 1, dtype=torch.int64),
            "prompt_slots": torch.zeros(PROMPTS, dtype=torch.int32),
            "decode_slots": torch.zeros(DECODES, dtype=torch.int32),
            "ends": torch.zeros(requests, dtype=torch.int64),
        }
        self.host["bounds"][PROMPTS + 1 :] = torch.arange(PROMPTS * PIECE, rows + 1)
        self.on_device = {name: x.to(device, copy=True) for name, x in self.host.items()}
        self.fill([], [])

    def fill(self, prompts: list[Request], decoding: list[Request]) -> None:
        """Write down a step: a piece of each of these prompts, a token of each of those."""
        host = self.host
        empty = {"tokens": 0, "slots": self.nobody, "prompt_slots": -1, "decode_slots": -1}
        for name, value in empty.items():
            host[name].fill_(value)
        row = 0
        for i, request in enumerate(prompts):
            piece = request.prompt[request.done : request.done + PIECE]
            host["tokens"][row : row + len(piece)] = torch.tensor(piece)
            host["slots"][i] = host["prompt_slots"][i] = request.slot
            row += len(piece)
            host["bounds"][i + 1], host["ends"][i] = row, row - 1
        host["bounds"][len(prompts) + 1 : PROMPTS + 1] = row
        for i, request in enumerate(decoding):
            row = PROMPTS * PIECE + i
            host["tokens"][row] = request.answer[-1]
            host["slots"][PROMPTS + 1 + i] = host["decode_slots"][i] = request.slot
            host["ends"][PROMPTS + i] = row
        for name, x in self.on_device.items():
            x.copy_(host[name])


class Server:
    """A model, a pool of states, and the requests that have slots in it."""

    def __init__(self, model: RWKV7, slots: int, device: str) -> None:
        blocks, weights = list(model.blocks), model.head.weight
        width = weights.shape[1]
        self.model, self.device = model, device
        self.blocks = [block for block in blocks if isinstance(block, Block)]
        self.buffers = Buffers(slots, device)
        self.pool = StatePool(
            slots, layers=len(blocks), heads=width // HEAD_SIZE, head_size=HEAD_SIZE, device=device
        )
        # [layer, time mix or channel mix, slot, channel]: the last inputs, and a slot for nobody's.
        self.shifts = weights.new_zeros(len(blocks), 2, slots + 1, width)
        self.prefill, self.decode = (
            get_op(name, head_size=HEAD_SIZE, dtype=weights.dtype, device=device, decay="logit")
            for name in ("wkv7_prefill", "wkv7_decode")
        )
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits = self._run()  # also builds kernels, which a capture cannot
        if device == "cuda":
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self._run()

    def serve(self, requests: list[Request]) -> int:
        """Answer all requests. Returns the number of steps."""
        waiting, active, step = sorted(requests, key=lambda r: r.arrives), list[Request](), 0
        while waiting or active:
            while waiting and waiting[0].arrives <= step and self.pool.free_slots:
                active.append(self._admit(waiting.pop(0)))
            self._step(active)
            for request in [r for r in active if len(r.answer) == r.wanted]:
                self._dismiss(request)
                active.remove(request)
            step += 1
        return step

    def _admit(self, request: Request) -> Request:
        request.slot = int(self.pool.allocate())
        self.shifts[:, :, request.slot] = 0
        return request

    def _dismiss(self, request: Request) -> None:
        slot = torch.tensor([request.slot], dtype=torch.int32)
        request.states = [self.pool.snapshot(slot), self.shifts[:, :, request.slot].clone()]
        self.pool.free(slot)

    def _step(self, active: list[Request]) -> None:
        prompts = [r for r in active if r.done < len(r.prompt)][:PROMPTS]
        decoding = [r for r in active if r.done == len(r.prompt)][:DECODES]
        self.buffers.fill(prompts, decoding)
        if self.graph is None:
            self.logits = self._run()
        else:
            self.graph.replay()
        logits = self.logits.cpu()
        for i, request in enumerate(prompts):
            request.done = min(request.done + PIECE, len(request.prompt))
            if request.done == len(request.prompt):
                self._answer(request, logits[i])
        for i, request in enumerate(decoding):
            self._answer(request, logits[PROMPTS + i])

    @staticmethod
    def _answer(request: Request, logits: Tensor) -> None:
        request.logits.append(logits.clone())
        request.answer.append(int(logits.argmax()))

    @torch.no_grad()
    def _run(self) -> Tensor:
        """The model on the buffers; logits of the last token of each request."""
        given = self.buffers.on_device
        bounds, slots = given["bounds"], given["slots"]
        x, v_first = self.model.emb(given["tokens"])[None], None
        for layer, block in enumerate(self.blocks):
            att, ffn = self.shifts[layer]
            x = block.ln0(x)
            projected, v_first, last = block.att.project(
                block.ln1(x), v_first, att[slots], output_state=True, cu_seqlens=bounds
            )
            att.index_copy_(0, slots, last)
            x = x + block.att.finish(self._recur(layer, projected[:6]), projected)
            y, last = block.ffn(block.ln2(x), ffn[slots], output_state=True, cu_seqlens=bounds)
            ffn.index_copy_(0, slots, last)
            x = x + y
        logits: Tensor = self.model.head(self.model.ln_out(x[0, given["ends"]]))
        return logits

    def _recur(self, layer: int, inputs: Iterable[Tensor]) -> Tensor:
        """The recurrence: prompts by one operator, single tokens by the other, on one pool."""
        given, state, rows = self.buffers.on_device, self.pool.states[layer], PROMPTS * PIECE
        inputs, bounds = list(inputs), given["bounds"][: PROMPTS + 1]
        of_prompts = self.prefill(
            *(x[:, :rows] for x in inputs), state, bounds, given["prompt_slots"]
        )
        decoded = self.decode(
            *(x[:, rows:].transpose(0, 1) for x in inputs), state, given["decode_slots"]
        )
        return torch.cat([of_prompts, decoded.transpose(0, 1)], 1)


def make_model(layers: int, width: int, device: str) -> RWKV7:
    """A model in which everything has an effect: what training begins with as zeros is drawn."""
    model = RWKV7(VOCABULARY, width, layers)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model.to(device, torch.bfloat16 if device == "cuda" else torch.float32).eval()


def make_requests(count: int) -> list[Request]:
    """Prompts of 1 to 300 tokens, answers of 4 to 24, two arrivals in three steps."""
    lengths = torch.randint(1, 301, (count,)).tolist()
    wanted = torch.randint(4, 25, (count,)).tolist()
    return [
        Request(torch.randint(VOCABULARY, (length,)).tolist(), tokens, i * 3 // 2)
        for i, (length, tokens) in enumerate(zip(lengths, wanted, strict=True))
    ]


def same(one: Request, other: Request) -> bool:
    """Whether two runs of a request have the same bits."""
    return one.answer == other.answer and all(
        torch.equal(x, y)
        for x, y in zip([*one.logits, *one.states], [*other.logits, *other.states], strict=True)
    )


def main() -> None:
    """Serve, serve each alone, compare. Exit code 1 if any bit differs."""
    parser = argparse.ArgumentParser(
        description="Serve requests with continuous batching, and check them one by one.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--requests", type=int, default=24, help="how many arrive")
    parser.add_argument("--slots", type=int, default=10, help="how many are served at a time")
    parser.add_argument("--layers", type=int, default=2, help="layers of the model")
    parser.add_argument("--width", type=int, default=128, help="channels, a multiple of 64")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and requests")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(arguments.seed)
    model = make_model(arguments.layers, arguments.width, device)
    requests = make_requests(arguments.requests)
    alone = [request.fresh() for request in requests]

    server = Server(model, arguments.slots, device)
    began = time.perf_counter()
    steps = server.serve(requests)
    seconds = time.perf_counter() - began
    prompts = sum(len(request.prompt) for request in requests)
    answers = sum(len(request.answer) for request in requests)
    print(
        f"{len(requests)} requests, {prompts} tokens of prompts and {answers} of answers, in "
        f"{steps} steps and {seconds:.2f} s on {device}"
    )
    steps = sum(server.serve([request]) for request in alone)
    equal = sum(map(same, requests, alone))
    print(
        f"one at a time in {steps} steps: {equal} of {len(requests)} requests have the same "
        "answers, logits and states, bit for bit"
    )
    if equal < len(requests):
        sys.exit(1)


if __name__ == "__main__":
    main()
