"""Write the JSON Schemas under docs/schema from the structs that they describe."""

from pathlib import Path

from morphgraph.report.schemas import SCHEMAS, schema

FOLDER = Path(__file__).parent.parent / "docs" / "schema"

FOLDER.mkdir(parents=True, exist_ok=True)
for name in SCHEMAS:
    path = FOLDER / f"{name}.schema.json"
    path.write_bytes(schema(name))
    print(path.relative_to(FOLDER.parent.parent))
