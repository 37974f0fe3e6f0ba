"""Quantise a model with NNCF and run it in OpenVINO, on commands from standard input; needs no fxopt.

    python openvino_worker.py MODEL.onnx CALIBRATION.npz transformer|plain

Commands are JSON lists, one a line: ["compile", THREADS, FEED.npz], ["burst", DROPPED, TIMED], ["run", INPUTS.npz,
OUTPUTS.npz]. An answer is a line `answer {...}`. The npz files hold arrays INDEX/INPUT-NAME.
"""

import json
import sys
import time

import numpy as np


def feeds(path):
    """The samples of an npz file."""
    found = {}
    for key, value in np.load(path).items():
        index, name = key.split("/", 1)
        found.setdefault(int(index), {})[name] = value
    return [found[index] for index in sorted(found)]


def answer(**values):
    """Write one answer."""
    print("answer " + json.dumps(values), flush=True)


def serve(compile_for):
    """Obey commands until the input ends; `compile_for(threads)` gives a function from a feed to its results."""
    run = feed = None
    for line in sys.stdin:
        command, *given = json.loads(line)
        if command == "compile":
            run, feed = compile_for(given[0]), feeds(given[1])[0]
            answer()
        elif command == "burst":
            times = []
            for _ in range(sum(given)):
                begin = time.perf_counter()
                run(feed)
                times.append(time.perf_counter() - begin)
            answer(seconds=times[given[0] :])
        else:
            run = compile_for(1)
            results = [np.array(run(each)[0]) for each in feeds(given[0])]
            np.savez(given[1], **{str(index): value for index, value in enumerate(results)})
            answer()


def main():
    """Quantise, then serve commands."""
    import nncf
    import openvino

    path, calibration, kind = sys.argv[1:]
    core = openvino.Core()
    samples = feeds(calibration)
    options = {"model_type": nncf.ModelType.TRANSFORMER} if kind == "transformer" else {}
    model = nncf.quantize(
        core.read_model(path), nncf.Dataset(samples), preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(samples), **options,
    )  # fmt: skip

    def compiled(threads):
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        return request.infer

    answer(versions={"openvino": openvino.__version__.split("-")[0], "nncf": nncf.__version__})
    serve(compiled)


if __name__ == "__main__":
    main()
