"""Run ONNX files in a provider of another ONNX Runtime, on commands from standard input; needs no fxopt.

    python provider_worker.py PROVIDER MODEL.onnx

The commands and answers are those of openvino_worker.py: ["compile", THREADS, FEED.npz], ["burst", DROPPED, TIMED],
["run", INPUTS.npz, OUTPUTS.npz].
"""

import json
import sys

from openvino_worker import answer, serve


def main():
    """Serve commands until the input ends."""
    import onnxruntime

    provider, model = sys.argv[1:]

    def compiled(threads):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        config = json.dumps({"CPU": {"INFERENCE_NUM_THREADS": str(threads)}})
        settings = {"device_type": "CPU", "load_config": config} if "OpenVINO" in provider else {}
        session = onnxruntime.InferenceSession(model, options, providers=[(provider, settings)])
        if session.get_providers()[0] != provider:
            raise SystemExit(f"{provider} is not among {onnxruntime.get_available_providers()}")
        return lambda feed: session.run(None, feed)

    answer(versions={"onnxruntime": onnxruntime.__version__, "provider": provider})
    serve(compiled)


if __name__ == "__main__":
    main()
