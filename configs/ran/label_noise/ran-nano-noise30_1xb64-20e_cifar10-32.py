"""RAN-nano on a sample of CIFAR-10 with 30 % of the training labels wrong, on a CPU.

    python tools/train.py configs/ran/label_noise/ran-nano-noise30_1xb64-20e_cifar10-32.py \
        --cfg-options data_root=/path/to/cifar10_small
"""

_base_ = "../ran-nano_1xb64-20e_cifar10-32.py"
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type="NoisyLabels",
        level=0.3,
        seed=0,
        dataset={{_base_.train_dataloader.dataset}},
    )
)
