"""Attention-56 with naive attention, M T. Paper: 5.89 % error, 0.37 above `(1 + M) T`.

Not run here:

    python tools/train.py configs/ran/ran-cifar56-nal_1xb64-160k_cifar10-32.py
"""

_base_ = "./ran-cifar56_1xb64-160k_cifar10-32.py"
model = dict(attention="nal")
