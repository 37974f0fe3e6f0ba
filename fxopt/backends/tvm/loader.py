"""The ES module that loads a compiled `.wasm` in Node and in browsers."""

from __future__ import annotations

MODULE = """// Loads NAME.wasm, which fxopt compiled. Use: const model = await load(); const [y] = model.run(x);
const TYPES = { float32: Float32Array, int64: BigInt64Array, int32: Int32Array, uint8: Uint8Array };

async function bytes(url) {
  if (url.protocol === "file:") return (await import("node:fs/promises")).readFile(url);
  return (await fetch(url)).arrayBuffer();
}

export async function load(base = import.meta.url) {
  const manifest = JSON.parse(new TextDecoder().decode(await bytes(new URL("manifest.json", base))));
  const { instance } = await WebAssembly.instantiate(await bytes(new URL("NAME.wasm", base)), {});
  const { memory, NAME_input, NAME_output, NAME_run } = instance.exports;
  const view = (port, address) =>
    new TYPES[port.dtype](memory.buffer, address, port.nbytes / TYPES[port.dtype].BYTES_PER_ELEMENT);
  return {
    manifest,
    run(...inputs) {
      if (inputs.length !== manifest.inputs.length)
        throw new TypeError(`${inputs.length} inputs given, expected ${manifest.inputs.length}`);
      manifest.inputs.forEach((port, i) => {
        const target = view(port, NAME_input(i));
        if (inputs[i].length !== target.length)
          throw new TypeError(`${port.name} has ${inputs[i].length} values, expected ${target.length}`);
        target.set(inputs[i]);
      });
      NAME_run();
      return manifest.outputs.map((port, i) => view(port, NAME_output(i)).slice());
    },
  };
}
"""
