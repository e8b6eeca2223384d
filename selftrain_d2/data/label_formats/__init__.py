"""Labels of boxes in the common formats: COCO JSON, YOLO, PASCAL VOC.

All are read into one COCO dictionary that goes through the checks and repairs of
:mod:`selftrain_d2.data.coco_file`, so nothing behind knows of formats. ``detect.py`` tells them apart,
``convert.py`` writes each from any other.

The package supervision (0.31.2 looked at) reads YOLO and VOC too, and the tests use it as a second reader. It is not
the reader here because it drops scores and ``difficult``, its errors name no line of a file, it numbers VOC's classes
in the order of the files, and boxes become float32.
"""
