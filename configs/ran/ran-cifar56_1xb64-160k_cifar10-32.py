"""Attention-56 on CIFAR-10, the paper's recipe. Paper: 5.52 % error.

Not run here:

    python tools/train.py configs/ran/ran-cifar56_1xb64-160k_cifar10-32.py
"""

_base_ = "./ran-cifar92_1xb64-160k_cifar10-32.py"
model = dict(model_name="ran_cifar56")
