"""What a file is that is no ONNX model, by its first bytes: for the error."""

from __future__ import annotations

_KINDS: tuple[tuple[int, bytes, str], ...] = (  # place, bytes, what it is
    (0, b"version https://git-lfs", "a pointer of Git LFS; fetch the model with `git lfs pull`"),
    (
        0,
        b"PK\x03\x04",
        "a zip archive; extract the .onnx file, or, if PyTorch saved it, load it there and optimise the module",
    ),
    (0, b"\x1f\x8b", "compressed with gzip; extract it first"),
    (0, b"\x89HDF\r\n", "an HDF5 file, as Keras saves models; convert it to ONNX with tf2onnx"),
    (0, b"GGUF", "a GGUF file of llama.cpp; export the model to ONNX"),
    (0, b"<", "a text file of HTML or XML, perhaps the page of a failed download"),
    (4, b"ORTM", "in ONNX Runtime's own format; give the .onnx file that it was made from"),
    (4, b"TFL3", "a TensorFlow Lite model; convert it to ONNX with tf2onnx"),
)


def other_kind(content: bytes) -> str:
    """What the file is, and what to do; "" where it may be a damaged model.

    >>> other_kind(b"GGUF\\x03\\0\\0\\0")
    'a GGUF file of llama.cpp; export the model to ONNX'
    """
    return next((kind for at, mark, kind in _KINDS if content[at : at + len(mark)] == mark), "")
