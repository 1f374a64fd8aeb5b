"""What a dataset says of itself: downcycle-data.json for programs, README.md for people and for the Hub.

Knows the facts that it is given; reads no data.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

LICENCES = {"HuggingFaceFW/": "odc-by"}
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"), (10**8, "10M<n<100M"))


def versions() -> dict[str, str]:
    """Versions of all that the content depends on."""
    return {name: version(name) for name in ("downcycle", "datatrove", "tokenizers", "transformers", "pyarrow")}


def card(title: str, report: dict[str, Any]) -> str:
    """Write the dataset's card: metadata that the Hub understands, and how the dataset was made."""
    return f"---\n{_metadata(report)}\n---\n\n{_text(title, report)}"


def _metadata(report: dict[str, Any]) -> str:
    from huggingface_hub import DatasetCardData

    splits, arguments = report["splits"], report["arguments"]
    licence = next((licence for owner, licence in LICENCES.items() if report["revision"] and arguments["src"].startswith(owner)), None)
    files = [{"split": split, "path": f"data/{split}-*"} for split, held in splits.items() if held["documents"]]
    documents = sum(held["documents"] for held in splits.values())
    return DatasetCardData(
        language=arguments["language"],
        license=licence,
        source_datasets=[arguments["src"].partition("@")[0]] if report["revision"] else None,
        size_categories=next((name for limit, name in SIZES if documents < limit), "n>100M"),
        task_categories=["text-generation"],
        configs=[{"config_name": "default", "data_files": files}],
    ).to_yaml()


def _text(title: str, report: dict[str, Any]) -> str:
    arguments, splits = report["arguments"], report["splits"]
    part = f", part `{arguments['name']}`" if arguments["name"] else ""
    revision = f" at revision `{report['revision']}`" if report["revision"] else ""
    rows = "\n".join(f"| {split} | {held['documents']:,} | {held['tokens']:,} |" for split, held in splits.items())
    dropped = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in report["dropped"].items())
    owner = arguments["src"].partition("@")[0] if report["revision"] else Path(arguments["src"]).name  # no paths of this machine
    credit = (
        f"The texts are from [{owner}](https://huggingface.co/datasets/{owner}), under the Open Data Commons Attribution License (ODC-By) "
        "v1.0; use is also subject to Common Crawl's terms of use."
        if owner.startswith(tuple(LICENCES))
        else "The texts are under the licence of their source."
    )
    use = "\n".join(
        f"{key}:\n  - path: FOLDER-OR-ID-OF-THIS-DATASET\n    type: completion\n    split: {split}"
        for key, split in (("datasets", "train"), ("test_datasets", "test"))
        if splits[split]["documents"]
    )
    held = f"A document is in `test` if the hash of its text says so (a share of {arguments['held_out']:g}, and the first text of all),"
    held = f"{held} so no text is in both splits." if arguments["held_out"] else "None is held out."
    return f"""# {title}

{splits["train"]["tokens"]:,} training tokens of `{owner}`{part}{revision}, for continued pretraining.

| split | documents | tokens |
|-|-|-|
{rows}

`n_tokens` counts each document as Axolotl's `type: completion` trains on it: with the special tokens of the tokenizer
`{report["tokenizer"]["name"]}` and an end-of-text token behind it. Documents stand in the order of the source, up to the one that
reached {arguments["tokens"]:,} training tokens. {held}
Dropped among the rows read: {dropped or "none"}.

## Use

```yaml
{use}
```

{credit}
Made with downcycle {report["versions"]["downcycle"]} and datatrove {report["versions"]["datatrove"]}; `downcycle-data.json` holds
every setting.
"""
