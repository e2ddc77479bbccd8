"""Attention-92 on CIFAR-100, the paper's recipe. Paper: 21.71 % error.

Not run here:

    python tools/train.py configs/ran/ran-cifar92_1xb64-160k_cifar100-32.py

Paper, with `--cfg-options model.model_name=ran_cifar236`: 21.16, `ran_cifar452`: 20.45.
"""

_base_ = [
    "../_base_/cls_runtime_iters.py",
    "../_base_/datasets/cifar100_32.py",
    "../_base_/schedules/sgd_160k_cifar.py",
]
model = dict(type="ImageClassifier", model_name="ran_cifar92", num_classes=100)
tta_model = dict(type="FlipTTA")
