"""Exact metrics from in-memory counts: panoptic quality, semantic IoU, instance average precision, proposal recall.

Each is fed one image at a time with ``update``, joined across processes with ``merge`` and read with
``compute``, which gives plain floats in percent.
"""

from mask2former.evaluation.average_precision import InstanceAP
from mask2former.evaluation.cityscapes_ap import CityscapesAP
from mask2former.evaluation.cityscapes_iou import CityscapesIoU
from mask2former.evaluation.lvis_ap import LvisAP
from mask2former.evaluation.panoptic_quality import PanopticQuality
from mask2former.evaluation.proposal_recall import ProposalRecall
from mask2former.evaluation.semantic_iou import SemanticIoU

__all__ = [
    "CityscapesAP",
    "CityscapesIoU",
    "InstanceAP",
    "LvisAP",
    "PanopticQuality",
    "ProposalRecall",
    "SemanticIoU",
]
