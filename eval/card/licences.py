"""What the licences of models ask of those who publish a model made from theirs: a name, a line, a notice, copies.

Holds what the licence texts say; reads no file and knows no model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Licence:
    """A licence and its duties. key: what it is called here, and as the Hub's `license`, where the Hub knows it.

    title: its name. words: what its text is known by, in capitals. owners: pattern of Hub ids of models under it.
    begins: with which the name of a derived model begins. built_with: a line to be shown. notice: the text of the NOTICE file.
    link, policy: its text and its acceptable use policy. copy: its text must be handed on. multimodal: what the policy says of the EU.
    """

    key: str
    title: str
    words: str = ""
    owners: str = ""
    begins: str = ""
    built_with: str = ""
    notice: str = ""
    link: str = ""
    policy: str = ""
    copy: bool = False
    multimodal: bool = False
    on_hub: bool = True


def _llama(version: str, year: str, *, multimodal: bool = False, on_hub: bool = True) -> Licence:
    """The terms that Llama 3.1 and later share: sections 1.b.i and 1.b.iii of each licence."""
    path = f"llama{version.replace('.', '_')}"
    return Licence(
        key=f"llama{version}",
        title=f"Llama {version} Community License Agreement, {year}",
        words=f"LLAMA {version} COMMUNITY LICENSE AGREEMENT",
        owners=rf"meta-llama/(Meta-)?Llama-{re.escape(version)}-.+",
        begins="Llama",
        built_with="Built with Llama",
        notice=f"Llama {version} is licensed under the Llama {version} Community License, Copyright © Meta Platforms, Inc. "
        "All Rights Reserved.",
        link=f"https://www.llama.com/{path}/license",
        policy=f"https://www.llama.com/{path}/use-policy",
        copy=True,
        multimodal=multimodal,
        on_hub=on_hub,
    )


LICENCES = (
    Licence(
        key="llama2",
        title="Llama 2 Community License Agreement, 2023",
        words="LLAMA 2 COMMUNITY LICENSE AGREEMENT",
        owners=r"meta-llama/Llama-2-.+",
        notice="Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved.",
        link="https://ai.meta.com/llama/license",
        policy="https://ai.meta.com/llama/use-policy",
        copy=True,
    ),
    Licence(
        key="llama3",
        title="Meta Llama 3 Community License Agreement, 2024",
        words="META LLAMA 3 COMMUNITY LICENSE AGREEMENT",
        owners=r"meta-llama/Meta-Llama-3-.+",
        begins="Llama 3",
        built_with="Built with Meta Llama 3",
        notice="Meta Llama 3 is licensed under the Meta Llama 3 Community License, Copyright © Meta Platforms, Inc. All Rights Reserved.",
        link="https://www.llama.com/llama3/license",
        policy="https://www.llama.com/llama3/use-policy",
        copy=True,
    ),
    _llama("3.1", "2024"),
    _llama("3.2", "2024", multimodal=True),
    _llama("3.3", "2024"),
    _llama("4", "2025", multimodal=True, on_hub=False),  # Meta's own cards give `other`, with the name llama4
    Licence(
        key="gemma",
        title="Gemma Terms of Use",
        words="GEMMA TERMS OF USE",
        owners=r"google/gemma-((1\.1-)?[27]b|2-|3-|3n-).*",
        notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
        link="https://ai.google.dev/gemma/terms",
        policy="https://ai.google.dev/gemma/prohibited_use_policy",
        copy=True,
    ),
    Licence("apache-2.0", "Apache License 2.0", "APACHE LICENSE", link="https://www.apache.org/licenses/LICENSE-2.0", copy=True),
    Licence("mit", "MIT License", "MIT LICENSE", copy=True),
)
KNOWN = {licence.key: licence for licence in LICENCES}


def known_licence(key: str | None) -> Licence | None:
    """Return a licence by its key, in any case; None for one whose terms are not known here."""
    return KNOWN.get((key or "").strip().lower())


def licence_in_card(metadata: Mapping[str, Any]) -> str | None:
    """Return the licence that a card's metadata names: `license_name` where `license` is `other`; None where it names none."""
    named = metadata.get("license")
    if isinstance(named, list):
        named = named[0] if len(named) == 1 else None
    if named == "other" and isinstance(metadata.get("license_name"), str):
        named = metadata["license_name"]
    if not isinstance(named, str) or not named.strip() or named in ("other", "unknown"):
        return None
    return known.key if (known := known_licence(named)) else named.strip()


def licence_in_text(text: str) -> str | None:
    """Return the licence that a LICENSE file's first lines name."""
    head = " ".join(text[:600].upper().split())
    found = [licence.key for licence in LICENCES if licence.words in head]
    if "apache-2.0" in found and "VERSION 2.0" not in head:
        found.remove("apache-2.0")
    return found[0] if len(found) == 1 else None


def licence_of_id(hub_id: str) -> str | None:
    """Return the licence of a model that its maker publishes under one only, by its Hub id."""
    return next((licence.key for licence in LICENCES if licence.owners and re.fullmatch(licence.owners, hub_id)), None)


def base_models(metadata: Mapping[str, Any]) -> list[str]:
    """Return what a card's metadata says that the model was made from."""
    named = metadata.get("base_model")
    return [one for one in (named if isinstance(named, list) else [named]) if isinstance(one, str)]


def name_fault(licence: str | None, name: str) -> str | None:
    """Say in one line why a model under a licence must not be called `name` (USER/ before it does not count); None where it may.

    Spaces, hyphens and underscores are alike, and so are capitals: `Llama-3-6B` begins with "Llama 3". Of a licence that is not
    known, no name is a fault.
    """
    known = known_licence(licence)
    if known is None or not known.begins:
        return None
    last = name.rstrip("/").rpartition("/")[2]
    begin = re.escape(known.begins).replace(r"\ ", "[-_ ]?")
    end = r"(?!\d)" if known.begins[-1].isdigit() else ""  # "Llama 32B" does not begin with "Llama 3"
    if re.match(begin + end, last, re.IGNORECASE):
        return None
    example = known.begins.replace(" ", "-")
    return f"{last}: the {known.title.partition(',')[0]} asks for a name that begins with {known.begins!r}; call it {example}-…"


def notice(licence: str | None) -> str | None:
    """Return the text that a licence wants in a NOTICE file beside the weights; None where it wants none."""
    known = known_licence(licence)
    return f"{known.notice}\n" if known and known.notice else None


def is_own_notice(text: str) -> bool:
    """Whether the text of a NOTICE file is one that is written here, to the byte."""
    return text in map(notice, KNOWN)


def duties(known: Licence, has_copy: bool) -> list[str]:
    """Return what a licence asks of those who hand the model on, as sentences.

    Args:
        has_copy: the licence's text lies beside the model.
    """
    asked = []
    if known.begins:
        asked.append(f"The name of a model made from it begins with “{known.begins}”.")
    if known.built_with:
        asked.append(f"“{known.built_with}” is shown prominently where it is distributed or used.")
    if known.copy and has_copy:
        asked.append("A copy of the licence goes with the model.")
    if known.notice:
        asked.append(f"A NOTICE file goes with it, which says: “{known.notice}”")
    if known.key == "gemma":
        asked.append("Files that were changed say so prominently, and the use restrictions of section 3.2 bind whoever receives it.")
    if known.policy:
        asked.append(f"Its use keeps to the [acceptable use policy]({known.policy}).")
    if known.multimodal:
        asked.append(
            "That policy grants no rights to the multimodal models of this release to individuals domiciled in, or companies with a "
            "principal place of business in, the European Union; users of products that contain them are excepted."
        )
    return asked
