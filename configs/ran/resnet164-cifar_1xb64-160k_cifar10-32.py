"""Pre-activation ResNet-164 on CIFAR-10, what the paper compares to. Paper: 5.46 % error.

Not run here:

    python tools/train.py configs/ran/resnet164-cifar_1xb64-160k_cifar10-32.py
"""

_base_ = "./ran-cifar92_1xb64-160k_cifar10-32.py"
model = dict(model_name="resnet164_cifar")
