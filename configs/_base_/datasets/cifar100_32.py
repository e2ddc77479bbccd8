"""CIFAR-100 as torchvision reads it, with the augmentation of `cifar10_32.py`.

python -c "from torchvision.datasets import CIFAR100; CIFAR100('data/cifar100', download=True)"
"""

_base_ = "./cifar10_32.py"
data_root = "data/cifar100"
_set = dict(data_root=data_root, name="torch/cifar100", num_classes=100)
train_dataloader = dict(dataset=_set)
val_dataloader = dict(dataset=_set)
test_dataloader = val_dataloader
