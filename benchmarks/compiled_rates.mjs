// Times compiled models of one group: node compiled_rates.mjs JOB.json, seconds per run of the quietest of many short
// bursts as JSON on stdout. (The processor time of a thread, which Node gives too, only moves at ticks of the kernel.)

import { readFileSync } from "node:fs";
import { dirname, join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const WARM_UP = 0.4; // seconds: the engine's optimising compiler runs in the background
const BURST = 0.004;
const BURSTS = 40;

const path = resolve(process.argv[2]);
const { build, jobs } = JSON.parse(readFileSync(path, "utf8"));
const clock = () => performance.now() / 1000;
const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

const calls = {};
for (const { name, folder } of jobs) {
  const { load } = await import(pathToFileURL(join(dirname(path), folder, "index.js")));
  const [views] = Object.values((await load(undefined, { build })).functions).map((one) => one.views());
  for (const view of Object.values(views.inputs)) view.set(view.map((_, i) => ((i * 7919) % 1000) / 1000));
  calls[name] = views.run;
}
const counts = {};
for (const [name, call] of Object.entries(calls)) {
  const begin = performance.now();
  while (performance.now() - begin < 1000 * WARM_UP) call();
  await pause(20);
  const start = clock();
  let times = 0;
  while (clock() - start < BURST) {
    call();
    times++;
  }
  counts[name] = times;
}
const best = {};
for (let round = 0; round < BURSTS; round++)
  for (const [name, call] of Object.entries(calls)) {
    call();
    const begin = clock();
    for (let i = 0; i < counts[name]; i++) call();
    best[name] = Math.min(best[name] ?? Infinity, (clock() - begin) / counts[name]);
  }
console.log(JSON.stringify(best));
