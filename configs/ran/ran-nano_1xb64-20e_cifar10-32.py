"""RAN-nano, 0.07 M parameters, on a sample of CIFAR-10 in folders, on a CPU, in minutes.

    python tools/train.py configs/ran/ran-nano_1xb64-20e_cifar10-32.py \
        --cfg-options data_root=/path/to/cifar10_small

`model.attention=nal` makes the masks naive. 5,000 images are far too few for a good score.
"""

_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/datasets/cifar10_small_32.py",
    "../_base_/schedules/sgd_epochs.py",
]
model = dict(type="ImageClassifier", model_name="ran_nano", num_classes=10)
tta_model = dict(type="FlipTTA")
