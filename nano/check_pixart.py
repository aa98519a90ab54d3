"""Ask a classifier of real photographs whether the bundled base model draws what it is told to.

    python nano/check_pixart.py

Trains a small classifier on the real photographs of the six classes at 32 px (kept in dataset/.nano/), states its
accuracy on held-out photographs, samples 200 images at CFG 4.5 and writes nano/records/pixart-check.json and
nano/samples.jpg.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from photographs import CIFAR_CLASSES, FLOWER_HOLD_OUT, cifar10, flowers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from train_pixart import PHOTO_CLASSES

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from medart_core import pretrained
from medart_core.errors import exit_codes
from medart_core.options import Parser
from medart_core.pictures import image_grid
from medart_core.sampling import sample_images

HERE = Path(__file__).resolve().parent
JUDGE = HERE.parent / "dataset" / ".nano" / "judge.safetensors"
PROMPT = "a photo of a {}"


def shrink(images: np.ndarray) -> np.ndarray:
    """(N, H, W, 3) uint8 -> (N, 32, 32, 3) uint8, averaged over areas."""
    if images.shape[1] == 32:
        return images
    return np.stack([np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BOX)) for image in images])


def real_photographs(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (N, 3, 32, 32) in [-1, 1] and class numbers of the `train` or `test` photographs of the six classes."""
    images, labels = cifar10(split)
    flower = flowers()
    held_out = np.arange(len(flower)) % FLOWER_HOLD_OUT == 0
    flower = shrink(flower[held_out] if split == "test" else np.repeat(flower[~held_out], 10, axis=0))
    pixels, classes = [flower], [np.full(len(flower), len(PHOTO_CLASSES) - 1)]
    for number, name in enumerate(PHOTO_CLASSES[:-1]):
        pixels.append(images[labels == CIFAR_CLASSES.index(name)])
        classes.append(np.full(len(pixels[-1]), number))
    return to_tensor(np.concatenate(pixels)), torch.from_numpy(np.concatenate(classes))


def to_tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1


def build_judge() -> nn.Sequential:
    """A small convolutional classifier of 32 px images."""
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Dropout(0.3), nn.Flatten(), nn.Linear(128 * 16, len(PHOTO_CLASSES)))


def trained_judge(epochs: int = 3) -> nn.Module:
    """The classifier, trained when it is not kept yet: mirrored and shifted photographs, AdamW, one-cycle rate."""
    torch.manual_seed(0)
    judge = build_judge()
    if JUDGE.exists():
        judge.load_state_dict(load_file(JUDGE))
        return judge.eval()
    pixels, classes = real_photographs("train")
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    steps = epochs * (len(pixels) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for step in tqdm(range(steps), "judge", mininterval=10):
        rows = torch.randint(len(pixels), (128,))
        batch = F.pad(pixels[rows], (3, 3, 3, 3), mode="reflect")
        top, left = torch.randint(7, (2,)).tolist()
        batch = batch[:, :, top : top + 32, left : left + 32]
        batch = batch.flip(3) if step % 2 else batch
        loss = F.cross_entropy(judge(batch), classes[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    JUDGE.parent.mkdir(parents=True, exist_ok=True)
    save_file(judge.state_dict(), JUDGE)
    return judge.eval()


@torch.no_grad()
def verdicts(judge: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Most likely class of each image, (N,)."""
    return torch.cat([judge(chunk).argmax(dim=1) for chunk in pixels.split(500)])


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--images", type=int, default=200, help="images to sample (default 200)")
    parser.add_argument("--model", default=pretrained.NANO, help="pipeline folder (default nano/pixart)")
    options = parser.parse_args()
    judge = trained_judge()
    pixels, classes = real_photographs("test")
    accuracy = (verdicts(judge, pixels) == classes).float().mean().item()
    print(f"classifier: {accuracy:.1%} of {len(classes)} held-out photographs")

    model = pretrained.load(options.model, torch.float32, torch.device("cpu"))
    asked = torch.arange(options.images) % len(PHOTO_CLASSES)
    prompts = [PROMPT.format(PHOTO_CLASSES[number]) for number in asked]
    images = sample_images(model, prompts, list(range(options.images)), batch_size=10)
    drawn = torch.stack(list(tqdm(images, "sampling", options.images, mininterval=10))).numpy()
    right = verdicts(judge, to_tensor(shrink(drawn))) == asked
    record = {
        "agreement": round(right.float().mean().item(), 4),
        "agreement_by_class": {
            n: round(right[asked == i].float().mean().item(), 3) for i, n in enumerate(PHOTO_CLASSES)
        },
        "images": options.images,
        "guidance_scale": 4.5,
        "num_inference_steps": 20,
        "classifier_accuracy": round(accuracy, 4),
        "classifier_held_out_images": len(classes),
    }
    (HERE / "records" / "pixart-check.json").write_text(json.dumps(record, indent=2) + "\n")
    rows = [
        [Image.fromarray(drawn[i]) for i in np.flatnonzero(asked.numpy() == c)[:8]] for c in range(len(PHOTO_CLASSES))
    ]
    image_grid(rows, row_names=[PROMPT.format(name) for name in PHOTO_CLASSES]).save(HERE / "samples.jpg", quality=92)
    print(json.dumps(record), f"grid in {HERE / 'samples.jpg'}", sep="\n")


if __name__ == "__main__":
    with exit_codes():
        main()
