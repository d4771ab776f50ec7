"""Training tasks, one LightningModule per file."""

from shunted_lit.tasks.base import BaseTask
from shunted_lit.tasks.classification import ClassificationTask
from shunted_lit.tasks.detection import DetectionTask
from shunted_lit.tasks.segmentation import SegmentationTask

__all__ = ["BaseTask", "ClassificationTask", "DetectionTask", "SegmentationTask"]
