"""A ResNet of about RAN-nano's size, 0.06 M parameters, in the same config, to compare.

    python tools/train.py configs/ran/label_noise/resnet-nano-noise30_1xb64-20e_cifar10-32.py \
        --cfg-options data_root=/path/to/cifar10_small
"""

_base_ = "./ran-nano-noise30_1xb64-20e_cifar10-32.py"
model = dict(
    model_name="resnet164_cifar",
    stem_width=8,
    widths=(16, 32, 64),
    units_before=(10, 10, 10),
)
