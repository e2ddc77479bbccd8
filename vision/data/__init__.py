"""Data sets and transforms as plain callables: arrays in, arrays out."""

from vision.data.classification import ClassificationDataset, create_classification_dataset
from vision.data.digit_scenes import DigitScenes
from vision.data.image_io import (
    ImageReadError,
    LabelError,
    check_labels,
    decode_image,
    list_images,
    read_image,
    read_mask,
)
from vision.data.instances import box_of_mask, boxes_of_masks, interior_point
from vision.data.label_noise import LabelNoise
from vision.data.pictures import contact_sheet, draw_sample, overlay, palette
from vision.data.transforms import AlbumentationsTransform, ClassificationTransform

__all__ = [
    "AlbumentationsTransform",
    "ClassificationDataset",
    "ClassificationTransform",
    "DigitScenes",
    "ImageReadError",
    "LabelError",
    "LabelNoise",
    "box_of_mask",
    "boxes_of_masks",
    "check_labels",
    "contact_sheet",
    "create_classification_dataset",
    "decode_image",
    "draw_sample",
    "interior_point",
    "list_images",
    "overlay",
    "palette",
    "read_image",
    "read_mask",
]
