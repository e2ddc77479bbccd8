"""Attention-92 on CIFAR-10 with 10 % of the training labels wrong. Paper: 5.15 % error.

Not run here:

    python tools/train.py configs/ran/label_noise/ran-cifar92-noise10_1xb64-160k_cifar10-32.py
"""

_base_ = [
    "../../_base_/cls_runtime_iters.py",
    "../../_base_/datasets/cifar10_noisy_32.py",
    "../../_base_/schedules/sgd_160k_cifar.py",
]
model = dict(type="ImageClassifier", model_name="ran_cifar92", num_classes=10)
tta_model = dict(type="FlipTTA")
