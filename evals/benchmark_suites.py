"""The tasks of DataComp's evaluation and of CLIP Benchmark: folders, figures, and what the paper reports of them.

DataComp's tasks, sizes and main figures are those of ``tasklist.yml`` and ``aggregate_scores.py`` in
mlfoundations/datacomp; its average is over the 38 that have a main figure (not FairFace and UTKFace). CLIP Benchmark's
are the sets in ``benchmark/webdatasets.txt`` of LAION-AI/CLIP_benchmark, 37 of classification and 3 of retrieval, and
``voc2007_multilabel`` of its collection vtab+, which no average counts.

What is reported: the Nomic Embed Vision report (arXiv 2406.18587), Table 2 for DataComp and Table 3 for CLIP Benchmark;
its peers' figures also stand in the model card of nomic-embed-vision-v1.5. Of a row without a reported figure none was
at hand, which does not mean that the report has none.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

# Columns of what is reported; the first is what ours are compared with.
PAPER: Final = "Nomic Embed Vision v1.5"
_V1 = "v1"
_CLIP = "CLIP ViT-B/16"
_JINA = "Jina CLIP v1"

Kind = Literal["classification", "multilabel", "retrieval", "winogavil"]


@dataclass(frozen=True)
class Group:
    """By which of the numbers about an image its group is told, where a figure is that of the worst group."""

    name: str
    column: int
    """Place in the row of numbers in a sample's ``npy``."""
    figure: str
    """Name of the figure, as DataComp has it."""
    top: int = 1
    """Among how many nearest classes an image's own counts as found."""


