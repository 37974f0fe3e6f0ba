const SIMD = new Uint8Array([
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11,
]);
// Exports f() -> i32: the first lane of a relaxed 8-bit dot product, which some early engines got wrong.
const RELAXED = new Uint8Array([
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 127, 3, 2, 1, 0, 7, 5, 1, 1, 102, 0, 0, 10, 64, 1, 62, 0, 253, 12,
  128, 128, 127, 127, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 253, 12, 127, 127, 127, 127, 1, 2, 3, 4, 5, 6, 7, 8, 9,
  10, 11, 12, 253, 12, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0, 253, 147, 2, 253, 27, 0, 11,
]);
const DOT = -128 * 127 * 2 + 127 * 127 * 2 + 1;
const TYPES = {
  float32: Float32Array,
  int64: BigInt64Array,
  int32: Int32Array,
  bool: Uint8Array,
  uint8: Uint8Array,
  int8: Int8Array,
};
const PAGE = 65536;

/** The builds that this engine runs correctly, best first. */
export function builds() {
  const found = [];
  if ("relaxed" in files && WebAssembly.validate(RELAXED)) {
    const probe = new WebAssembly.Instance(new WebAssembly.Module(RELAXED));
    if (probe.exports.f() === DOT) found.push("relaxed");
  }
  if ("simd128" in files && WebAssembly.validate(SIMD)) found.push("simd128");
  return found;
}

/** Load the model; `url` is the folder of the files, by default that of this module. */
export async function load(url, { build } = {}) {
  const usable = builds();
  const chosen = build ?? usable[0];
  if (chosen === undefined) throw new Error(`${signature.name} needs WebAssembly with 128-bit SIMD, which is not here`);
  if (!(chosen in signature.builds))
    throw new RangeError(`unknown build ${shown(chosen)}; expected ${Object.keys(signature.builds).join(" or ")}`);
  if (!usable.includes(chosen)) throw new Error(`the build ${shown(chosen)} does not run in this engine`);
  const [module, weights] = await Promise.all([compiled(place(chosen, url)), external(`${chosen}.weights`, url, signature.weightsBytes[chosen])]);
  const instance = await WebAssembly.instantiate(module, {});
  return new Model(instance.exports, chosen, weights);
}

function place(file, url) {
  if (url === undefined) return files[file]();
  const folder = new URL(url, globalThis.document?.baseURI ?? import.meta.url);
  if (!folder.pathname.endsWith("/")) folder.pathname += "/";
  return new URL(names[file], folder);
}

