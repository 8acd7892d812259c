"""What samples that run free add to the checks of an artifact: counts, sums and extremes, which merge exactly."""

from __future__ import annotations

from dataclasses import dataclass

from scconv_deploy.verification.checks.answers import Answers
from scconv_deploy.verification.checks.budget import Costs
from scconv_deploy.verification.checks.contract import Contract, Finite
from scconv_deploy.verification.checks.gates import SiteFlips, Sites
from scconv_deploy.verification.checks.integer_kernels import KernelCosts
from scconv_deploy.verification.checks.shared import Samples
from scconv_deploy.verification.metrics import MetricsTally


@dataclass
class Tally:
    """What the checks know after some samples, without sessions and models; it can be sent to another process.

    Tallies of samples that run free merge in the order of the samples to what one process would have counted.
    """

    samples: Samples
    sites: Sites
    contract: Contract
    finite: Finite
    answers: Answers
    flips: SiteFlips
    outputs: MetricsTally
    costs: Costs
    kernels: KernelCosts
