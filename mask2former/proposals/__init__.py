"""Queries as region proposals: what they find before the decoder and after each layer; docs/proposals.md."""

from mask2former.proposals.recall import RecallReport, proposal_recall
from mask2former.proposals.regions import Proposals, check_proposes, propose
from mask2former.proposals.sheet import proposal_sheet

__all__ = ["Proposals", "RecallReport", "check_proposes", "proposal_recall", "proposal_sheet", "propose"]
