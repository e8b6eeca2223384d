import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from PIL import Image
from torch import nn

from selftrain_d2.config import add_selftrain_config
from selftrain_d2.errors import InputError
from selftrain_d2.modeling.meta_arch.segmentation import (
    SemSegPyramidSumHead,
    mean_image_loss,
    subsample_labels,
)

CLASSES, IGNORE = 3, 255


def make_config(norm="BN", architecture="SelfTrainingSegmentor"):
    cfg = get_cfg()
    add_selftrain_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "build_nas_fpn_backbone", 0
    cfg.MODEL.EFFICIENTNET.NAME, cfg.MODEL.EFFICIENTNET.DROP_CONNECT_RATE = "efficientnet-b0", 0.0
    cfg.MODEL.EFFICIENTNET.NORM = norm
    cfg.MODEL.EFFICIENTNET.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES, cfg.MODEL.FPN.OUT_CHANNELS = ["res3", "res4", "res5"], 16
    cfg.MODEL.FPN.NORM, cfg.MODEL.NAS_FPN.REPEATS = norm, 2
    head = cfg.MODEL.SEM_SEG_HEAD
    head.NAME, head.IN_FEATURES = "SemSegPyramidSumHead", ["p3", "p4", "p5", "p6", "p7"]
    head.NUM_CLASSES, head.CONVS_DIM, head.NORM = CLASSES, 16, norm
    return cfg


def make_batch(sources, size=(64, 96), seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch = []
    for i, source in enumerate(sources):
        height, width = size[0] - 8 * i, size[1]
        labels = torch.randint(0, CLASSES, (height, width), generator=generator)
        labels[: 10 * i] = IGNORE
        image = torch.randint(0, 255, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "sem_seg": labels, "label_source": source})
    return batch


def randomize(model):
    """Weights that tell classes apart, and statistics that are not the initial ones."""
    torch.manual_seed(1)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_mean"):
            tensor.normal_(std=0.1)
        elif "predictor" in name:
            tensor.normal_(std=0.5)


# ---- the loss, against one written with loops ----
def loss_by_hand(logits, labels):
    means = []
    for image in range(len(logits)):
        losses = []
        for y in range(labels.shape[1]):
            for x in range(labels.shape[2]):
                label = labels[image, y, x]
                if label != IGNORE:
                    scores = np.exp(logits[image, :, y, x])
                    losses.append(-np.log(scores[label] / scores.sum()))
        means.append(np.mean(losses) if losses else 0.0)
    return np.mean(means)


def test_loss_is_the_mean_over_images_of_means_over_valid_pixels():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, CLASSES, 5, 7, generator=generator, dtype=torch.float64).float()
    labels = torch.randint(0, CLASSES, (3, 5, 7), generator=generator)
    labels[1, :4] = IGNORE
    labels[2] = IGNORE
    expected = loss_by_hand(logits.double().numpy(), labels.numpy())
    assert mean_image_loss(logits, labels, IGNORE).item() == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(loss_by_hand(logits[:2].double().numpy(), labels[:2].numpy()))


def test_images_without_valid_pixels_have_no_loss_and_no_gradient():
    logits = torch.randn(2, CLASSES, 4, 4, requires_grad=True)
    labels = torch.full((2, 4, 4), IGNORE)
    loss = mean_image_loss(logits, labels, IGNORE)
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


