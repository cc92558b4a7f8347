"""Small files in the schemas of the public caption corpora."""

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

KINDS = ("composition", "entity", "text", "imaginative", "style", "abstract", "original", "detail")
SCORES = (*KINDS[:-1], "image_clarity", "image_structure")
FLUX_REASON = pa.schema(
    [("id", pa.string()), ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))]
    + [(f"caption_{kind}{language}", pa.string()) for language in ("", "_cn") for kind in KINDS]
    + [(f"bool_caption_{kind}", pa.bool_()) for kind in KINDS]
    + [(f"score_{kind}", pa.int64()) for kind in SCORES]
    + [("unlisted", pa.string())]  # the 36th: public descriptions name 35
)


def picture(seed: int, size: tuple[int, int] = (96, 96), kind: str = "JPEG", mode: str = "RGB") -> bytes:
    """An encoded image of noise, (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def flux_reason_rows(rows: Iterable[int], image=picture) -> list[dict]:
    """Rows of FLUX-Reason-6M; every third lacks `caption_text`, and its twin."""
    return [
        {
            "id": f"aesthetics-part01-{row:08d}",
            "image": {"bytes": image(row), "path": None},
            **{f"caption_{kind}": f"{kind} of picture {row}" for kind in KINDS},
            **{f"caption_{kind}_cn": f"图 {row} {kind}" for kind in KINDS},
            **({"caption_text": None, "caption_text_cn": None} if row % 3 == 0 else {}),
            **{f"bool_caption_{kind}": True for kind in KINDS},
            **{f"score_{kind}": 9 for kind in SCORES},
        }
        for row in rows
    ]


def write_flux_reason(path: Path, rows: Sequence[dict], group: int = 4, schema: pa.Schema = FLUX_REASON) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=group)
    return path


def fine_t2i_fields(key: str, **changed: object) -> dict:
    """The JSON of a record of Fine-T2I."""
    return {
        "id": key,
        "prompt": f"prompt of {key}",
        "enhanced_prompt": f"enhanced prompt of {key}",
        "length": 3,
        "enhanced_length": 4,
        "prompt_generator": "some model",
        "enhancer": "some model",
        "style": "Anime",
        "prompt_category": "Animals",
        "task": ["Colors"],
        "image_aspect_ratio": "1:1",
        "image_resolution": [96, 96],
        "image_generator": "FLUX.2-dev",
        "image_generated_with_enhanced_prompt": True,
        "aesthetic_predictor_v_2_5_score": 6.1,
    } | changed


def fine_t2i_record(key: str, image: bytes, text: str | None = None, **changed: object) -> list[tuple[str, bytes]]:
    """The three members of a record."""
    fields = fine_t2i_fields(key, **changed)
    text = fields["prompt"] if text is None else text
    return [
        (f"{key}.jpg", image),
        (f"{key}.json", json.dumps(fields).encode()),
        (f"{key}.txt", text.encode()),
    ]


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path
