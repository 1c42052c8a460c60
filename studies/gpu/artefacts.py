"""What a reader looks at: samples, nearest neighbours, Langevin strips (Figure 14)."""
import torch

from edm_nb.data import one_hot, to_float, to_uint8
from edm_nb.figures import save_png
from edm_nb.metrics import nearest_neighbours
from edm_nb.ode_solvers import edm_sigmas
from edm_nb.randomness import SeededNoise
from edm_nb.stochastic import langevin_states
from studies.churn import look
from studies.gpu.model import trained
from studies.gpu.report import tf32

CELLS = [(0.2, 1.0), (0.8, 1.0), (0.2, 1.007), (0.05, 1.0), (0.8, 1.007), (0.05, 1.007), (2.0, 1.0), (2.0, 1.007)]


def per_image(D):
    "What stirring may change, a number per image: the properties that `studies/churn.py` follows for digits, and brightness."
    found = look(D) | dict(brightness=D.flatten(1).mean(1))
    return {name: [round(float(v), 6) for v in values] for name, values in found.items()}


def langevin_strip(report, denoise, sigma, S_noise, counts, y, labels):
    "Denoised states of the Langevin loop: one row of images per real image, one column per count."
    noise = SeededNoise(range(len(y)))
    x, rows, points = y.double() + sigma * noise.randn_like(y.double()), [], []
    for count, state in langevin_states(denoise, x, sigma, counts, S_noise=S_noise, randn_like=noise.randn_like, class_labels=labels):
        with torch.no_grad():
            D = denoise(state, sigma, class_labels=labels)
        rows.append(to_uint8(D).cpu())
        points.append(dict(iteration=count, mean=float(D.mean()), std=float(D.std()), beyond=float((D.abs() > 1.02).double().mean()), per_image=per_image(D)))
    return torch.stack(rows, 1).flatten(0, 1), points      # [images × counts, C, H, W]


def artefacts(report):
    "What a reader looks at: samples, neighbours, Langevin strips."
    denoise, source = trained(report)
    device, n = report.device, 20 if report.toy else 100 if report.device.type == "cuda" else 40
    images = torch.cat([x.cpu() for x in report.draw(denoise, n, edm_sigmas(18))])
    save_png(report.out / "samples.png", images, columns=10, scale=2)
    data, k = report.data("train").images, 5
    features = lambda x: torch.cat([report.features(part.to(device)).cpu() for part in x.split(500)])  # noqa: E731
    with tf32(False):
        far, nearest = nearest_neighbours(features(images[:10]), features(data), k=k)
    sheet = torch.cat([torch.cat([image[None], data[index]]) for image, index in zip(images, nearest)])
    save_png(report.out / "neighbours.png", sheet, columns=1 + k, scale=2)
    counts, few = ([0, 1, 2], 2) if report.toy else ([0, 10, 30, 100, 300], 8)
    y, labels = to_float(data[:few]).to(device), one_hot(report.data("train").labels[:few], 10).to(device)

    def measure(cell):
        with tf32(False):       # fp32: hundreds of rounds of bf16 rounding would be a drift of their own
            strip, points = langevin_strip(report, denoise, cell["sigma"], cell["S_noise"], counts, y, labels)
        file = f"langevin-{cell['sigma']:g}-{cell['S_noise']:g}.png"
        save_png(report.out / file, strip, columns=len(counts), scale=2)
        return dict(file=file, points=points, n=few)
    rows = report.rows("artefacts", [dict(sigma=sigma, S_noise=S) for sigma, S in CELLS], measure)
    return dict(rows=rows, images=n, weights=source, columns=dict(samples=10, neighbours=1 + k), langevin_counts=counts,
                neighbour_distances=far.tolist(), **report.measured_against(), parameters=sum(p.numel() for p in denoise.parameters()))
