"""Data modules for the tasks. This package does not depend on models."""

from shunted_lit.data.base import BaseDataModule
from shunted_lit.data.classification import ClassificationDataModule, ImageFolderDataModule
from shunted_lit.data.coco import CocoDataModule
from shunted_lit.data.detection import DetectionDataModule
from shunted_lit.data.images import ImagesDataModule
from shunted_lit.data.segmentation import ADE20KDataModule, LabelMapDataModule, MaskFolderDataModule
from shunted_lit.data.shapes import ShapesDataModule
from shunted_lit.data.shards import ClassificationShardsDataModule, DetectionShardsDataModule
from shunted_lit.data.yolo import YoloDataModule

__all__ = [
    "ADE20KDataModule",
    "BaseDataModule",
    "ClassificationDataModule",
    "ClassificationShardsDataModule",
    "CocoDataModule",
    "DetectionDataModule",
    "DetectionShardsDataModule",
    "ImageFolderDataModule",
    "ImagesDataModule",
    "LabelMapDataModule",
    "MaskFolderDataModule",
    "ShapesDataModule",
    "YoloDataModule",
]