@pytest.mark.parametrize(
    ("size", "stride"), [((8, 12), 4), ((9, 6), 4), ((5, 5), 2), ((3, 1), 4), ((7, 7), 1)]
)
def test_labels_are_those_at_the_centres_of_cells(size, stride):
    labels = torch.arange(2 * size[0] * size[1]).reshape(2, *size)
    cells = [-(-side // stride) for side in size]
    result = subsample_labels(labels, torch.Size(cells), stride, IGNORE)
    for i in range(cells[0]):
        for j in range(cells[1]):
            y, x = (int((k + 0.5) * stride) for k in (i, j))
            inside = y < size[0] and x < size[1]
            assert result[1, i, j] == (labels[1, y, x] if inside else IGNORE)


# ---- the head ----
def test_head_sums_upsampled_levels():
    """Without 3x3 convolutions the logits are the classifier's of the sum of all levels."""
    shapes = {f"p{k}": ShapeSpec(channels=6, stride=2**k) for k in (3, 4, 5)}
    head = SemSegPyramidSumHead(shapes, num_classes=4, num_convs=0, norm="")
    nn.init.normal_(head.predictor.weight)
    features = {name: torch.randn(2, 6, 1, 1) for name in shapes}
    total = sum(features.values())  # constant maps: of whatever size
    features = {
        name: x.expand(-1, -1, 64 // shapes[name].stride, 32 // shapes[name].stride)
        for name, x in features.items()
    }
    with torch.no_grad():
        logits = head.layers(features)
    assert logits.shape == (2, 4, 16, 8)
    expected = torch.einsum("kc,nc->nk", head.predictor.weight[:, :, 0, 0], total[:, :, 0, 0])
    torch.testing.assert_close(logits, expected[:, :, None, None].expand_as(logits))


def test_head_upsamples_about_the_centres_of_pixels():
    """A level that is linear in the place stays so: cell (i, j) of stride s is centred at s * (i + 0.5)."""
    head = SemSegPyramidSumHead({"p5": ShapeSpec(channels=1, stride=32)}, num_classes=1, num_convs=0, norm="")
    nn.init.ones_(head.predictor.weight)
    centres = 32 * (torch.arange(4) + 0.5)
    with torch.no_grad():
        logits = head.layers({"p5": centres.expand(1, 1, 4, 4)})
    inner = slice(4, -4)  # beyond the outermost centres the value stays the same
    torch.testing.assert_close(logits[0, 0, 0, inner], (4 * (torch.arange(32) + 0.5))[inner])


def test_number_of_parameters_of_the_head():
    shapes = {name: ShapeSpec(channels=20, stride=8) for name in ("p3", "p4")}
    head = SemSegPyramidSumHead(shapes, num_classes=21, conv_dims=12, num_convs=3, norm="BN")
    expected = 9 * 20 * 12 + 2 * 9 * 12 * 12 + 3 * 2 * 12 + 21 * 12 + 21
    assert sum(p.numel() for p in head.parameters()) == expected


@pytest.mark.parametrize(
    "shapes",
    [
        {},
        {"p3": ShapeSpec(channels=8, stride=8), "p4": ShapeSpec(channels=16, stride=16)},
        {"res1": ShapeSpec(channels=8, stride=2)},
    ],
)
def test_levels_that_cannot_be_summed(shapes):
    with pytest.raises(InputError, match="IN_FEATURES"):
        SemSegPyramidSumHead(shapes, num_classes=2)


# ---- the segmentor ----
def test_losses_of_each_source_are_those_of_a_batch_of_its_own():
    model = build_model(make_config("FrozenBN")).train()
    randomize(model)
    batch = make_batch(["human", "pseudo", "human", "pseudo", "pseudo"], size=(96, 96))
    model.loss_weights = (0.25, 3.0)
    with EventStorage(), torch.no_grad():
        mixed = model(batch)
        assert set(mixed) == {"loss_sem_seg_human", "loss_sem_seg_pseudo"}
        raw = dict(model.raw_losses)
        for source, weight in (("human", 0.25), ("pseudo", 3.0)):
            # all of one size: attention looks at the whole padded picture
            alone = [{**x, "label_source": "human"} for x in padded(batch) if x["label_source"] == source]
            expected = model(alone)["loss_sem_seg"]
            torch.testing.assert_close(raw[source], expected)
            torch.testing.assert_close(mixed[f"loss_sem_seg_{source}"], weight * expected)
    assert mixed["loss_sem_seg_human"] != mixed["loss_sem_seg_pseudo"]


def padded(batch):
    """Each image and label map padded to 96 x 96, as the batch is: the mean colour, and the ignore value."""
    result = []
    for x in batch:
        below = 96 - x["image"].shape[1]
        mean = torch.tensor(get_cfg().MODEL.PIXEL_MEAN)[:, None, None].expand(3, below, 96)
        result.append(
            {
                **x,
                "image": torch.cat([x["image"].float(), mean], dim=1),
                "sem_seg": nn.functional.pad(x["sem_seg"], (0, 0, 0, below), value=IGNORE),
            }
        )
    return result


def test_batch_norm_sees_both_sources_at_once():
    model = build_model(make_config()).train()
    batches = []
    model.backbone.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    with EventStorage():
        model(make_batch(["pseudo", "human", "pseudo"]))
    assert batches == [3]


def test_predictions_belong_to_their_source():
    """Pseudo images come first in the batch: the loss of each source is that of its own images."""
    model = build_model(make_config()).train()
    batch = make_batch(["pseudo", "human"])
    batch[1]["sem_seg"] = torch.full_like(batch[1]["sem_seg"], IGNORE)
    with EventStorage():
        losses = model(batch)
    assert losses["loss_sem_seg_human"] == 0 and losses["loss_sem_seg_pseudo"] > 0


def test_all_parameters_train_and_ignored_labels_are_harmless():
    model = build_model(make_config()).train()
    with EventStorage():
        losses = model(make_batch(["human", "pseudo"]))
        sum(losses.values()).backward()
        assert not [name for name, p in model.named_parameters() if p.grad is None]
        batch = make_batch(["human", "pseudo"])
        for sample in batch:
            sample["sem_seg"].fill_(IGNORE)
        model.zero_grad()
        losses = model(batch)
        sum(losses.values()).backward()
    assert [loss.item() for loss in losses.values()] == [0, 0]
    assert all((p.grad == 0).all() for p in model.parameters())


def test_detectron2s_own_segmentor_takes_the_head():
    torch.manual_seed(0)
    ours = build_model(make_config("FrozenBN")).train()
    plain = build_model(make_config("FrozenBN", "SemanticSegmentor")).train()
    plain.load_state_dict(ours.state_dict())  # the same names
    batch = make_batch(["human"] * 2)
    with EventStorage(), torch.no_grad():
        torch.testing.assert_close(ours(batch), plain(batch))
        for one, other in zip(ours.eval()(batch), plain.eval()(batch)):
            torch.testing.assert_close(one["sem_seg"], other["sem_seg"])


def test_it_takes_detectron2s_own_head():
    cfg = make_config("FrozenBN")
    cfg.MODEL.SEM_SEG_HEAD.NAME, cfg.MODEL.SEM_SEG_HEAD.NORM = "SemSegFPNHead", "GN"
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM, cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = 32, ["p3", "p4", "p5"]
    torch.manual_seed(0)
    ours = build_model(cfg).train()
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    plain = build_model(cfg).train()
    plain.load_state_dict(ours.state_dict())
    # that head needs sizes that the coarsest stride divides
    batch = padded(make_batch(["human", "pseudo"], size=(96, 96)))
    with EventStorage(), torch.no_grad():
        losses = ours(batch)
        for source, sample in zip(("human", "pseudo"), batch):
            expected = plain([sample])["loss_sem_seg"]
            torch.testing.assert_close(losses[f"loss_sem_seg_{source}"], expected)


@pytest.mark.parametrize("size", [(64, 64), (50, 37), (1, 1), (500, 20)])
def test_inference_gives_logits_at_the_size_of_the_original(size):
    model = build_model(make_config()).eval()
    images = [
        {"image": torch.randint(0, 255, (3, *size), dtype=torch.uint8), "height": 75, "width": 41},
        {"image": torch.randint(0, 255, (3, *size), dtype=torch.uint8)},
    ]
    with torch.no_grad():
        first, second = model(images)
    assert first["sem_seg"].shape == (CLASSES, 75, 41) and second["sem_seg"].shape == (CLASSES, *size)


def load_png(file_name, dtype):
    """detectron2's own function fails with numpy 2."""
    return np.asarray(Image.open(file_name)).astype(dtype)


def coloured_pictures(size=64):
    """Two pictures of three vertical stripes, whose colours are their classes; some pixels are ignored."""
    colours = torch.tensor([[30, 30, 200], [200, 40, 40], [60, 180, 60]])
    batch = []
    for order in ([0, 1, 2], [2, 0, 1]):
        labels = torch.tensor(order).repeat_interleave(torch.tensor([24, 16, 24])).expand(size, size).clone()
        image = colours[labels].permute(2, 0, 1).to(torch.uint8)
        labels[:8, :8] = IGNORE
        batch.append({"image": image, "sem_seg": labels})
    return batch


@pytest.mark.parametrize("architecture", ["SelfTrainingSegmentor", "SelfTrainingSemanticSegmentor"])
@pytest.mark.parametrize("ignored", ["human", "pseudo"])
def test_a_source_without_a_valid_pixel_contributes_zero(architecture, ignored):
    """detectron2's head averages over valid pixels: of none that is NaN, in the loss and in every gradient."""
    torch.manual_seed(0)
    cfg = make_config("FrozenBN", architecture)
    cfg.MODEL.SEM_SEG_HEAD.NAME, cfg.MODEL.SEM_SEG_HEAD.NORM = "SemSegFPNHead", "GN"
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM, cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = 32, ["p3", "p4", "p5"]
    model = build_model(cfg).train()
    model.loss_weights = (1.0, 2.0)
    batch = coloured_pictures()
    for sample, source in zip(batch, ("human", "pseudo")):
        sample["label_source"] = source
        if source == ignored:
            sample["sem_seg"] = torch.full_like(sample["sem_seg"], IGNORE)
    with EventStorage():
        losses = model(batch)
    assert losses[f"loss_sem_seg_{ignored}"] == 0 and model.raw_losses[ignored] == 0
    (other,) = {"human", "pseudo"} - {ignored}
    assert losses[f"loss_sem_seg_{other}"] > 0.1
    assert model.label_counts["pixels"][ignored].labels == 0
    sum(losses.values()).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.isfinite(g).all() for g in gradients) and any(g.abs().max() > 0 for g in gradients)


def test_it_learns_two_pictures_and_is_evaluated(tmp_path):
    torch.manual_seed(0)
    cfg = make_config()
    cfg.MODEL.EFFICIENTNET.CHANNELS_LAST = False  # faster at this size
    model = build_model(cfg).train()
    batch = coloured_pictures()
    batch[1]["label_source"] = "pseudo"
    # At three times this rate, what float32 rounds decides: one thread learned in 25 steps and two did not.
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with EventStorage():
        for _ in range(40):
            losses = model(batch)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
    assert model.raw_losses["human"] < 0.1 and model.raw_losses["pseudo"] < 0.1

    files = []
    for i, sample in enumerate(batch):
        Image.fromarray(sample["sem_seg"].numpy().astype(np.uint8)).save(tmp_path / f"{i}.png")
        files.append({"file_name": f"{i}.jpg", "sem_seg_file_name": str(tmp_path / f"{i}.png")})
    DatasetCatalog.register("stripes", lambda: files)
    MetadataCatalog.get("stripes").set(stuff_classes=["a", "b", "c"], ignore_label=IGNORE)
    evaluator = SemSegEvaluator("stripes", distributed=False, sem_seg_loading_fn=load_png)
    evaluator.reset()
    # 40 steps are too few for running statistics: those of the batch are used.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    with torch.no_grad():
        evaluator.process(files, model.eval()(batch))
    result = evaluator.evaluate()["sem_seg"]
    assert result["mIoU"] > 85
    assert {"IoU-a", "IoU-b", "IoU-c"} <= result.keys()


def test_labels_are_counted_by_source():
    cfg = make_config()
    cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = 200
    model = build_model(cfg)
    batch = make_batch(["human", "pseudo", "pseudo"])
    for sample in batch:
        sample["sem_seg"] = torch.zeros_like(sample["sem_seg"])
    batch[1]["sem_seg"][:14] = 200  # 14 of 56 rows
    batch[2]["sem_seg"][:] = 200
    with EventStorage():
        model.train()(batch)
    human, pseudo = (model.label_counts["pixels"][source] for source in ("human", "pseudo"))
    assert (human.images, human.labels, human.empty) == (1, 1.0, 0)
    assert (pseudo.images, pseudo.labels, pseudo.empty) == (2, 0.75, 1)
    assert model.label_counts["boxes"]["pseudo"].images == 0


def test_pixels_that_the_mapper_counted_are_not_counted_again():
    model = build_model(make_config())
    batch = make_batch(["human", "pseudo", "pseudo"])
    for sample in batch:
        sample["sem_seg"] = torch.zeros_like(sample["sem_seg"])
    batch[1]["valid_pixel_share"] = 0.0
    batch[2]["valid_pixel_share"] = 0.25
    with EventStorage():
        model.train()(batch)
    pseudo = model.label_counts["pixels"]["pseudo"]
    assert (pseudo.images, pseudo.labels, pseudo.empty) == (2, 0.25, 1)
    assert model.label_counts["pixels"]["human"].labels == 1.0
