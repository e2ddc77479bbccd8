"""Attention-92 on CIFAR-10 with 70 % of the training labels wrong. Paper: 15.75 % error.

Not run here:

    python tools/train.py configs/ran/label_noise/ran-cifar92-noise70_1xb64-160k_cifar10-32.py
"""

_base_ = "./ran-cifar92-noise10_1xb64-160k_cifar10-32.py"
train_dataloader = dict(dataset=dict(level=0.7))