@dataclass(frozen=True)
class Task:
    """A set and the figures that its suite reports of it."""

    key: str
    """Name of the set in clip_benchmark or DataComp, such as vtab/caltech101."""
    name: str
    metrics: tuple[str, ...] = ("acc1",)
    kind: Kind = "classification"
    groups: tuple[str, ...] = ()
    """The averages, besides the one over all tasks, that count it."""
    images: int | None = None
    """Images of the whole set; of WinoGAViL its instances. None where the list of tasks does not say."""
    group: Group | None = None
    averaged: bool = True
    paper: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Per cent reported, for each metric and column."""

    @property
    def folders(self) -> tuple[str, ...]:
        """Return the names that its folder may have under the root, as the peers and their downloads write them."""
        if self.kind == "winogavil":
            return (self.key,)
        dashed = self.key.replace("/", "-")
        return tuple(dict.fromkeys((f"wds_{dashed}_test", f"wds_{dashed}", dashed, self.key)))


@dataclass(frozen=True)
class Average:
    """A mean of the first metric of some tasks."""

    name: str
    group: str | None
    """Of the tasks of this group; None for all that count."""
    paper: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Suite:
    """Tasks and the averages over them."""

    tasks: tuple[Task, ...]
    averages: tuple[Average, ...]

    def tasks_of(self, average: Average) -> list[Task]:
        """Return the tasks that an average counts."""
        return [task for task in self.tasks if task.averaged and average.group in (None, *task.groups)]


_RECALL = "mean_per_class_recall"
_SHIFTS = "ImageNet dist. shifts"
_VTAB = "VTAB"
_RETRIEVAL = "Retrieval"
_CLASSIFICATION = "Classification"

_DATACOMP = (
    Task("vtab/caltech101", "Caltech-101", (_RECALL,), groups=(_VTAB,), images=6085),
    Task("cifar10", "CIFAR-10", images=10000),
    Task("vtab/cifar100", "CIFAR-100", groups=(_VTAB,), images=10000),
    Task("vtab/clevr_count_all", "CLEVR Counts", groups=(_VTAB,), images=15000),
    Task("vtab/clevr_closest_object_distance", "CLEVR Distance", groups=(_VTAB,), images=15000),
    Task("country211", "Country211", images=21100),
    Task("vtab/dtd", "Describable Textures", groups=(_VTAB,), images=1880),
    Task("vtab/eurosat", "EuroSAT", groups=(_VTAB,), images=5400),
    Task("fgvc_aircraft", "FGVC Aircraft", (_RECALL,), images=3333),
    Task("food101", "Food-101", images=25250),
    Task("gtsrb", "GTSRB", images=12630),
    Task(
        "imagenet1k", "ImageNet 1k", images=50000,
        paper={"acc1": {PAPER: 71.0, _V1: 70.7, _CLIP: 68.3, _JINA: 59.1}},
    ),
    Task("imagenet_sketch", "ImageNet Sketch", groups=(_SHIFTS,), images=50889),
    Task("imagenetv2", "ImageNet v2", groups=(_SHIFTS,), images=10000),
    Task("imagenet-a", "ImageNet-A", groups=(_SHIFTS,), images=7500),
    Task("imagenet-o", "ImageNet-O", groups=(_SHIFTS,), images=2000),
    Task("imagenet-r", "ImageNet-R", groups=(_SHIFTS,), images=30000),
    Task("vtab/kitti_closest_vehicle_distance", "KITTI Vehicle Distance", groups=(_VTAB,), images=711),
    Task("mnist", "MNIST", images=10000),
    Task("objectnet", "ObjectNet", groups=(_SHIFTS,), images=18574),
    Task("vtab/flowers", "Oxford Flowers-102", (_RECALL,), groups=(_VTAB,), images=6149),
    Task("vtab/pets", "Oxford-IIIT Pet", (_RECALL,), groups=(_VTAB,), images=3669),
    Task("voc2007", "Pascal VOC 2007", images=14976),
    Task("vtab/pcam", "PatchCamelyon", groups=(_VTAB,), images=32768),
    Task("renderedsst2", "Rendered SST2", images=1821),
    Task("vtab/resisc45", "RESISC45", groups=(_VTAB,), images=6300),
    Task("cars", "Stanford Cars", images=8041),
    Task("stl10", "STL-10", images=8000),
    Task("sun397", "SUN397", groups=(_VTAB,), images=108754),
    Task("vtab/svhn", "SVHN", groups=(_VTAB,), images=26032),
    # DataComp reads these two from copies of its own, of as many images as clip_benchmark's: Karpathy's test splits.
    Task("flickr30k", "Flickr", ("mean_recall@1",), "retrieval", (_RETRIEVAL,), 1000),
    Task("mscoco_captions", "MSCOCO", ("mean_recall@1",), "retrieval", (_RETRIEVAL,), 5000),
    Task("winogavil", "WinoGAViL", ("jaccard_score_10-12",), "winogavil", (_RETRIEVAL,), 3563),
    Task("wilds/iwildcam", "iWildCam", ("F1-macro_all",), images=42791),
    Task("wilds/camelyon17", "Camelyon17", images=85054),
    # As there, every region that has an image counts, the one called Other too: its evaluator knows no names.
    Task(
        "wilds/fmow", "FMoW", ("acc_worst_region",), images=22108,
        group=Group("region", 0, "acc_worst_region"),
    ),
    Task(
        "dollar_street", "Dollar Street", ("acc_top5_wg",), images=3503,
        group=Group("income", 0, "acc_top5_wg", top=5),
    ),
    Task("geode", "GeoDE", ("acc_wg",), images=12488, group=Group("region", 0, "acc_wg")),
)  # fmt: skip

_SIZES = {task.key: task.images for task in _DATACOMP}


def _classification(key: str) -> Task:
    return Task(key, key, groups=(_CLASSIFICATION,), images=_SIZES.get(key))


def _retrieval(key: str, image: float, text: float) -> Task:
    paper = {"text_to_image_recall@5": {PAPER: image}, "image_to_text_recall@5": {PAPER: text}}
    return Task(key, key, tuple(paper), "retrieval", images=_SIZES.get(key), averaged=False, paper=paper)


_CLIP_BENCHMARK = (
    *map(
        _classification,
        (
            "imagenet1k", "imagenetv2", "imagenet_sketch", "imagenet-a", "imagenet-r", "imagenet-o", "objectnet",
            "fer2013", "voc2007", "sun397", "cars", "fgvc_aircraft", "mnist", "stl10", "gtsrb", "country211",
            "renderedsst2", "vtab/caltech101", "vtab/cifar10", "vtab/cifar100", "vtab/clevr_count_all",
            "vtab/clevr_closest_object_distance", "vtab/diabetic_retinopathy", "vtab/dmlab",
            "vtab/dsprites_label_orientation", "vtab/dsprites_label_x_position", "vtab/dsprites_label_y_position",
            "vtab/dtd", "vtab/eurosat", "vtab/kitti_closest_vehicle_distance", "vtab/flowers", "vtab/pets",
            "vtab/pcam", "vtab/resisc45", "vtab/smallnorb_label_azimuth", "vtab/smallnorb_label_elevation",
            "vtab/svhn",
        ),
    ),
    Task("voc2007_multilabel", "voc2007_multilabel", ("mean_average_precision",), "multilabel", averaged=False),
    _retrieval("flickr30k", 77.98, 89.89),
    _retrieval("flickr8k", 74.10, 84.50),
    _retrieval("mscoco_captions", 56.21, 67.02),
)  # fmt: skip

SUITES: Final[Mapping[str, Suite]] = {
    "datacomp": Suite(
        _DATACOMP,
        (
            Average(_SHIFTS, _SHIFTS, {PAPER: 55.1, _V1: 55.1}),
            Average(_VTAB, _VTAB, {PAPER: 56.1, _V1: 56.5}),
            Average(_RETRIEVAL, _RETRIEVAL, {PAPER: 46.9, _V1: 45.7}),
            Average("Average", None, {PAPER: 56.8, _V1: 56.7, _CLIP: 56.3, _JINA: 52.2}),
        ),
    ),
    "clip-benchmark": Suite(
        _CLIP_BENCHMARK,
        (
            Average(
                _CLASSIFICATION, _CLASSIFICATION, {PAPER: 46.62},
                note="the reported average's sets and figure were not at hand: acc1 of these sets is assumed",
            ),
        ),
    ),
}  # fmt: skip
