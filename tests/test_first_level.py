"""The ratio of densities behind claim C01 against the densities themselves."""
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "studies"))
from first_level import ratios  # noqa: E402

from edm_nb.data import digits, to_float  # noqa: E402
from edm_nb.oracles import IdealDenoiser  # noqa: E402


def test_ratios_are_those_of_the_two_densities():
    "The mixture's own density in float64, and the normal one, computed apart."
    images = digits().images[:300]
    z = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    found = ratios(z, images.flatten(1), (5.0, 40.0), chunk=70)
    exact = IdealDenoiser(to_float(images).double())
    for k, sigma in enumerate((5.0, 40.0)):
        x = sigma*z.double()
        normal = -0.5*(z.double().square() + math.log(2*math.pi*sigma**2)).sum(1)
        torch.testing.assert_close(found[:, k], (exact.log_prob(x.view(-1, 1, 8, 8), sigma) - normal).exp(), rtol=1e-5, atol=0)
