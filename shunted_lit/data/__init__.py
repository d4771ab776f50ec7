"""Data for the tasks, a LightningDataModule each. No model is known here."""

from shunted_lit.data.base import DetectionDataModule
from shunted_lit.data.coco import CocoDataModule
from shunted_lit.data.shapes import ShapesDataModule
from shunted_lit.data.yolo import YoloDataModule

__all__ = ["CocoDataModule", "DetectionDataModule", "ShapesDataModule", "YoloDataModule"]
