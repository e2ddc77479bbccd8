"""timm's ViT of the same width, depth and patch as VRWKV-nano, in the same config, to compare.

    python tools/train.py configs/vit/vit-nano_fcn_1xb2-44e_camvid-180x240.py \
        --cfg-options data_root=/path/to/camvid
"""

_base_ = "../vrwkv/vrwkv-nano_fcn_1xb2-44e_camvid-180x240.py"
model = dict(
    backbone=dict(
        _delete_=True,
        type="ZooBackbone",
        model_name="vit_tiny_patch16_224",
        patch_size=8,
        embed_dim=96,
        depth=6,
        num_heads=3,
        img_size=(184, 240),
        dynamic_img_size=True,
        dynamic_img_pad=True,
        out_indices=(5,),
    )
)
