"""Two vendors' emoji with labels.csv: 6,744 images of 64 x 64 pixels, kind, skin tone and vendor.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    python docs/emoji.py emoji                  # reads the two archives, writes the folder emoji
    python docs/emoji.py emoji2 apple facebook  # other vendors' archives
    python loo.py train --data=folder --root=emoji

Noto Emoji is by Google (Apache 2.0), Twemoji by Twitter (CC BY 4.0). An emoji is on one side of the
split in all tones and of both vendors. A kind that is not on both sides is left out.
"""

import collections
import csv
import hashlib
import json
import sys
import tarfile
from pathlib import Path

from PIL import Image

NAMES = {"google": "noto", "twitter": "twemoji"}
TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium"}
TONES |= {"1F3FE": "medium-dark", "1F3FF": "dark"}


def emoji_rows(table):
    """emoji.json -> (code, split, kind, tone) of each emoji, in the order of the codes."""
    found, sides = [], collections.defaultdict(set)
    for emoji in table:
        code = emoji["unified"]
        split = (
            "test"
            if int(hashlib.sha1(code.encode()).hexdigest()[:8], 16) < 0.2 * 2**32
            else "train"
        )
        kind = f"{emoji['category']}__{emoji['subcategory']}".replace(" ", "").replace("&", "and")
        sides[kind].add(split)
        variants = emoji.get("skin_variations", {})
        found.append((code, split, kind, "default" if variants else ""))
        for tone in TONES.keys() & variants.keys():  # a variant of two people may have two tones
            found.append((variants[tone]["unified"], split, kind, TONES[tone]))
    return sorted(row for row in found if len(sides[row[2]]) == 2)


def main(out, *sources):
    (out / "images").mkdir(parents=True, exist_ok=True)
    with open(out / "labels.csv", "w", newline="") as file:
        labels = csv.writer(file)
        labels.writerow(["file", "split", "kind", "tone", "vendor"])
        for source in sources:
            with tarfile.open(f"emoji-datasource-{source}-16.0.0.tgz") as archive:
                table = json.load(archive.extractfile("package/emoji.json"))
                drawn = set(archive.getnames())  # a vendor may lack a few
                for code, split, kind, tone in emoji_rows(table):
                    name = f"package/img/{source}/64/{code.lower()}.png"
                    if name not in drawn:
                        continue
                    image = Image.open(archive.extractfile(name)).convert("RGBA")
                    white = Image.new("RGBA", image.size, "white")
                    path = f"images/{source}_{code}.png"
                    Image.alpha_composite(white, image).convert("RGB").save(out / path)
                    labels.writerow([path, split, kind, tone, NAMES.get(source, source)])


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), *(sys.argv[2:] or NAMES))
