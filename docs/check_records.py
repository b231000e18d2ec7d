"""Pages under `papers/` show finished runs of full size, and pictures that were drawn from exactly those."""

import json
from pathlib import Path

from PIL import Image


def faults(papers: Path) -> list[str]:
    """What is wrong with the pages, records and pictures in this folder, one line each."""
    found = []
    pages = {page.stem for page in papers.glob("*.md")} - {"index"}
    records = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (papers / "files").glob("*.json")}
    found += [f"papers/{name}.md has no record papers/files/{name}.json" for name in sorted(pages - set(records))]
    found += [f"papers/files/{name}.json has no page papers/{name}.md" for name in sorted(set(records) - pages)]
    for name, record in sorted(records.items()):
        if record["quick"]:
            found.append(
                f"papers/files/{name}.json is a record of the quick size; make it with natgrad paper run {name}"
            )
        if not record["finished"]:
            found.append(f"papers/files/{name}.json is of a run that was not finished")
    for path in sorted((papers / "files").glob("*.png")):
        with Image.open(path) as image:
            about = dict(image.info)
        record = records.get(about.get("natgrad-record", ""), {})
        if about.get("natgrad-size") != "full":
            found.append(f"papers/files/{path.name} was not drawn from a record of full size")
        elif record.get("started") != about.get("natgrad-started"):
            found.append(
                f"papers/files/{path.name} was drawn from another record than the one beside it; plot it again"
            )
    return found
