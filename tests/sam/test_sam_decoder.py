"""The parts of the mask decoder: what is shared between prompts changes nothing."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vision.sam.mask_decoder import HighResolution, MaskDecoder, likely_iou
from vision.sam.prompt_encoder import PositionEmbedding, PromptEncoder, filled_boxes
from vision.sam.transformer import Attention, TwoWayTransformer

DIM = 64


def decoder(**options: object) -> MaskDecoder:
    torch.manual_seed(0)
    return MaskDecoder(DIM, mlp_dim=128, iou_hidden=32, **options).double().eval()


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def plain_high_resolution(module: HighResolution, up: Tensor, s4: Tensor, s8: Tensor) -> Tensor:
    """As it is published: repeat the image's maps for every prompt, project, concatenate, mix."""
    s4, s8 = (x.expand(len(up), -1, -1, -1) for x in (s4, s8))
    return module.mix(torch.cat([up, module.mr_proj(s8), module.hr_proj(s4)], dim=1)) + up


@pytest.mark.parametrize("prompts", [1, 5])
def test_the_shared_mix_is_the_plain_one(prompts: int) -> None:
    module = decoder(high_res_channels=(6, 10)).high_res
    up, s4, s8 = draw(prompts, DIM // 8, 12, 20), draw(1, 6, 12, 20), draw(1, 10, 6, 10)
    with torch.no_grad():
        found = module(up, module.image_share(s4, s8))
        wanted = plain_high_resolution(module, up, s4, s8)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        narrow = module.float()
        wide = narrow(up.float(), narrow.image_share(s4.float(), s8.float()))
    assert (wide - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_gradients_of_the_shared_mix_are_those_of_the_plain_one() -> None:
    module = decoder(high_res_channels=(6, 10)).high_res
    inputs = [x.requires_grad_() for x in (draw(3, 8, 8, 8), draw(1, 6, 8, 8), draw(1, 10, 4, 4))]
    weights = list(module.parameters())
    up, s4, s8 = inputs
    found = module(up, module.image_share(s4, s8)).square().sum()
    wanted = plain_high_resolution(module, up, s4, s8).square().sum()
    for a, b in zip(
        torch.autograd.grad(found, inputs + weights),
        torch.autograd.grad(wanted, inputs + weights),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_attention_with_a_shared_side_is_the_repeated_one() -> None:
    torch.manual_seed(0)
    attention = Attention(32, 4, downsample_rate=2).double()
    one, many = draw(1, 7, 32), draw(3, 5, 32, seed=1)
    with torch.no_grad():
        for a, b in ((one, many), (many, one)):
            repeated = [x.expand(3, -1, -1) for x in (a, b)]
            torch.testing.assert_close(
                attention(a, b, b), attention(repeated[0], repeated[1], repeated[1])
            )


def test_prompts_of_one_image_do_not_see_each_other() -> None:
    model = decoder(high_res_channels=(6, 10))
    embedding, pe = draw(1, DIM, 4, 6), draw(1, DIM, 4, 6, seed=1)
    sparse = draw(3, 2, DIM, seed=2)
    dense = draw(1, DIM, 1, 1, seed=3)
    with torch.no_grad():
        share = model.high_res.image_share(draw(1, 6, 16, 24), draw(1, 10, 8, 12))
        together = model(embedding, pe, sparse, dense, share)
        apart = [model(embedding, pe, one[None], dense, share) for one in sparse]
        expanded = model(
            embedding.expand(3, -1, -1, -1), pe, sparse, dense.expand(3, -1, 4, 6), share
        )
    assert together[0].shape == (3, 3, 16, 24)
    assert together[1].shape == (3, 3)
    for i in range(2):
        torch.testing.assert_close(together[i], torch.cat([one[i] for one in apart]))
        torch.testing.assert_close(together[i], expanded[i])


def test_single_and_multiple_masks_are_the_four_tokens() -> None:
    model = decoder()
    args = draw(1, DIM, 4, 4), draw(1, DIM, 4, 4), draw(2, 1, DIM), draw(1, DIM, 1, 1)
    with torch.no_grad():
        single, single_iou = model(*args, multimask_output=False)
        several, several_iou = model(*args, multimask_output=True)
        tokens, _ = model.transformer(
            args[0] + args[3],
            args[1],
            torch.cat(
                [
                    torch.cat([model.iou_token.weight, model.mask_tokens.weight]).expand(2, -1, -1),
                    args[2],
                ],
                dim=1,
            ),
        )
        iou = model.iou_prediction_head(tokens[:, 0])
    assert single.shape == (2, 1, 16, 16)
    assert several.shape == (2, 3, 16, 16)
    torch.testing.assert_close(torch.cat([single_iou, several_iou], 1), iou)
    assert not torch.equal(single[:, 0], several[:, 0])


def test_every_parameter_has_a_gradient() -> None:
    prompts, model = PromptEncoder(DIM).double(), decoder(high_res_channels=(6, 10))
    points = (draw(2, 4, 2), torch.tensor([[1, 0, -1, -1], [2, 3, 1, 0]]))
    sparse, dense = prompts(
        points, None, draw(2, 1, 16, 16), (64, 64), with_mask=torch.tensor([True, False])
    )
    share = model.high_res.image_share(draw(1, 6, 16, 16), draw(1, 10, 8, 8))
    loss = torch.zeros((), dtype=torch.float64)
    for multimask in (False, True):
        masks, iou = model(draw(1, DIM, 4, 4), draw(1, DIM, 4, 4), sparse, dense, share, multimask)
        loss = loss + masks.square().mean() + iou.square().mean()
    loss.backward()
    for module in (prompts, model):
        for name, p in module.named_parameters():
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name
            assert p.grad.abs().sum() > 0, name


def test_decoder_refuses_what_it_does_not_have() -> None:
    args = draw(1, DIM, 4, 4), draw(1, DIM, 4, 4), draw(1, 1, DIM), draw(1, DIM, 1, 1)
    with pytest.raises(ValueError, match="multimask_output=False"):
        decoder(single_mask=True)(*args)
    with pytest.raises(ValueError, match="encode the image with this model"):
        decoder(high_res_channels=(6, 10))(*args)
    with pytest.raises(ValueError, match="got a share"):
        decoder()(*args, draw(1, 16, 16, 16))
    with pytest.raises(ValueError, match="in eights"):
        MaskDecoder(60)
    with pytest.raises(ValueError, match="multiple of num_heads"):
        Attention(30, 4)


def test_position_depends_on_the_place_and_not_on_the_padding() -> None:
    torch.manual_seed(0)
    position = PositionEmbedding(32).double()
    square = position.grid((6, 6))
    torch.testing.assert_close(position.grid((4, 6)), square[:, :, :4], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(position.grid((6, 3)), square[..., :3], rtol=1e-6, atol=1e-6)
    centre = torch.tensor([[2.5, 1.5]], dtype=torch.float64) * 16
    torch.testing.assert_close(
        position(centre, (64, 96))[0], position.grid((4, 6))[0, :, 1, 2], rtol=1e-6, atol=1e-6
    )


def test_prompts_as_tokens() -> None:
    torch.manual_seed(0)
    prompts = PromptEncoder(DIM).double()
    coords = torch.tensor([[[3.0, 5.0], [40.0, 9.0]]], dtype=torch.float64)
    labels = torch.tensor([[1, 0]])
    box = coords.flatten(1)
    with torch.no_grad():
        points, dense = prompts((coords, labels), None, None, (64, 64))
        corners, _ = prompts(None, box, None, (64, 64))
        same, _ = prompts((coords, torch.tensor([[2, 3]])), None, None, (64, 64))
        both, _ = prompts((coords, labels), box, None, (64, 64))
        nothing, _ = prompts(None, None, draw(2, 1, 16, 16), (64, 64))
        table = prompts.label_embed.weight
        place = prompts.position(coords + 0.5, (64, 64))
    assert points.shape == (1, 3, DIM)  # and a padding point, as no box came
    torch.testing.assert_close(points[0, 0], place[0, 0] + table[1])
    torch.testing.assert_close(points[0, 1], place[0, 1] + table[0])
    torch.testing.assert_close(points[0, 2], table[4])
    torch.testing.assert_close(corners, same[:, :2])
    torch.testing.assert_close(both, torch.cat([points[:, :2], corners], 1))
    assert nothing.shape == (1, 0, DIM)
    assert dense.shape == (1, DIM, 1, 1)


def test_masks_of_some_prompts_only() -> None:
    torch.manual_seed(0)
    prompts = PromptEncoder(DIM).double()
    masks = draw(2, 1, 16, 16)
    with torch.no_grad():
        some = prompts.dense(masks, torch.tensor([False, True]))
        torch.testing.assert_close(some[1], prompts.dense(masks)[1])
        torch.testing.assert_close(some[0], prompts.dense(None)[0].expand(-1, 4, 4))


corner = st.integers(0, 63)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(corner, corner, corner, corner), min_size=1, max_size=4))
def test_a_filled_box_has_its_pixels_in_the_cells(corners: list[tuple[int, ...]]) -> None:
    """The share of every cell is the mean of the 4 x 4 pixels of the box's mask."""
    masks = torch.zeros(len(corners), 1, 64, 64)
    boxes = torch.tensor(corners).view(-1, 2, 2)
    low, high = boxes.amin(1), boxes.amax(1)
    for mask, (x0, y0), (x1, y1) in zip(masks, low.tolist(), high.tolist(), strict=True):
        mask[:, y0 : y1 + 1, x0 : x1 + 1] = 1
    other = torch.tensor([[9.0, 50.0]]).expand(len(corners), 1, 2)
    coords = torch.cat([other, high[:, None], low[:, None]], 1)  # in any order
    labels = torch.tensor([[1, 3, 2]]).expand(len(corners), 3)
    logits, boxed = filled_boxes(coords, labels, (64, 64))
    assert boxed.all()
    torch.testing.assert_close(logits, 6 * (2 * F.avg_pool2d(masks, 4) - 1))


def test_dense_boxes_are_mask_prompts_unless_a_mask_is_given() -> None:
    torch.manual_seed(0)
    prompts = PromptEncoder(DIM, dense_boxes=True).double()
    size = (64, 96)
    box = torch.tensor([[8.0, 16.0, 71.0, 47.0]], dtype=torch.float64)
    drawn = torch.full((1, 1, 16, 24), -6.0, dtype=torch.float64)
    drawn[..., 4:12, 2:18] = 6
    given = draw(2, 1, 16, 24)
    corners = torch.cat([box, box]).unflatten(1, (2, 2))
    labels = torch.tensor([[2, 3], [1, 0]])  # the second prompt has no box
    with torch.no_grad():
        filled, nothing = prompts.dense(drawn), prompts.dense(None)
        sparse, dense = prompts(None, box, None, size)
        torch.testing.assert_close(dense, filled)
        prompts.dense_boxes = False
        torch.testing.assert_close(sparse, prompts(None, box, None, size)[0])
        prompts.dense_boxes = True
        _, mixed = prompts((corners, labels), None, None, size)
        torch.testing.assert_close(mixed[:1], filled)
        torch.testing.assert_close(mixed[1:], nothing.expand(1, -1, 4, 6))
        _, masked = prompts((corners, labels), None, given, size)
        torch.testing.assert_close(masked, prompts.dense(given))
        use = torch.tensor([False, True])
        _, some = prompts((corners, labels), None, given, size, use)
        torch.testing.assert_close(some, torch.cat([filled, prompts.dense(given[1:])]))


def test_likely_iou_is_that_of_independent_pixels() -> None:
    """Expected intersection over expected union, pixel by pixel in float64."""
    logits = 3 * draw(2, 3, 5, 7)
    found = likely_iou(logits)
    for mask, value in zip(logits.flatten(0, 1), found.flatten(), strict=True):
        shared = either = 0.0
        for z in mask.flatten().tolist():
            p = 1 / (1 + torch.tensor(-z, dtype=torch.float64).exp().item())
            shared += p if z > 0 else 0
            either += 1 if z > 0 else p
        assert value.item() == pytest.approx(shared / either, abs=1e-12)
    sure = torch.where(draw(5, 7) > 0, 100.0, -100.0)
    assert likely_iou(sure) == 1
    assert likely_iou(torch.full((5, 7), -1e4)) == 0
    assert likely_iou(sure.half()).dtype == torch.float32


def test_scored_masks_are_the_same_masks() -> None:
    """Only the expected IoU changes, by the share that the logits make likely."""
    plain, scored = decoder(), decoder(score_masks=True)
    with torch.no_grad():
        scored.likely_iou_gain.copy_(torch.tensor([1.0, 0.5, 2.0, -1.0]))
    args = draw(1, DIM, 4, 4), draw(1, DIM, 4, 4), draw(2, 2, DIM), draw(1, DIM, 1, 1)
    for several, rows in ((None, slice(0, 4)), (False, slice(0, 1)), (True, slice(1, 4))):
        masks, iou = plain(*args, multimask_output=several)
        same, better = scored(*args, multimask_output=several)
        torch.testing.assert_close(same, masks)
        gain = scored.likely_iou_gain[rows]
        torch.testing.assert_close(better, iou + gain * likely_iou(masks))
    scored.zero_grad()
    better.sum().backward()
    head = scored.output_hypernetworks_mlps[1].layers[0].weight
    assert head.grad is None or not head.grad.any()  # the score does not change the masks
    assert scored.likely_iou_gain.grad.ne(0).any()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"points": (torch.zeros(2, 2), torch.zeros(2))}, r"\(N, P, 2\)"),
        ({"points": (torch.zeros(1, 2, 2), torch.zeros(1, 3))}, r"labels \(N, P\)"),
        ({"boxes": torch.zeros(4)}, r"\(N, 4\)"),
        ({"masks": torch.zeros(1, 16, 16)}, r"\(N, 1, 4h, 4w\)"),
        (
            {"points": (torch.zeros(2, 1, 2), torch.zeros(2, 1)), "boxes": torch.zeros(3, 4)},
            "same number N",
        ),
    ],
)
def test_wrong_shapes_are_named(prompt: dict[str, object], message: str) -> None:
    wanted = {"points": None, "boxes": None, "masks": None, **prompt}
    with pytest.raises(ValueError, match=message):
        PromptEncoder(DIM)(**wanted, size=(64, 64))


