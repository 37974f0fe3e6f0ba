// Times the competitors of one case in Node: node wasm_race.mjs CASE.json, the result as JSON on stdout.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

import { race } from "./wasm_race_core.mjs";

const path = resolve(process.argv[2]);
const plan = JSON.parse(readFileSync(path, "utf8"));
const at = (name) => join(dirname(path), name);
const require = createRequire(join(plan.modules, "package.json"));
let tensorflow;

const host = {
  async bytes(name) {
    const bytes = readFileSync(at(name));
    return bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength);
  },
  module: (name) => import(pathToFileURL(at(name))),
  async onnxruntime() {
    const ort = require("onnxruntime-web/wasm");
    ort.env.wasm.numThreads = 1;
    ort.env.logLevel = "error";
    return ort;
  },
  async tfjs() {
    if (!tensorflow) {
      tensorflow = require("@tensorflow/tfjs-core");
      const backend = require("@tensorflow/tfjs-backend-wasm");
      backend.setThreadsCount(1);
      backend.setWasmPaths(dirname(require.resolve("@tensorflow/tfjs-backend-wasm")) + "/");
      await tensorflow.setBackend("wasm");
      await tensorflow.ready();
    }
    return tensorflow;
  },
};

const results = await race(plan, host);
process.stdout.write(JSON.stringify({ engine: `Node ${process.version}, V8 ${process.versions.v8}`, results }) + "\n");
process.exit(0);
