// The race of one case, in Node and in a browser: `race(plan, host)`; see wasm_race.mjs and wasm_race.html.
// A call takes its inputs from JavaScript arrays and gives its output as one; of tfjs, and of fxopt with `inside`, both
// stay in WebAssembly's memory.
//
// A host has bytes(name), a file of the case as an ArrayBuffer of its own; module(path), a module of the case;
// onnxruntime() and tfjs(), the peers, ready for one thread.

const ARRAYS = { float32: Float32Array, int64: BigInt64Array, int32: Int32Array, uint8: Uint8Array, bool: Uint8Array };

const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

async function burst(call, dropped, timed) {
  for (let i = 0; i < dropped; i++) await call();
  const begin = performance.now();
  for (let i = 0; i < timed; i++) await call();
  return (performance.now() - begin) / timed;
}

function tensor(tf, make) {
  return async (read) => {
    const y = make();
    const found = read ? y.dataSync().slice() : null;
    y.dispose();
    return found;
  };
}

export async function race(plan, host) {
  const floats = async (name) => new Float32Array(await host.bytes(name));
  const inputs = [];
  for (const { name, dtype, shape, file } of plan.inputs) {
    inputs.push({ name, dtype, shape, data: new ARRAYS[dtype](await host.bytes(file)) });
  }

  // Each kind gives an asynchronous function of nothing that computes the first output as a flat array.
  const KINDS = {
    async fxopt({ folder, inside }) {
      const { load } = await host.module(`${folder}/index.js`);
      const { target } = JSON.parse(new TextDecoder().decode(await host.bytes(`${folder}/manifest.json`)));
      const model = await load(undefined, { build: target.name === "wasm-relaxed" ? "relaxed" : "simd128" });
      const given = Object.fromEntries(inputs.map(({ name, data, shape }) => [name, { data, shape }]));
      if (inside) {
        const [views] = Object.values(model.functions).map((one) => one.views());
        for (const { name, data } of inputs) views.inputs[name].set(data);
        return async (read) => {
          views.run();
          return read ? Object.values(views.outputs)[0].slice() : null;
        };
      }
      return async () => Object.values(model.run(given))[0];
    },

    async onnxruntime({ file }) {
      const ort = await host.onnxruntime();
      const options = { executionProviders: ["wasm"], graphOptimizationLevel: "all" };
      const session = await ort.InferenceSession.create(new Uint8Array(await host.bytes(file)), options);
      return async () => {
        const feeds = {};
        inputs.forEach(({ dtype, data, shape }, i) => (feeds[session.inputNames[i]] = new ort.Tensor(dtype, data, shape)));
        return (await session.run(feeds))[session.outputNames[0]].data;
      };
    },

    async tfjs_linear({ weight, bias }) {
      const tf = await host.tfjs();
      const [rows, inner] = inputs[0].shape;
      const outputs = (await floats(bias)).length;
      const x = tf.tensor2d(inputs[0].data, [rows, inner]);
      const w = tf.tensor2d(await floats(weight), [inner, outputs]);
      const b = tf.tensor1d(await floats(bias));
      return tensor(tf, () => tf.fused.matMul({ a: x, b: w, bias: b }));
    },

    async tfjs_conv({ weight, bias, image }) {
      const tf = await host.tfjs();
      const [height, width, channels] = image;
      const outputs = (await floats(bias)).length;
      const x = tf.tensor4d(await floats(plan.tfjs_image), [1, height, width, channels]);
      const w = tf.tensor4d(await floats(weight), [1, 1, channels, outputs]);
      const b = tf.tensor1d(await floats(bias));
      return tensor(tf, () => tf.fused.conv2d({ x, filter: w, strides: 1, pad: "valid", bias: b }));
    },
  };

  const results = {};
  const calls = {};
  for (const [name, competitor] of Object.entries(plan.competitors)) {
    calls[name] = await KINDS[competitor.kind](competitor);
    const values = await calls[name](true);
    const expected = await floats(competitor.expected ?? plan.expected);
    if (values.length !== expected.length) throw new Error(`${name} gives ${values.length} values, not ${expected.length}`);
    let difference = 0;
    let largest = 0;
    for (let i = 0; i < expected.length; i++) {
      difference = Math.max(difference, Math.abs(values[i] - expected[i]));
      largest = Math.max(largest, Math.abs(expected[i]));
    }
    results[name] = { relative_error: difference / largest, bursts: [] };
  }

  // The engine's optimising compiler runs in the background: call until it has had its time.
  const count = {};
  for (const [name, call] of Object.entries(calls)) {
    const begin = performance.now();
    let times = 0;
    while (performance.now() - begin < plan.warm_up_ms || times < 3) {
      await call();
      times++;
      if (times % 8 === 0) await pause(0);
    }
    await pause(50);
    const once = await burst(call, 1, 3);
    count[name] = Math.max(3, Math.min(200, Math.round(plan.burst_ms / once)));
  }
  const names = Object.keys(calls);
  for (let round = 0; round < plan.rounds; round++) {
    for (const name of round % 2 ? [...names].reverse() : names) {
      results[name].bursts.push(await burst(calls[name], Math.min(3, count[name]), count[name]));
      await pause(2);
    }
  }
  return results;
}