def test_transformer_equals_the_definition() -> None:
    """Against the same layers called one by one, as the paper's figure shows them."""
    torch.manual_seed(0)
    transformer = TwoWayTransformer(32, depth=2, num_heads=4, mlp_dim=64).double().eval()
    image, pe, pe_tokens = draw(2, 32, 3, 5), draw(1, 32, 3, 5, seed=1), draw(2, 4, 32, seed=2)

    def attend(module: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = module.q_proj(q), module.k_proj(k), module.v_proj(v)
        heads = [
            torch.softmax(a @ b.transpose(1, 2) / a.shape[-1] ** 0.5, -1) @ c
            for a, b, c in zip(*(x.chunk(4, dim=-1) for x in (q, k, v)), strict=True)
        ]
        return module.out_proj(torch.cat(heads, dim=-1))

    with torch.no_grad():
        found = transformer(image, pe, pe_tokens)
        tokens, keys, place = pe_tokens, image.flatten(2).mT, pe.flatten(2).mT
        for i, layer in enumerate(transformer.layers):
            q = tokens + pe_tokens if i else tokens
            update = attend(layer.self_attn, q, q, tokens)
            tokens = layer.norm1(tokens + update if i else update)
            cross = layer.cross_attn_token_to_image
            tokens = layer.norm2(tokens + attend(cross, tokens + pe_tokens, keys + place, keys))
            mlp = layer.mlp
            tokens = layer.norm3(tokens + mlp.lin2(F.relu(mlp.lin1(tokens))))
            cross = layer.cross_attn_image_to_token
            keys = layer.norm4(keys + attend(cross, keys + place, tokens + pe_tokens, tokens))
        last = transformer.final_attn_token_to_image
        tokens = tokens + attend(last, tokens + pe_tokens, keys + place, keys)
        tokens = transformer.norm_final_attn(tokens)
    torch.testing.assert_close(found[0], tokens)
    torch.testing.assert_close(found[1], keys)
