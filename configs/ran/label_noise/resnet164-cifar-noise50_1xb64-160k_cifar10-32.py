"""ResNet-164 on CIFAR-10 with 50 % of the training labels wrong. Paper: 8.35 % error.

Not run here:

    python tools/train.py configs/ran/label_noise/resnet164-cifar-noise50_1xb64-160k_cifar10-32.py
"""

_base_ = "./ran-cifar92-noise10_1xb64-160k_cifar10-32.py"
model = dict(model_name="resnet164_cifar")
train_dataloader = dict(dataset=dict(level=0.5))