async function fetched(url) {
  if (url.protocol === "file:" && globalThis.process?.versions?.node) {
    const files = ["node:fs", "promises"].join("/"); // hidden from bundlers, which look for it in browsers too
    const { readFile } = await import(/* webpackIgnore: true */ /* @vite-ignore */ files);
    return new Response(await readFile(url), { headers: { "Content-Type": "application/wasm" } });
  }
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url} cannot be loaded: HTTP ${response.status} ${response.statusText}`.trim());
  return response;
}

async function compiled(url) {
  const response = await fetched(url);
  const type = response.headers.get("Content-Type") ?? "";
  if (WebAssembly.compileStreaming && type.startsWith("application/wasm")) return WebAssembly.compileStreaming(response);
  return WebAssembly.compile(await response.arrayBuffer());
}

async function external(file, url, size) {
  if (!(file in files)) return null;
  const found = new Uint8Array(await (await fetched(place(file, url))).arrayBuffer());
  if (found.length < size)
    throw new Error(`${names[file]} has ${found.length} bytes, expected ${size}: it is of another build`);
  return found.subarray(0, size);
}

class Model {
  constructor(exports, build, weights) {
    this.build = build;
    const memory = new Memory(exports.memory, exports.__heap_base.value);
    const entries = Object.values(signature.functions).flatMap((described) => described.entries);
    const needed = [...entries.map((entry) => entry.symbol), ...(weights === null ? [`${signature.name}_weights`] : [])];
    const lacking = needed.find((name) => typeof exports[name] !== "function");
    if (lacking) throw new Error(`${signature.builds[build]} has no function ${lacking}: it is of another build`);
    const arena = memory.reserve(Math.max(...entries.map((entry) => entry.arenaBytes)));
    const stored = weights === null ? exports[`${signature.name}_weights`]() : memory.reserve(weights.length);
    const ports = memory.reserve(Math.max(...entries.map(portBytes)));
    if (weights !== null) memory.view("uint8", stored, weights.length).set(weights);
    this.functions = {};
    for (const [name, described] of Object.entries(signature.functions))
      this.functions[name] = new ModelFunction(name, described, exports, memory, { arena, stored, ports });
  }

  run(inputs) {
    const all = Object.values(this.functions);
    if (all.length > 1) throw new Error(`choose one: model.functions.{${Object.keys(this.functions).join(", ")}}.run`);
    return all[0].run(inputs);
  }
}

class ModelFunction {
  #exports;
  #memory;
  #places;
  #views = new Map();

  constructor(name, described, exports, memory, places) {
    this.name = name;
    this.inputs = described.inputs;
    this.outputs = described.outputs;
    this.entries = described.entries;
    this.#exports = exports;
    this.#memory = memory;
    this.#places = places;
  }

  run(inputs) {
    const given = this.#checked(inputs);
    const entry = this.#fitting(given);
    const views = this.views(entry);
    entry.inputs.forEach((port, i) => views.inputs[port.name].set(given[i].data));
    views.run();
    // A constructor copies faster than slice() does.
    return Object.fromEntries(entry.outputs.map(({ name, dtype }) => [name, new TYPES[dtype](views.outputs[name])]));
  }

  views(entry = this.entries[0]) {
    let found = this.#views.get(entry);
    if (found === undefined) {
      const { arena, stored, ports } = this.#places;
      const call = this.#exports[entry.symbol];
      const addresses = [];
      const made = { inputs: {}, outputs: {}, run: () => call(arena, stored, ...addresses) };
      let end = ports;
      for (const kind of ["inputs", "outputs"])
        for (const port of entry[kind]) {
          addresses.push(end);
          made[kind][port.name] = this.#memory.view(port.dtype, end, count(port));
          end += aligned(port.nbytes);
        }
      this.#views.set(entry, (found = made));
    }
    return found;
  }

  #checked(inputs) {
    const known = this.inputs.map((port) => port.name);
    const named = ArrayBuffer.isView(inputs) && known.length === 1 ? { [known[0]]: inputs } : inputs;
    for (const name of Object.keys(named ?? {}))
      if (!known.includes(name))
        throw new TypeError(`unknown input ${shown(name)}; ${this.name} takes ${known.map(shown).join(", ")}`);
    return this.inputs.map((port) => {
      const value = named?.[port.name];
      if (value === undefined)
        throw new TypeError(`input ${shown(port.name)} is missing; ${this.name} takes ${known.map(shown).join(", ")}`);
      const { data, shape } = value?.data === undefined ? { data: value } : value;
      const expected = TYPES[port.dtype];
      if (kind(data) !== expected.name)
        throw new TypeError(`input ${shown(port.name)} is ${kind(data)}, expected ${expected.name}`);
      return { data, shape };
    });
  }

  #fitting(given) {
    const fits = (port, { data, shape }) =>
      data.length === count(port) && (shape === undefined || String(shape) === String(port.shape));
    const found = this.entries.filter((entry) => entry.inputs.every((port, i) => fits(port, given[i])));
    if (found.length === 1) return found[0];
    const taken = this.entries.map((entry) => entry.inputs.map(described).join(", ")).join(", or ");
    const had = given.map(({ data, shape }, i) => `${shown(this.inputs[i].name)} ${shape ? `[${shape}] ` : ""}of ${data.length} values`);
    if (found.length === 0)
      throw new RangeError(`${had.join(", ")} does not fit; ${this.name} was compiled for ${taken}`);
    throw new RangeError(`${had.join(", ")} fits several shapes (${taken}); give { data, shape } for each input`);
  }
}

class Memory {
  #memory;
  #end;

  constructor(memory, base) {
    this.#memory = memory;
    this.#end = aligned(base);
  }

  reserve(bytes) {
    const address = this.#end;
    this.#end = aligned(address + bytes);
    const missing = this.#end - this.#memory.buffer.byteLength;
    if (missing > 0) this.#memory.grow(Math.ceil(missing / PAGE));
    return address;
  }

  view(dtype, address, length) {
    return new TYPES[dtype](this.#memory.buffer, address, length);
  }
}

function aligned(bytes) {
  return Math.ceil(bytes / 64) * 64;
}

function count(port) {
  return port.nbytes / TYPES[port.dtype].BYTES_PER_ELEMENT;
}

function portBytes(entry) {
  return [...entry.inputs, ...entry.outputs].reduce((sum, port) => sum + aligned(port.nbytes), 0);
}

function described(port) {
  return `${shown(port.name)} ${port.dtype} [${port.shape.join(", ")}]`;
}

function kind(value) {
  return Object.prototype.toString.call(value).slice(8, -1); // also of arrays of another frame
}

function shown(name) {
  return JSON.stringify(name);
}
