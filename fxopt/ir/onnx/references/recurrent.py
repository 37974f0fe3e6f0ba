"""Recurrent networks, unrolled over a static number of steps: RNN, GRU, LSTM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxopt.errors import MissingReference
from fxopt.ir.onnx.references.common import first, require
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()

State = tuple[Tensor, ...]
Activation = Callable[[Tensor], Tensor]
Step = Callable[[Tensor, State], State]  # (input of one step, state) -> next state, its first part is the output
_ACTIVATIONS: dict[str, Activation] = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu}


def _activations(names: Sequence[str], options: dict[str, Any]) -> list[Activation]:
    """The functions of one direction, each with its input clipped when the attribute `clip` says so."""
    require(not options.get("activation_alpha") and not options.get("activation_beta"), "activations with parameters")
    clip = options.get("clip")
    found = []
    for name in names:
        function = _ACTIVATIONS.get(str(name).lower())
        if function is None:
            raise MissingReference(f"a recurrent network with activation {name!r} has no torch reference")
        found.append(function if not clip else _clipped(function, clip))
    return found


def _clipped(function: Activation, clip: float) -> Activation:
    return lambda x: function(x.clamp(-clip, clip))


def _reversed(x: Tensor, lengths: Tensor | None) -> Tensor:
    """The steps of every sequence in reverse order, padding left in place."""
    if lengths is None:
        return x.flip(0)
    steps = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    index = torch.where(steps < lengths, lengths.to(torch.int64) - 1 - steps, steps)
    return x.gather(0, index.unsqueeze(-1).expand(x.shape))


def _scan(x: Tensor, step: Step, state: State, lengths: Tensor | None, reverse: bool) -> tuple[Tensor, State]:
    """The outputs of all steps and the last state of every sequence; outputs beyond its length are 0."""
    if reverse:
        x = _reversed(x, lengths)
    outputs = []
    for index, value in enumerate(x.unbind(0)):
        following = step(value, state)
        y = following[0]
        if lengths is not None:
            running = (index < lengths).unsqueeze(-1)
            following = tuple(torch.where(running, new, old) for new, old in zip(following, state))
            y = torch.where(running, y, torch.zeros_like(y))
        outputs.append(y)
        state = following
    stacked = torch.stack(outputs)
    return (_reversed(stacked, lengths) if reverse else stacked), state


def _run(
    call: Call,
    x: Tensor,
    states: list[Tensor | None],
    lengths: Tensor | None,
    hidden: int,
    make_step: Callable[[int, list[Activation]], Step],
    defaults: Sequence[str],
    options: dict[str, Any],
) -> Any:
    """All directions of a network, in the layout that the attributes ask for."""
    direction, layout = str(options.get("direction", "forward")), options.get("layout", 0)
    directions = 2 if direction == "bidirectional" else 1
    if layout:
        x = x.transpose(0, 1)
        states = [None if state is None else state.transpose(0, 1) for state in states]
    require(isinstance(x.shape[0], int), "a recurrent network over a symbolic number of steps has no torch reference")
    starts = [x.new_zeros(directions, x.shape[1], hidden) if state is None else state for state in states]
    names = options.get("activations") or list(defaults) * directions
    results = []
    for index in range(directions):
        functions = _activations(names[index * len(defaults) : (index + 1) * len(defaults)], options)
        reverse = direction == "reverse" or index == 1
        state = tuple(start[index] for start in starts)
        results.append(_scan(x, make_step(index, functions), state, lengths, reverse))
    y = torch.stack([outputs for outputs, _ in results], 1)
    finals = [torch.stack(parts) for parts in zip(*(state for _, state in results))]
    if layout:
        y, finals = y.permute(2, 0, 1, 3), [final.transpose(0, 1) for final in finals]
    return first(call, y, *finals)


def _bias(bias: Tensor | None, direction: int, like: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The input and the recurrent bias of one direction."""
    if bias is None:
        zeros = like.new_zeros(size)
        return zeros, zeros
    return bias[direction, :size], bias[direction, size:]


@operators.reference("RNN")
def rnn(
    call: Call,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_h: Tensor | None = None,
    **options: Any,
) -> Any:
    """h' = f(x @ w' + h @ r' + biases)."""
    hidden = r.shape[-1]

    def make_step(direction: int, functions: list[Activation]) -> Step:
        w_bias, r_bias = _bias(bias, direction, x, hidden)
        f = functions[0]
        return lambda value, state: (f(value @ w[direction].t() + state[0] @ r[direction].t() + w_bias + r_bias),)

    return _run(call, x, [initial_h], lengths, hidden, make_step, ["Tanh"], options)


@operators.reference("GRU")
def gru(
    call: Call,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_h: Tensor | None = None,
    linear_before_reset: int = 0,
    **options: Any,
) -> Any:
    """h' = (1 - z) * g(candidate) + z * h, with update gate z and reset gate r inside the candidate."""
    hidden = r.shape[-1]

    def make_step(direction: int, functions: list[Activation]) -> Step:
        w_bias, r_bias = _bias(bias, direction, x, 3 * hidden)
        f, g = functions
        r_gates, r_candidate = r[direction, : 2 * hidden], r[direction, 2 * hidden :]
        gate_bias, candidate_bias = r_bias[: 2 * hidden], r_bias[2 * hidden :]

        def step(value: Tensor, state: State) -> State:
            (h,) = state
            inputs = value @ w[direction].t() + w_bias
            gates, candidate = inputs[..., : 2 * hidden], inputs[..., 2 * hidden :]
            update, reset = f(gates + h @ r_gates.t() + gate_bias).chunk(2, -1)
            if linear_before_reset:
                inner = reset * (h @ r_candidate.t() + candidate_bias)
            else:
                inner = (reset * h) @ r_candidate.t() + candidate_bias
            return ((1 - update) * g(candidate + inner) + update * h,)

        return step

    return _run(call, x, [initial_h], lengths, hidden, make_step, ["Sigmoid", "Tanh"], options)


@operators.reference("LSTM")
def lstm(
    call: Call,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_h: Tensor | None = None,
    initial_c: Tensor | None = None,
    peephole: Tensor | None = None,
    input_forget: int = 0,
    seen: Activation | None = None,
    **options: Any,
) -> Any:
    """c' = forget * c + input * g(..), h' = output * h(c'); the gates see c through the peepholes.

    `seen` (no attribute of the operator) is what the recurrent product sees of h.
    """
    require(not options.get("clip"), "LSTM with clip has no torch reference: runtimes disagree on what it bounds")
    hidden = r.shape[-1]

    def make_step(direction: int, functions: list[Activation]) -> Step:
        w_bias, r_bias = _bias(bias, direction, x, 4 * hidden)
        f, g, h = functions
        peeps = x.new_zeros(3 * hidden) if peephole is None else peephole[direction]
        see_input, see_output, see_forget = peeps.chunk(3)

        def step(value: Tensor, state: State) -> State:
            hidden_state, cell = state
            if seen is not None:
                hidden_state = seen(hidden_state)
            gates = value @ w[direction].t() + hidden_state @ r[direction].t() + w_bias + r_bias
            into, out, forget, candidate = gates.chunk(4, -1)
            into = f(into + see_input * cell)
            keep = 1 - into if input_forget else f(forget + see_forget * cell)
            cell = keep * cell + into * g(candidate)
            return f(out + see_output * cell) * h(cell), cell

        return step

    return _run(call, x, [initial_h, initial_c], lengths, hidden, make_step, ["Sigmoid", "Tanh", "Tanh"], options)
