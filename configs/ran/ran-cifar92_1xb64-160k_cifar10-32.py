"""Attention-92 on CIFAR-10, the paper's recipe. Paper: 4.99 % error.

Not run here:

    python tools/train.py configs/ran/ran-cifar92_1xb64-160k_cifar10-32.py

Other depths are `--cfg-options model.model_name=ran_cifar236` (paper: 4.14) and `ran_cifar452`
(3.90). Table 3 has naive attention too, which trains worse the deeper it is: `model.attention=nal`.
Tables 1 and 4: `model.mask_act=channel` or `spatial`, and `model.mask=local`, on `ran_cifar56`.
"""

_base_ = [
    "../_base_/cls_runtime_iters.py",
    "../_base_/datasets/cifar10_32.py",
    "../_base_/schedules/sgd_160k_cifar.py",
]
model = dict(type="ImageClassifier", model_name="ran_cifar92", num_classes=10)
tta_model = dict(type="FlipTTA")
