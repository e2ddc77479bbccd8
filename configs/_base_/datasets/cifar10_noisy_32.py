"""CIFAR-10 with a share of the training labels flipped to other classes; test labels are clean."""

_base_ = "./cifar10_32.py"
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type="NoisyLabels",
        level=0.1,
        seed=0,
        dataset={{_base_.train_dataloader.dataset}},
    )
)
