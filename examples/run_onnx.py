"""Run an exported detector with ONNX Runtime, NumPy and Pillow alone.

python examples/run_onnx.py student.onnx photo.jpg [SCORE]
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def detect(session, image, score_threshold=None):
    """Find objects in a Pillow image, which is turned upright.

    Returns:
        boxes (R, 4) in pixels of the upright image (XYXY), scores (R,), names of classes, and masks (R, H, W), bool, of
        Mask R-CNN, None of others.
    """
    facts = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    if score_threshold is None:
        score_threshold = facts["score_threshold"]
    image = ImageOps.exif_transpose(image)
    # As in training: the longer side has one length.
    scale = facts["image_size"] / max(image.size)
    width, height = (max(1, int(side * scale + 0.5)) for side in image.size)
    pixels = np.asarray(image.convert("RGB").resize((width, height), Image.BILINEAR))
    inputs = {
        "images": pixels.transpose(2, 0, 1)[None],  # (1, 3, H, W), uint8
        "score_threshold": np.array([score_threshold], np.float32),
    }
    boxes, scores, classes, *masks = (output[0] for output in session.run(None, inputs))
    found = scores > 0  # the rest is filling
    boxes = boxes[found] * np.array([image.width / width, image.height / height] * 2, np.float32)
    names = [facts["classes"][i] if facts["classes"] else str(i) for i in classes[found]]
    if not masks:
        return boxes, scores[found], names, None
    pasted = [paste(mask, box, image.height, image.width) for mask, box in zip(masks[0][found], boxes)]
    return boxes, scores[found], names, np.array(pasted, bool).reshape(-1, image.height, image.width)


def paste(mask, box, height, width):
    """Pixels (H, W) of a mask (m, m) of probabilities in cells of a box: interpolated at their centres, from 0.5."""

    def weights(start, end, pixels):
        cells = (np.arange(pixels) + 0.5 - start) / (end - start) * len(mask) - 0.5
        return np.maximum(0, 1 - np.abs(cells[:, None] - np.arange(len(mask))))  # (pixels, m)

    x0, y0, x1, y1 = box
    return weights(y0, y1, height) @ mask @ weights(x0, x1, width).T >= 0.5


if __name__ == "__main__":
    file, photo, *threshold = sys.argv[1:]
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    boxes, scores, names, masks = detect(session, Image.open(photo), *map(float, threshold))
    for i, name in enumerate(names):
        covered = [] if masks is None else [f"{masks[i].sum()} pixels"]
        print(name, f"{scores[i]:.3f}", *(f"{value:.1f}" for value in boxes[i]), *covered)
