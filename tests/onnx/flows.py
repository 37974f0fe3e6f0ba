"""Small models with control flow, as ONNX text."""

from __future__ import annotations

import onnx
from onnx import ModelProto

HEADER = '<ir_version: 10, opset_import: ["" : 21, "my" : 1]>\n'

CAPTURING = """
capturing (bool c, float[n, 3] x, float[3] w) => (float[n, 3] y) {
  [scale] s = Mul(x, w)
  [choose] y = If (c) <
    then_branch = then () => (float[n, 3] t) {
      [unused] u = Neg(s)
      [one] one = Constant <value = float {1}> ()
      [two] two = Add(one, one)
      [double] t = Mul(s, two)
    },
    else_branch = other () => (float[n, 3] e) {
      [same] i = Identity(x)
      [again] e = Add(i, s)
    }>
}
"""

COUNTING = """
counting (int64 steps, float[2] x) => (float[2] last, float[k, 2] all) {
  [yes] yes = Constant <value = bool {1}> ()
  [loop] last, all = Loop (steps, yes, x) <body = body (int64 i, bool go, float[2] a) => (bool go_on, float[2] b, float[2] e) {
      [keep] go_on = Identity(go)
      [number] f = Cast <to = 1> (i)
      [step] b = Add(a, f)
      [element] e = Mul(b, x)
    }>
}
"""

WHILE = """
while (float[1] x) => (float[1] y) {
  [yes] yes = Constant <value = bool {1}> ()
  [loop] y = Loop ("", yes, x) <body = body (int64 i, bool go, float[1] a) => (bool more, float[1] b) {
      [twice] b = Add(a, a)
      [limit] l = Constant <value = float[1] {100}> ()
      [less] m = Less(b, l)
      [axis] ax = Constant <value = int64[1] {0}> ()
      [scalar] more = Squeeze(m, ax)
    }>
}
"""

SCANNING = """
scanning (float[2] start, float[2, 4] x) => (float[2] end, float[2, 4] sums) {
  [scan] end, sums = Scan (start, x) <num_scan_inputs = 1, scan_input_axes = [1], scan_output_axes = [-1],
    scan_input_directions = [1], scan_output_directions = [1],
    body = body (float[2] a, float[2] v) => (float[2] b, float[2] e) {
      [add] b = Add(a, v)
      [copy] e = Identity(b)
    }>
}
"""

NESTED = """
nested (bool c, bool d, float[2] x) => (float[2] y) {
  [outer] y = If (c) <
    then_branch = one () => (float[2] a) {
      [inner] a = If (d) <
        then_branch = two () => (float[2] b) { [deep] b = Add(x, x) },
        else_branch = three () => (float[2] e) { [flat] e = Neg(x) }>
    },
    else_branch = four () => (float[2] f) { [plain] f = Identity(x) }>
}
"""

CALLING = """
calling (float[2] x) => (float[2] y, float[2] z) {
  [first] y = my.scaled <by = 3.0> (x)
  [second] z = my.scaled (x)
}
<domain: "my", opset_import: ["" : 21]>
scaled <by: float = 2.0> (v) => (r) {
  f = Constant <value_float: float = @by> ()
  r = Mul(v, f)
}
"""


def model(text: str) -> ModelProto:
    """The model of a text, checked."""
    proto = onnx.parser.parse_model(HEADER + text)
    onnx.checker.check_model(proto)
    return proto
