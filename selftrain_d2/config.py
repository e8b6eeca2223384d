"""The config keys of this plugin, which only add to detectron2's, and the folder of the configs that come with it."""

from pathlib import Path

from detectron2.config import CfgNode

_PACKAGE = Path(__file__).resolve().parent
#: Where the shipped configs are: in the package when installed, at the top of the repository when not.
CONFIGS = next(
    (folder / "configs" for folder in (_PACKAGE, _PACKAGE.parent) if (folder / "configs").is_dir()),
    _PACKAGE / "configs",
)


def add_selftrain_config(cfg: CfgNode) -> None:
    """Add the keys of self-training to a detectron2 config, in place.

    Args:
        cfg: a config made by ``detectron2.config.get_cfg()``. No key of detectron2 is changed.

    Sources of the defaults are sections of Zoph et al., "Rethinking Pre-training and Self-training"
    (arXiv:2006.06882v2), called "the paper"; [TF] is its authors' code (github.com/tensorflow/tpu,
    models/official/detection).
    """
    # ---- EfficientNet backbones -----------------------------------------------------------------
    cfg.MODEL.EFFICIENTNET = CfgNode()
    # efficientnet-b0 ... efficientnet-b8, efficientnet-l2, efficientnet-lite0. The paper uses B7 and L2.
    cfg.MODEL.EFFICIENTNET.NAME = "efficientnet-b7"
    # BN, SyncBN or FrozenBN. SyncBN (the paper's) acts as BN in a single process.
    cfg.MODEL.EFFICIENTNET.NORM = "SyncBN"
    # Probability of skipping the last block; earlier blocks have proportionally less (stochastic depth).
    cfg.MODEL.EFFICIENTNET.DROP_CONNECT_RATE = 0.2
    # Recompute each block in the backward pass instead of keeping its activations: less memory, more time. B7 at
    # 640 pixels keeps 0.4 GiB per image instead of 4.0, in float32.
    cfg.MODEL.EFFICIENTNET.CHECKPOINT_ACTIVATIONS = False
    # Memory format of weights and activations. On a CPU a training step takes 0.7 to 0.9 of the time without;
    # GPUs gain with mixed precision.
    cfg.MODEL.EFFICIENTNET.CHANNELS_LAST = True
    # Outputs of build_efficientnet_backbone, res1 ... res5 (strides 2 ... 32). With FPN: MODEL.FPN.IN_FEATURES.
    cfg.MODEL.EFFICIENTNET.OUT_FEATURES = ["res2", "res3", "res4", "res5"]

    # ---- Batch norm of FPN, RetinaNet heads and ResNet ------------------------------------------
    # FPN: norm of each output level, after all convolutions, which keep their biases. The paper's released code
    # has that ([TF]: SyncBN) in place of MODEL.FPN.NORM, which follows each lateral and output convolution.
    cfg.MODEL.FPN.OUTPUT_NORM = ""
    # The heads' batch norms (MODEL.RETINANET.NORM) have statistics for each level. True: weight and bias too
    # ([TF]). False: these are shared by all levels, as in detectron2.
    cfg.MODEL.RETINANET.NORM_AFFINE_PER_LEVEL = False
    # The channels of the heads' convolutions. 0: as many as the features have.
    cfg.MODEL.RETINANET.CONV_DIM = 0
    # The heads' convolutions are a depthwise 3x3 and a 1x1 one, as EfficientDet's. False: full ones.
    cfg.MODEL.RETINANET.SEPARABLE = False
    # relu or swish after each of the heads' convolutions.
    cfg.MODEL.RETINANET.ACTIVATION = "relu"
    # Constants of batch norm; detectron2's. [TF] has eps 1e-4 and momentum 0.003 (0.997 in its convention) in all
    # three. MODEL.RESNETS: of our build_retinanet_resnet_fpn_p5_backbone alone.
    cfg.MODEL.FPN.NORM_EPS = cfg.MODEL.RETINANET.NORM_EPS = cfg.MODEL.RESNETS.NORM_EPS = 1e-5
    cfg.MODEL.FPN.NORM_MOMENTUM = cfg.MODEL.RETINANET.NORM_MOMENTUM = cfg.MODEL.RESNETS.NORM_MOMENTUM = 0.1

    # ---- NAS-FPN; MODEL.FPN.IN_FEATURES, OUT_CHANNELS and NORM* are its too ---------------------
    cfg.MODEL.NAS_FPN = CfgNode()
    # Backbone below build_nas_fpn_backbone: a name in BACKBONE_REGISTRY.
    cfg.MODEL.NAS_FPN.BOTTOM_UP = "build_efficientnet_backbone"
    # Cells one after another.
    cfg.MODEL.NAS_FPN.REPEATS = 7
    # 3x3 convolutions are a depthwise 3x3 and a 1x1 one (the paper's, for segmentation). False: full ones.
    cfg.MODEL.NAS_FPN.SEPARABLE = True
    # relu or swish.
    cfg.MODEL.NAS_FPN.ACTIVATION = "relu"

    # ---- SpineNet (build_spinenet_backbone, P3-P7; it needs no FPN) -----------------------------
    cfg.MODEL.SPINENET = CfgNode()
    # spinenet-49s, -49, -96, -143 or -190. The paper uses 143 and 190 (Table 5).
    cfg.MODEL.SPINENET.NAME = "spinenet-49"
    # BN, SyncBN or FrozenBN, and its constants; [TF].
    cfg.MODEL.SPINENET.NORM = "SyncBN"
    cfg.MODEL.SPINENET.NORM_EPS = 1e-4
    cfg.MODEL.SPINENET.NORM_MOMENTUM = 0.003
    # relu or swish.
    cfg.MODEL.SPINENET.ACTIVATION = "relu"
    # Probability of skipping the branches of the last block; earlier blocks have proportionally less.
    cfg.MODEL.SPINENET.DROP_CONNECT_RATE = 0.0
    # Down by more than one level: "pool", a strided convolution and one max-pool ([TF]); "repeated_pool", a strided
    # convolution and 3x3 max-pools of stride 2 (github.com/tensorflow/models); "conv", strided convolutions alone.
    cfg.MODEL.SPINENET.RESAMPLING = "pool"
    # Channels of P3-P7. 0: 256, and 512 for spinenet-190. [TF] has 128 for spinenet-49s, a smaller model than the one
    # whose size is published.
    cfg.MODEL.SPINENET.OUT_CHANNELS = 0
    # As MODEL.EFFICIENTNET.CHECKPOINT_ACTIVATIONS and CHANNELS_LAST.
    cfg.MODEL.SPINENET.CHECKPOINT_ACTIVATIONS = False
    cfg.MODEL.SPINENET.CHANNELS_LAST = True
    # ---- BiFPN; MODEL.FPN.IN_FEATURES, OUT_CHANNELS and NORM* are its too -----------------------
    cfg.MODEL.BIFPN = CfgNode()
    # Backbone below build_bifpn_backbone: a name in BACKBONE_REGISTRY.
    cfg.MODEL.BIFPN.BOTTOM_UP = "build_efficientnet_backbone"
    # Cells one after another; EfficientDet-D0 has 3, D7 8.
    cfg.MODEL.BIFPN.REPEATS = 3
    # "fast": each input of a node has a learned weight (EfficientDet-D0 to D5). "sum": a plain sum (D6 to D7x).
    cfg.MODEL.BIFPN.ATTENTION = "fast"

    # ---- SemSegPyramidSumHead -------------------------------------------------------------------
    # 3x3 convolutions before the classifier.
    cfg.MODEL.SEM_SEG_HEAD.NUM_CONVS = 3
    # Constants of its batch norm; PyTorch's. [TF] has eps 1e-3 and momentum 0.003 here and in NAS-FPN.
    cfg.MODEL.SEM_SEG_HEAD.NORM_EPS = 1e-5
    cfg.MODEL.SEM_SEG_HEAD.NORM_MOMENTUM = 0.1

    # ---- SelfTrainingRetinaNet; the defaults are detectron2's RetinaNet -------------------------
    # A box's best anchor is always positive. True: and predicts that box ([TF]); of several boxes the first.
    # False: it predicts the box that it overlaps most.
    cfg.MODEL.RETINANET.FORCE_BEST_ANCHOR = False
    # "moving_average": losses are divided by a moving average of the number of positive anchors. "batch": by
    # 1 + the number in the batch, of each source of labels for itself ([TF]).
    cfg.MODEL.RETINANET.LOSS_NORMALIZER = "moving_average"
    # Factor of the box loss. [TF] has 50 times the Huber loss of delta 0.1, averaged over a box's 4 deltas; with
    # SMOOTH_L1_LOSS_BETA 0.1 that is 50 * 0.1 / 4 = 1.25, because smooth L1 is Huber / beta and summed over deltas.
    cfg.MODEL.RETINANET.BBOX_REG_LOSS_WEIGHT = 1.0
    # Soft-NMS at inference: a box's score decays by exp(-IoU^2 / sigma) for each better box of its class
    # (arXiv:1704.04503), in place of NMS_THRESH_TEST. The paper has 0.3 in its SpineNet results (Table 5). 0: NMS.
    cfg.MODEL.RETINANET.SOFT_NMS_SIGMA = 0.0

    # ---- Augmentation (Table 1 of the paper) ----------------------------------------------------
    cfg.INPUT.AUGMENTATION = CfgNode()
    # A name in AUGMENTATION_REGISTRY: S1 (flip, crop) ... S4 (RandAugment, large scale jitter).
    cfg.INPUT.AUGMENTATION.POLICY = "S1"
    # Side of the square training image and longest side of a test image, in pixels. The latter is written to a run's
    # config.yaml as INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST too, for detectron2's own predictor.
    cfg.INPUT.AUGMENTATION.IMAGE_SIZE = 640
    # Scale jitter relative to IMAGE_SIZE. (0, 0) takes the policy's own: 0.8-1.2 (S1, S2), 0.5-2.0 (S3, S4).
    cfg.INPUT.AUGMENTATION.SCALE_RANGE = (0.0, 0.0)
    # AutoAugment policy for detection of S2 and S3: v0 or v1.
    cfg.INPUT.AUGMENTATION.AUTOAUGMENT = "v0"
    # RandAugment of S4: operations per image, and their magnitude (0-10; the paper has 10, 15 for ResNet-101).
    cfg.INPUT.AUGMENTATION.RANDAUGMENT_LAYERS = 1
    cfg.INPUT.AUGMENTATION.RANDAUGMENT_MAGNITUDE = 10.0
    # A box of which an operation leaves less than this share of its area inside the image is dropped.
    cfg.INPUT.AUGMENTATION.MIN_BOX_AREA_FRACTION = 0.1
    # Lengths in pixels (translation, cutout) are meant for images of 640 pixels. True scales them by
    # longer side / 640; False uses them as they are.
    cfg.INPUT.AUGMENTATION.SCALE_PIXEL_LENGTHS = True

    # ---- Data -----------------------------------------------------------------------------------
    # Names of registered pseudo-labeled datasets. Empty: supervised training (a teacher).
    cfg.DATASETS.PSEUDO_TRAIN = ()
    # Pseudo-labeled images per step over all processes, beside SOLVER.IMS_PER_BATCH human-labeled ones.
    cfg.SOLVER.PSEUDO_IMS_PER_BATCH = 0
    # As SAMPLER_TRAIN, for pseudo-labeled images: TrainingSampler, or RepeatFactorTrainingSampler, which repeats
    # images of rare classes (DATALOADER.REPEAT_THRESHOLD).
    cfg.DATALOADER.PSEUDO_SAMPLER_TRAIN = "TrainingSampler"
    # Joint training (Table 7 of the paper): names of registered folders of images, one sub-folder a class. Empty: none.
    cfg.DATASETS.CLASSIFICATION_TRAIN = ()
    # Classification images per step over all processes, beside human- and pseudo-labeled ones.
    cfg.SOLVER.CLASSIFICATION_IMS_PER_BATCH = 0
    # Side of a classification image, in pixels; 224 is usual for ImageNet. 0: INPUT.AUGMENTATION.IMAGE_SIZE.
    cfg.INPUT.CLASSIFICATION_IMAGE_SIZE = 0

    # ---- The training step ----------------------------------------------------------------------
    # Split the images of a step into so many parts that pass through the model one after the other, for a
    # batch larger than memory. Images per step, learning rate and schedule stay as they are.
    cfg.SOLVER.ACCUMULATION_STEPS = 1
    # Steps of a run that may be left out because a loss is NaN or infinite; one more stops the run.
    cfg.SOLVER.MAX_SKIPPED_STEPS = 0
    # float16 (detectron2's) or bfloat16, where SOLVER.AMP.ENABLED.
    cfg.SOLVER.AMP.PRECISION = "float16"

    # ---- Checkpoints and evaluation -------------------------------------------------------------
    # Of the checkpoints of every SOLVER.CHECKPOINT_PERIOD steps only the last so many stay, beside model_final.pth. 0:
    # all. With 1, a damaged last checkpoint leaves none to resume from.
    cfg.SOLVER.CHECKPOINTS_TO_KEEP = 0
    # A metric of the evaluation on DATASETS.TEST, as metrics.json names it ("bbox/AP", "sem_seg/mIoU",
    # "validation/loss"; with several datasets "NAME/bbox/AP"): the best weights of all that are evaluated, every
    # TEST.EVAL_PERIOD steps and at the end, are kept in OUTPUT_DIR/best/model_best.pth. "": none.
    cfg.TEST.BEST_METRIC = ""
    # With every evaluation also the training loss on DATASETS.TEST, without augmentation ("validation/loss").
    cfg.TEST.VALIDATION_LOSS = False

    # ---- Self-training (Section 3 and Appendix B of the paper) ----------------------------------
    cfg.SELFTRAIN = CfgNode()
    # Weight of the pseudo loss relative to the human loss.
    cfg.SELFTRAIN.ALPHA = 1.0
    # Alpha rises linearly from 0 over these steps. 0: constant, as in the paper.
    cfg.SELFTRAIN.ALPHA_WARMUP_ITERS = 0
    # True: (L_h + alpha * avg(L_h) / avg(L_p) * L_p) / (1 + alpha). False: L_h + alpha * L_p.
    cfg.SELFTRAIN.NORMALIZE_LOSS = True
    # Decay per step of the moving averages of both losses, which are bias-corrected.
    cfg.SELFTRAIN.EMA_DECAY = 0.9997
    # Bound of avg(L_h) / avg(L_p): nearly empty pseudo labels, whose loss goes to zero, are not amplified beyond it.
    cfg.SELFTRAIN.MAX_LOSS_RATIO = 10.0
    # Joint training: w of L + w * classification loss, L being all that the keys above are about. The paper has 0.5
    # without and 0.2 with self-training (Table 7).
    cfg.SELFTRAIN.CLASSIFICATION_LOSS_WEIGHT = 0.5
    # "fixed": thresholds of pseudo labels are those of the next keys, as in the paper. "counts": each class's leaves as
    # many pseudo boxes an image as people drew (DATASETS.TRAIN); docs/pseudo_labels.md has the rules.
    cfg.SELFTRAIN.THRESHOLDS = "fixed"
    # With "counts" and IGNORE_SCORE_THRESH: boxes are ignored down to so many times people's count, not below that
    # score.
    cfg.SELFTRAIN.IGNORE_COUNT_RATIO = 2.0
    # Pseudo boxes below this score are not trained on, pixels ignored. Applied when labels are loaded, not when
    # written.
    cfg.SELFTRAIN.SCORE_THRESH = 0.5
    # NAME, NUMBER, NAME, NUMBER, ...: other thresholds for these classes.
    cfg.SELFTRAIN.SCORE_THRESH_BY_CLASS = ()
    # In place of both: the threshold that leaves this many pseudo boxes an image on average, e.g. as many as human
    # labels have. 0: off.
    cfg.SELFTRAIN.BOXES_PER_IMAGE = 0.0
    # Of the pseudo boxes of an image that reach their threshold, only the best so many. 0: all.
    cfg.SELFTRAIN.TOP_K = 0
    # Pseudo boxes on whose place the teacher's views (SELFTRAIN.TTA) agree less, as a mean IoU, are not trained on. 0:
    # off.
    cfg.SELFTRAIN.LOCALIZATION_THRESH = 0.0
    # Pseudo boxes of at least this score that are not trained on are neither objects nor background. 0: off, they are
    # background, as in the paper.
    cfg.SELFTRAIN.IGNORE_SCORE_THRESH = 0.0
    # True: pseudo boxes whose score lies between that and the threshold of their class are trained on: the losses of
    # what they are matched with are times (score - IGNORE_SCORE_THRESH) / (threshold - IGNORE_SCORE_THRESH). False:
    # they are ignored.
    cfg.SELFTRAIN.SCORE_WEIGHTED = False
    # True: pseudo boxes from IGNORE_SCORE_THRESH on are trained on, and their score is the target of the class loss,
    # for all classes that the teacher names at a place. Dense detectors (RetinaNet, FCOS).
    cfg.SELFTRAIN.SOFT_LABELS = False
    # True: so are the crowd regions ("iscrowd") of human labels; False: they are background.
    cfg.SELFTRAIN.IGNORE_CROWD = False
    # What an ignored box covers is not learned as background: an anchor or proposal of which it covers ("covered", as
    # COCO compares detections with crowds), or with which it has as IoU ("iou"), at least the threshold. FCOS: a
    # location inside the box.
    cfg.SELFTRAIN.IGNORE_OVERLAP = "covered"
    cfg.SELFTRAIN.IGNORE_OVERLAP_THRESH = 0.5
    # How the teacher's network calculates when it labels: float32, float16 or bfloat16. The last two move scores by
    # about 0.01 and 0.03, let them depend on the batch size, and are slower on a CPU.
    cfg.SELFTRAIN.LABEL_PRECISION = "float32"
    # Test-time augmentation of the teacher. The paper has none for boxes, six scales for masks (which our base config
    # of segmentors sets).
    cfg.SELFTRAIN.TTA = CfgNode()
    # Label each image mirrored too, and merge the boxes, or average the probabilities of each pixel.
    cfg.SELFTRAIN.TTA.FLIP = False
    # Label each image at these multiples of INPUT.AUGMENTATION.IMAGE_SIZE, and merge or average likewise.
    cfg.SELFTRAIN.TTA.SCALES = (1.0,)
    # Each box is the mean, by score, of the boxes of its class in all views from this IoU with it on; 0: the best one.
    cfg.SELFTRAIN.TTA.BOX_VOTING = 0.0
    # "best": a box has the score of the view that has the highest. "mean": that of all views, of which those that do
    # not see it have 0; so only what all are sure of has a high score, and thresholds leave fewer boxes.
    cfg.SELFTRAIN.TTA.SCORES = "best"
    # When several processes label: after so many seconds in which none finished a shard, those that have nothing to do
    # make the ones that others had taken as well. More than a shard of 256 images takes saves work made twice.
    cfg.SELFTRAIN.TAKE_OVER_SECONDS = 300.0
    # Warn while a smaller share of the pseudo-labeled images has a box, or of their pixels a class.
    cfg.SELFTRAIN.MIN_NONEMPTY_SHARE = 0.05
    # Warn while pseudo-labeled images have more than so many times the boxes of human-labeled ones, per image.
    cfg.SELFTRAIN.MAX_BOXES_RATIO = 4.0
    # Decay of a moving average of the weights that is evaluated, and is the next teacher. 0: none, as in the
    # paper.
    cfg.SELFTRAIN.WEIGHT_EMA_DECAY = 0.0
    # Who labels: "labels", pseudo labels on disk, made once (the paper's). "moving_average": DATASETS.PSEUDO_TRAIN are
    # plain images, and in each step a moving average of the student's weights labels those of the step.
    cfg.SELFTRAIN.TEACHER = "labels"
    # Decay per step of that average, which is not evaluated (WEIGHT_EMA_DECAY's is). Unbiased Teacher has 0.9996.
    cfg.SELFTRAIN.TEACHER_EMA_DECAY = 0.9996
    # Every so many steps that teacher labels 16 labeled images and is compared with people; one that has become worse
    # gives way to its last good weights. 0: never.
    cfg.SELFTRAIN.TEACHER_CHECK_PERIOD = 100
    # Which weights of a run label in self-train, and are its student's start: "last", those at the end (the moving
    # average, where there is one), or "best", by TEST.BEST_METRIC. What a validation set chose looks better on that set
    # than it is: judge on another.
    cfg.SELFTRAIN.TEACHER_CHECKPOINT = "last"
    # What the student (and the control) starts from: "teacher" (the paper's), "random", or a checkpoint.
    # Table 10 compares the first two. A larger student (SELFTRAIN.STUDENT) cannot take the teacher's weights.
    cfg.SELFTRAIN.STUDENT_WEIGHTS = "teacher"
    # Which stage of the loop a run is: each draws the order of its images, their augmentation and all other random
    # numbers anew. 0: a teacher; n: the student, and its control, of round n. -1: one more than the stage that the
    # run's weights (MODEL.WEIGHTS) and pseudo labels come from, 0 where they come from none.
    cfg.SELFTRAIN.STAGE = -1
    # Weights to start from name the classes that they know, if our trainer wrote them. False: as many other classes, or
    # the same in another order, are refused. True: what depends on classes then starts anew, as it always does where
    # their number differs.
    cfg.SELFTRAIN.WEIGHTS_OF_OTHER_CLASSES = False
    # The last steps of a run's SOLVER.MAX_ITER are on human labels alone (ASTOD, github.com/CEA-LIST/ASTOD), on
    # SOLVER.IMS_PER_BATCH images each. self-train has them in the student and the control, not in the teacher. 0: none,
    # as in the paper.
    cfg.SELFTRAIN.REFINE_ITERS = 0
    # Learning rate of these steps, constant, as a factor of SOLVER.BASE_LR. The schedule ends before them.
    cfg.SELFTRAIN.REFINE_LR_FACTOR = 0.1
    # Experiment trackers beside metrics.json and TensorBoard: "wandb", "mlflow". Their environment variables say where.
    cfg.SELFTRAIN.TRACKERS = ()
    # KEY, VALUE, KEY, VALUE, ... merged into the config for the student's training alone, e.g. its schedule.
    cfg.SELFTRAIN.STUDENT = ()
