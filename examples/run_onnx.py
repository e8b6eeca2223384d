"""Run an exported detector with ONNX Runtime, NumPy and Pillow alone.

python examples/run_onnx.py student.onnx photo.jpg [SCORE]
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image


def detect(session, image, score_threshold=None):
    """Boxes (R, 4) in pixels of the image (XYXY), scores (R,) and names of classes of a Pillow image."""
    facts = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    if score_threshold is None:
        score_threshold = facts["score_threshold"]
    # As in training: the longer side has one length.
    scale = facts["image_size"] / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    pixels = np.asarray(image.convert("RGB").resize((width, height), Image.BILINEAR))
    inputs = {
        "images": pixels.transpose(2, 0, 1)[None],  # (1, 3, H, W), uint8
        "score_threshold": np.array([score_threshold], np.float32),
    }
    boxes, scores, classes = (output[0] for output in session.run(None, inputs))
    found = scores > 0  # the rest is filling
    boxes = boxes[found] * np.array([image.width / width, image.height / height] * 2, np.float32)
    names = [facts["classes"][i] if facts["classes"] else str(i) for i in classes[found]]
    return boxes, scores[found], names


if __name__ == "__main__":
    file, photo, *threshold = sys.argv[1:]
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for box, score, name in zip(*detect(session, Image.open(photo), *map(float, threshold))):
        print(name, f"{score:.3f}", *(f"{value:.1f}" for value in box))
