"""The predictor: prompts of every shape, images one by one and in lists."""

from typing import Any

import numpy as np
import pytest
import torch

from vision.sam.model import RwkvSam, create_sam
from vision.sam.predictor import Predictor
from vision.sam.transforms import as_rgb

HEIGHT, WIDTH = 60, 90
LOW = (44, 64)  # of 171 x 256 pixels, padded to 176 x 256


def _picture(seed: int = 0, size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model() -> RwkvSam:
    torch.manual_seed(0)
    return create_sam("rwkv_sam_nano")


@pytest.fixture
def empty(model: RwkvSam) -> Predictor:
    return Predictor(model)


@pytest.fixture
def predictor(empty: Predictor) -> Predictor:
    empty.set_image(_picture())
    return empty


def _embedding(model: RwkvSam, image: Any, **options: Any) -> torch.Tensor:
    predictor = Predictor(model)
    predictor.set_image(image, **options)
    return predictor.get_image_embedding()


# Images


def test_state(empty: Predictor) -> None:
    assert not empty.is_image_set
    empty.set_image(_picture())
    assert empty.is_image_set
    assert empty.original_size == (HEIGHT, WIDTH)
    assert empty.input_size == (171, 256)
    assert empty.device == torch.device("cpu")
    assert empty.get_image_embedding().shape == (1, 64, 11, 16)
    empty.reset_image()
    assert not empty.is_image_set


def test_model_goes_to_eval_mode(model: RwkvSam) -> None:
    model.train()
    assert not Predictor(model).model.training


@pytest.mark.parametrize(
    "call",
    [
        lambda p: p.predict([[1, 2]], [1]),
        lambda p: p.predict_torch(torch.zeros(1, 1, 2), torch.ones(1, 1)),
        lambda p: p.get_image_embedding(),
        lambda p: p.save_embedding("never.safetensors"),
        lambda p: p.original_size,
        lambda p: p.input_size,
    ],
)
def test_without_image(empty: Predictor, call: Any) -> None:
    with pytest.raises(RuntimeError, match="call set_image"):
        call(empty)
    empty.set_image_batch([_picture()])
    with pytest.raises(RuntimeError, match="predict_batch"):
        call(empty)


def test_an_image_that_is_refused_leaves_none(predictor: Predictor) -> None:
    with pytest.raises(ValueError, match=r"\(H, W, 3\)"):
        predictor.set_image(np.zeros((4, 4), np.uint8))
    assert not predictor.is_image_set


def test_bgr(model: RwkvSam) -> None:
    picture = _picture()
    flipped = _embedding(model, picture[..., ::-1], image_format="BGR")
    assert torch.equal(flipped, _embedding(model, picture))
    assert not torch.equal(_embedding(model, picture[..., ::-1]), flipped)
    planes = torch.from_numpy(picture).permute(2, 0, 1).flip(0)
    np.testing.assert_array_equal(as_rgb(planes, "BGR"), picture)


def test_thin_image(empty: Predictor) -> None:
    empty.set_image(_picture(size=(1, 700)))
    assert empty.input_size == (1, 256)
    assert empty.predict(box=[0, 0, 600, 0])[0].shape == (3, 1, 700)


def test_torch_image(model: RwkvSam) -> None:
    predictor = Predictor(model)
    x = torch.randint(0, 256, (1, 3, 100, 50), dtype=torch.uint8)
    predictor.set_torch_image(x, (400, 200))
    wanted = model.encode_image(x)
    torch.testing.assert_close(predictor.get_image_embedding(), wanted.embedding)
    assert (predictor.input_size, predictor.original_size) == ((100, 50), (400, 200))
    assert predictor.predict([[150, 300]], [1])[0].shape == (3, 400, 200)
    predictor.set_torch_image(x / 255, (400, 200))
    torch.testing.assert_close(
        predictor.get_image_embedding(), wanted.embedding, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("shape", "said"), [((3, 9, 9), "set_image takes"), ((2, 3, 9, 9), "set_image_batch")]
)
def test_wrong_torch_images(empty: Predictor, shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        empty.set_torch_image(torch.zeros(shape), (9, 9))


def test_torch_image_of_a_model_with_squares() -> None:
    predictor = Predictor(create_sam("rwkv_sam_nano", pad_to_square=True))
    predictor.set_torch_image(torch.zeros(1, 3, 256, 100), (512, 200))
    with pytest.raises(ValueError, match=r"256 pixels at the longest side, got \(200, 100\)"):
        predictor.set_torch_image(torch.zeros(1, 3, 200, 100), (512, 200))


# Prompts


def test_results(predictor: Predictor) -> None:
    masks, iou, low = predictor.predict([[10, 20]], [1])
    assert (masks.shape, iou.shape, low.shape) == ((3, HEIGHT, WIDTH), (3,), (3, *LOW))
    assert (masks.dtype, iou.dtype, low.dtype) == (bool, np.float32, np.float32)
    single = predictor.predict([[10, 20]], [1], multimask_output=False)
    assert [x.shape for x in single] == [(1, HEIGHT, WIDTH), (1,), (1, *LOW)]
    logits = predictor.predict([[10, 20]], [1], return_logits=True)[0]
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits > 0, masks)
    assert 0 < masks.mean() < 1  # else the line before says nothing


def test_coordinates_are_moved_to_the_resized_image(predictor: Predictor) -> None:
    points, labels = [[30.0, 20.0], [60.0, 50.0]], [1, 0]
    scale = torch.tensor([256 / WIDTH, 171 / HEIGHT])
    found = predictor.predict(points, labels, [10, 5, 70, 40], return_logits=True)
    wanted = predictor.predict_torch(
        torch.tensor([points]) * scale,
        torch.tensor([labels]),
        torch.tensor([[10.0, 5.0, 70.0, 40.0]]) * scale.repeat(2),
        return_logits=True,
    )
    for array, tensor in zip(found, wanted, strict=True):
        np.testing.assert_allclose(array, tensor[0].numpy(), rtol=1e-5, atol=1e-5)
    moved = predictor.predict([[31.0, 20.0], [60.0, 50.0]], labels, [10, 5, 70, 40])
    assert np.abs(moved[2] - found[2]).max() > 1e-4


def test_low_resolution_logits_are_a_mask_prompt(predictor: Predictor) -> None:
    low = predictor.predict([[10, 20]], [1])[2]
    masks, _, again = predictor.predict([[10, 20]], [1], mask_input=low[1:2])
    assert masks.shape == (3, HEIGHT, WIDTH)
    assert np.abs(again - low).max() > 1e-4
    assert predictor.predict(mask_input=torch.tensor(low[:1]))[0].shape == (3, HEIGHT, WIDTH)


def test_several_objects_are_what_each_is_alone(predictor: Predictor) -> None:
    boxes = np.array([[0, 0, 30, 30], [5, 10, 80, 50], [40, 2, 60, 59]])
    points = np.random.default_rng(0).uniform(0, 60, (3, 2, 2))
    labels = np.array([[1, 0], [1, 1], [1, -1]])
    low = predictor.predict(box=boxes)[2][:, :1]
    several = predictor.predict(points, labels, boxes, low)
    assert [x.shape for x in several] == [(3, 3, HEIGHT, WIDTH), (3, 3), (3, 3, *LOW)]
    for i in range(3):
        alone = predictor.predict(points[i], labels[i], boxes[i], low[i], return_logits=True)
        np.testing.assert_allclose(several[2][i], alone[2], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(several[1][i], alone[1], rtol=1e-4, atol=1e-5)
        sure = np.abs(alone[0]) > 1e-4
        np.testing.assert_array_equal(several[0][i][sure], (alone[0] > 0)[sure])


def test_one_box_with_an_axis_keeps_it(predictor: Predictor) -> None:
    assert predictor.predict(box=[[0, 0, 30, 30]])[0].shape == (1, 3, HEIGHT, WIDTH)
    # Points of one object go with one box, in either form.
    both = predictor.predict([[9, 9]], [1], box=[[0, 0, 30, 30]])
    plain = predictor.predict([[9, 9]], [1], box=[0, 0, 30, 30])
    np.testing.assert_array_equal(both[2][0], plain[2])


@pytest.mark.parametrize(
    "box",
    [
        (1, 2, 30, 40),
        np.array([1, 2, 30, 40]),
        np.array([1, 2, 30, 40], np.float16),
        torch.tensor([1, 2, 30, 40]),
        torch.tensor([1.0, 2.0, 30.0, 40.0], dtype=torch.bfloat16, requires_grad=True),
    ],
)
def test_box_forms(predictor: Predictor, box: Any) -> None:
    wanted = predictor.predict(box=[1, 2, 30, 40])[2]
    np.testing.assert_array_equal(predictor.predict(box=box)[2], wanted)


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ({}, "got none"),
        ({"point_coords": [1, 2], "point_labels": [1]}, r"\[\[x, y\]\]"),
        ({"point_coords": [[1, 2, 3]], "point_labels": [1]}, r"got \(1, 3\)"),
        ({"point_coords": [], "point_labels": []}, "no point"),
        ({"point_coords": np.zeros((0, 2)), "point_labels": []}, "no point"),
        ({"point_coords": np.zeros((1, 1, 1, 2)), "point_labels": [1]}, r"\(N, P, 2\)"),
        ({"point_coords": [[1, 2], [3]], "point_labels": [1, 1]}, "different lengths"),
        ({"point_coords": [["a", "b"]], "point_labels": [1]}, "dtype <U1"),
        ({"point_coords": [[1, np.nan]], "point_labels": [1]}, "NaN"),
        ({"point_coords": [[1, 2]]}, "without point_labels"),
        ({"point_labels": [1]}, "without point_coords"),
        ({"point_coords": [[1, 2]], "point_labels": [1, 0]}, r"\(1,\), got \(2,\)"),
        ({"point_coords": [[1, 2]], "point_labels": [[1]]}, r"\(1,\), got \(1, 1\)"),
        ({"point_coords": [[1, 2], [3, 4]], "point_labels": [1, 2]}, r"-1 for padding, got \[2\]"),
        ({"point_coords": [[1, 2]], "point_labels": [0.5]}, r"got \[0\.5\]"),
        ({"box": [1, 2, 3]}, r"wants x0, y0, x1, y1 as \(4,\).*got \(3,\)"),
        ({"box": [[1, 2], [3, 4]]}, r"got \(2, 2\)"),
        ({"box": np.ones((2, 5, 4))}, r"\(2, 5, 4\).*predict_batch\(box_batch"),
        ({"box": [30, 2, 3, 4]}, r"x0 <= x1.*\[30.0, 2.0, 3.0, 4.0\].*width and height"),
        ({"box": [[1, 2, 3, 4], [1, 20, 3, 4]]}, "x0 <= x1"),
        ({"box": [1, 2, np.inf, 4]}, "infinity in box"),
        ({"box": np.zeros((0, 4))}, "at least one object"),
        ({"mask_input": np.zeros(LOW)}, r"mask_input\[None\]"),
        ({"mask_input": np.zeros((3, *LOW))}, "choose one"),
        ({"mask_input": np.zeros((2, 3, *LOW))}, "of each object"),
        ({"mask_input": np.zeros((1, 256, 256))}, r"\(1, 44, 64\).*got \(1, 256, 256\)"),
        ({"mask_input": np.zeros((1, *LOW), bool)}, "logits.*dtype bool"),
        ({"mask_input": np.full((1, *LOW), np.nan)}, "NaN"),
        (
            {"box": np.ones((2, 4)), "point_coords": [[1, 2]], "point_labels": [1]},
            r"'point_coords': 1, 'box': 2.*\(N, P, 2\)",
        ),
        ({"box": np.ones((2, 4)), "mask_input": np.zeros((3, 1, *LOW))}, "'mask_input': 3"),
    ],
)
def test_wrong_prompts(predictor: Predictor, prompts: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        predictor.predict(**prompts)


def test_wrong_prompt_tensors(predictor: Predictor) -> None:
    with pytest.raises(ValueError, match="go together"):
        predictor.predict_torch(torch.zeros(1, 1, 2), None)
    with pytest.raises(ValueError, match=r"\(N, P, 2\)"):
        predictor.predict_torch(torch.zeros(1, 2), torch.ones(1))
    with pytest.raises(ValueError, match="44 x 64"):
        predictor.predict_torch(None, None, mask_input=torch.zeros(1, 1, 64, 64))


# Lists of images


def test_batch_is_what_each_image_is_alone(empty: Predictor) -> None:
    # The first and the third are padded to one size, the fourth has the size of the first.
    images = [_picture(i, size) for i, size in enumerate([(60, 90), (90, 60), (61, 90), (60, 90)])]
    prompts: dict[str, Any] = {
        "point_coords_batch": [None, [[5, 6], [50, 70]], [[[5, 6]], [[8, 9]]], None],
        "point_labels_batch": [None, [1, 0], [[1], [1]], None],
        "box_batch": [[1, 2, 30, 40], None, [[1, 2, 30, 40], [5, 6, 7, 8]], None],
        "mask_input_batch": [None, None, None, np.ones((1, *LOW), np.float32)],
    }
    seen = []
    hook = empty.model.encoder.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    empty.set_image_batch(images)
    assert sorted(seen) == [1, 3]
    seen.clear()
    empty.set_image_batch(images, batch_size=2)
    hook.remove()
    assert sorted(seen) == [1, 1, 2]
    masks, iou, low = empty.predict_batch(**prompts, return_logits=True)
    assert [len(x) for x in (masks, iou, low)] == [4, 4, 4]
    alone = Predictor(empty.model)
    for i, image in enumerate(images):
        alone.set_image(image)
        own = {name.removesuffix("_batch"): entries[i] for name, entries in prompts.items()}
        wanted = alone.predict(**own, return_logits=True)
        for found, one in zip((masks[i], iou[i], low[i]), wanted, strict=True):
            np.testing.assert_allclose(found, one, rtol=1e-3, atol=1e-4)


def test_wrong_batches(empty: Predictor) -> None:
    with pytest.raises(RuntimeError, match="set_image_batch before predict_batch"):
        empty.predict_batch(box_batch=[[0, 0, 9, 9]])
    with pytest.raises(ValueError, match="set_image takes one"):
        empty.set_image_batch(_picture())  # type: ignore[arg-type] # the mistake
    with pytest.raises(ValueError, match="an empty one"):
        empty.set_image_batch([])
    with pytest.raises(ValueError, match=r"images\[1\]: .*greyscale"):
        empty.set_image_batch([_picture(), _picture()[..., 0]])
    with pytest.raises(ValueError, match="batch_size wants 1 or more, got 0"):
        empty.set_image_batch([_picture()], batch_size=0)
    assert not empty.is_image_set
    empty.set_image_batch([_picture(), _picture(1)])
    with pytest.raises(ValueError, match=r"box_batch.*2 images, got 1"):
        empty.predict_batch(box_batch=[[0, 0, 9, 9]])
    with pytest.raises(ValueError, match=r"images\[1\]: .*got none"):
        empty.predict_batch(box_batch=[[0, 0, 9, 9], None])
    empty.set_image(_picture())
    with pytest.raises(RuntimeError, match="predict takes one image"):
        empty.predict_batch(box_batch=[[0, 0, 9, 9]])
