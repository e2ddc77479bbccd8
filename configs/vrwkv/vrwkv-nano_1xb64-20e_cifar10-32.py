"""VRWKV-nano on a sample of CIFAR-10 in folders, on a CPU, in minutes.

    python tools/train.py configs/vrwkv/vrwkv-nano_1xb64-20e_cifar10-32.py \
        --cfg-options data_root=/path/to/cifar10_small

5,000 images are far too few for a good score; it shows how to train on folders of one's own.
"""

_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/datasets/cifar10_small_32.py",
    "../_base_/schedules/adamw_epochs.py",
]
model = dict(
    type="ImageClassifier",
    model_name="vrwkv_nano_patch8_224",
    num_classes=10,
    img_size=32,
    patch_size=4,
    label_smoothing=0.1,
)
tta_model = dict(type="FlipTTA")
